"""The metadata services of AWS, Google Cloud and Azure on loopback, from which rehearsals and tests send spot notices.

Each is as strict as the cloud's own about paths, headers and tokens, and is reached through the variable that the
cloud's own tools read; for Azure, which has none, through skyspot's.
"""

from __future__ import annotations

import email.utils
import json
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
Answer = tuple[int, str, Mapping[str, str]]
"""Status, body, headers."""


class Metadata:
    """A cloud's metadata service. Use as a context manager; a thread answers each request."""

    cloud = ""
    variable = ""
    """The variable that sends a program here."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Notified when a request comes, and when what is announced changes."""
        self.requests: list[str] = []
        """Each request so far, as `GET /path`."""
        self.told = False
        """True if a request since `announce` was answered with the notice."""
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.changed:
            self.over.set()
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The URL of the service."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """The variable that points the trainer, and the cloud's own tools, to this service."""
        return {self.variable: self.url}

    def announce(self, seconds: float) -> None:
        """Announce from now on that this machine will be taken in this many seconds."""
        with self.changed:
            self.told = False
            self._plan(seconds)
            self.changed.notify_all()

    def clear(self) -> None:
        """Announce from now on that no interruption is planned."""
        with self.changed:
            self._plan(None)
            self.changed.notify_all()

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a request."""
        with self.changed:
            self.requests.append(f"{handler.command} {handler.path}")
            self.changed.notify_all()
        status, text, headers = self.answer(handler.command, handler.path, handler.headers)
        send(handler, status, text.encode(), headers)

    def answer(self, method: str, path: str, headers: Message) -> Answer:
        """Return the answer to a request; a subclass does."""
        raise NotImplementedError

    def _plan(self, seconds: float | None) -> None:
        """Set what is announced: the machine is taken in so many seconds; None: it stays."""
        raise NotImplementedError

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                service.respond(self)

            do_GET = do_PUT = do_POST = _any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """Send an answer."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    with suppress(OSError):  # The other side did not wait for it.
        handler.wfile.write(body)


