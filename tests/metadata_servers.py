"""Metadata services of clouds on loopback, and ways in which one may misbehave."""

from __future__ import annotations

import contextlib
import email.utils
import json
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "a-token"


class Server:
    """A server on loopback. Use as a context manager; a subclass answers in `answer`, in a thread for each request."""

    variable = ""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.requests: list[str] = []
        self.over = threading.Event()
        self.misbehave: Callable[[BaseHTTPRequestHandler], None] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def env(self) -> dict[str, str]:
        return {self.variable: f"http://127.0.0.1:{self._server.server_address[1]}"}

    def await_requests(self, more: int = 3) -> None:
        """Wait for so many further requests."""
        with self.changed:
            so_far = len(self.requests)
            assert self.changed.wait_for(lambda: len(self.requests) >= so_far + more, 30)

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str, dict[str, str]]:
        raise NotImplementedError

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                with service.changed:
                    service.requests.append(f"{self.command} {self.path}")
                    service.changed.notify_all()
                if service.misbehave:
                    return service.misbehave(self)
                status, text, headers = service.answer(self.command, self.path, self.headers)
                return send(self, status, text.encode(), headers)

            do_GET = do_PUT = do_POST = _any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    with contextlib.suppress(OSError):  # It was too long for the other side.
        handler.wfile.write(body)


class AwsServer(Server):
    variable = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
    action: str | None = None
    rebalance: str | None = None
    token = TOKEN

    def announce(self, seconds: float) -> None:
        when = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        self.action = json.dumps({"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str, dict[str, str]]:
        if (method, path) == ("PUT", "/latest/api/token"):
            return (200, self.token, {}) if headers["X-aws-ec2-metadata-token-ttl-seconds"] else (400, "", {})
        if headers["X-aws-ec2-metadata-token"] != self.token:
            return 401, "", {}
        found = {
            "/latest/meta-data/instance-id": "i-0123456789abcdef0",
            "/latest/meta-data/spot/instance-action": self.action,
            "/latest/meta-data/events/recommendations/rebalance": self.rebalance,
        }.get(path)
        return (404, "<html>not found</html>", {}) if found is None else (200, found, {})


class GcpServer(Server):
    variable = "GCE_METADATA_HOST"
    value = "FALSE"
    waits = True
    """False: it answers at once, as a proxy in front of it may."""

    def preempt(self) -> None:
        with self.changed:
            self.value = "TRUE"
            self.changed.notify_all()

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str, dict[str, str]]:
        if headers["Metadata-Flavor"] != "Google" or not path.startswith("/computeMetadata/v1/instance/preempted"):
            return 403, "forbidden", {}
        with self.changed:
            if self.waits and f"last_etag={self._etag}" in path:
                self.changed.wait_for(lambda: self.over.is_set() or f"last_etag={self._etag}" not in path, 60)
            return 200, self.value, {"Metadata-Flavor": "Google", "ETag": self._etag}

    @property
    def _etag(self) -> str:
        return "411261ca6c9e4" + self.value.lower()


class AzureServer(Server):
    variable = "SKYSPOT_AZURE_METADATA"
    name = "Spot-VM_0"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def schedule(self, kind: str, seconds: float | None, *, name: str | None = None, status: str = "Scheduled") -> None:
        when = "" if seconds is None else email.utils.formatdate(time.time() + seconds, usegmt=True)
        event = {"EventId": f"{kind}-{len(self.events)}", "EventType": kind, "ResourceType": "VirtualMachine",
                 "Resources": [name or self.name.lower()], "EventStatus": status, "NotBefore": when}  # fmt: skip
        self.events = [*self.events, event]

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str, dict[str, str]]:
        assert method == "GET", "nothing is acknowledged"
        if headers["Metadata"] != "true":
            return 400, "", {}
        if path.startswith("/metadata/instance/compute/name?"):
            return 200, self.name, {}
        return 200, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events}), {}


# -- misbehaviour ------------------------------------------------------------------------------------------------------


def html(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b"<html><title>Log in</title></html>", {})


def error(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 503, b"try later", {})


def torn(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b'{"action": "termin', {})


def too_long(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b"x" * 2**20, {})


def binary(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b"\xff\xfe\x00" * 10, {})


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x16\x03\x01 hello\r\n\r\n")


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def redirect(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 302, b"", {"Location": "/latest/elsewhere"})


MISBEHAVIOUR = [html, error, torn, too_long, binary, no_http, hang_up, redirect]