class AwsMetadata(Metadata):
    """AWS's instance metadata service, version 2: a token first, then `spot/instance-action`."""

    cloud, variable = "aws", "AWS_EC2_METADATA_SERVICE_ENDPOINT"
    token = "rehearsal-token"
    longest_token_s = 21600
    action: str | None = None
    rebalance: str | None = None
    """The rebalance recommendation. A rehearsal makes none."""

    def answer(self, method: str, path: str, headers: Message) -> Answer:
        """As of `Metadata.answer`."""
        if (method, path) == ("PUT", "/latest/api/token"):
            seconds = headers.get("X-aws-ec2-metadata-token-ttl-seconds") or ""
            is_valid = seconds.isdecimal() and 1 <= int(seconds) <= self.longest_token_s
            return (200, self.token, NO_HEADERS) if is_valid else (400, "", NO_HEADERS)
        if headers.get("X-aws-ec2-metadata-token") != self.token:
            return 401, "", NO_HEADERS
        if method != "GET":
            return 405, "", NO_HEADERS
        action = self.action
        found = {
            "/latest/meta-data/instance-id": "i-0123456789abcdef0",
            "/latest/meta-data/instance-life-cycle": "spot",
            "/latest/meta-data/spot/instance-action": action,
            "/latest/meta-data/events/recommendations/rebalance": self.rebalance,
        }.get(path)
        self.told = self.told or (found is not None and found is action)
        return (404, "<html>not found</html>", NO_HEADERS) if found is None else (200, found, NO_HEADERS)

    def _plan(self, seconds: float | None) -> None:
        if seconds is None:
            self.action = None
            return
        when = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        self.action = json.dumps({"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})


class GcpMetadata(Metadata):
    """Google Cloud's metadata server: `instance/preempted`, which tells no time, and waits for a change if asked to."""

    cloud, variable = "gcp", "GCE_METADATA_HOST"
    value = "FALSE"
    waits = True
    """False: it answers at once, as a proxy in front of it may."""

    @property
    def env(self) -> dict[str, str]:
        """As of `Metadata.env`: Google's libraries expect HOST:PORT."""
        return {self.variable: self.url.removeprefix("http://")}

    def answer(self, method: str, path: str, headers: Message) -> Answer:
        """As of `Metadata.answer`."""
        place, _, query = path.partition("?")
        if headers.get("Metadata-Flavor") != "Google" or headers.get("X-Forwarded-For"):
            return 403, "forbidden", NO_HEADERS
        if place == "/computeMetadata/v1/instance/scheduling/preemptible":
            return 200, "TRUE", {"Metadata-Flavor": "Google"}
        if place != "/computeMetadata/v1/instance/preempted":
            return 404, "not found", {"Metadata-Flavor": "Google"}
        if method != "GET":
            return 405, "", {"Metadata-Flavor": "Google"}
        asked = dict(urllib.parse.parse_qsl(query))
        seen = asked.get("last_etag", "")
        with self.changed:
            if self.waits and asked.get("wait_for_change") == "true":
                if seen in ("", "0"):
                    seen = self._etag
                self.changed.wait_for(lambda: self.over.is_set() or seen != self._etag, _number(asked, "timeout_sec"))
            self.told = self.told or self.value == "TRUE"
            return 200, self.value, {"Metadata-Flavor": "Google", "ETag": self._etag}

    @property
    def _etag(self) -> str:
        return "411261ca6c9e4" + self.value.lower()

    def _plan(self, seconds: float | None) -> None:
        self.value = "FALSE" if seconds is None else "TRUE"


class AzureMetadata(Metadata):
    """Azure's metadata service: the scheduled events of a virtual machine, and its name."""

    cloud, variable = "azure", "SKYSPOT_AZURE_METADATA"
    name = "Spot-VM_0"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []
        self._scheduled = 0

    def schedule(self, kind: str, seconds: float | None, *, name: str | None = None, status: str = "Scheduled") -> None:
        """Announce one more event, of a machine by that name, in so many seconds; None: at no time that it says."""
        when = "" if seconds is None else email.utils.formatdate(time.time() + seconds, usegmt=True)
        event = {"EventId": f"{kind}-{self._scheduled}", "EventType": kind, "ResourceType": "VirtualMachine",
                 "Resources": [name or self.name.lower()], "EventStatus": status, "NotBefore": when}  # fmt: skip
        self._scheduled += 1
        self.events = [*self.events, event]

    def answer(self, method: str, path: str, headers: Message) -> Answer:
        """As of `Metadata.answer`. An event that is acknowledged stays: the rehearsal takes the machine at its time."""
        place, _, query = path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        if headers.get("Metadata") != "true" or headers.get("X-Forwarded-For") or not asked.get("api-version"):
            return 400, "", NO_HEADERS
        if place == "/metadata/scheduledevents" and method in ("GET", "POST"):
            if method == "POST":
                return 200, "", NO_HEADERS
            events = self.events
            self.told = self.told or bool(events)
            return 200, json.dumps({"DocumentIncarnation": self._scheduled, "Events": events}), NO_HEADERS
        texts = {"/metadata/instance/compute/name": self.name, "/metadata/instance/compute/priority": "Spot"}
        if method == "GET" and place in texts:
            return (200, texts[place], NO_HEADERS) if asked.get("format") == "text" else (400, "", NO_HEADERS)
        return 404, "", NO_HEADERS

    def _plan(self, seconds: float | None) -> None:
        self.events = []
        if seconds is not None:
            self.schedule("Preempt", seconds)


SERVICES: dict[str, type[Metadata]] = {one.cloud: one for one in (AwsMetadata, GcpMetadata, AzureMetadata)}


@contextmanager
def services(clouds: Iterable[str]) -> Iterator[dict[str, Metadata]]:
    """Run the services of these clouds; a cloud without one is left out."""
    with ExitStack() as stack:
        yield {cloud: stack.enter_context(SERVICES[cloud]()) for cloud in clouds if cloud in SERVICES}


def _number(asked: Mapping[str, str], key: str) -> float | None:
    text = asked.get(key, "")
    return float(text) if text.isdecimal() else None
