"""A fake AWS metadata service on loopback, from which rehearsals and tests send spot notices."""

from __future__ import annotations

import json
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

_TOKEN = "rehearsal-token"


class AwsMetadata:
    """AWS's instance metadata service, version 2: a token first, then `spot/instance-action`.

    Use as a context manager; `env()` sends a trainer here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._action: dict[str, str] | None = None
        self.requests = 0
        """Number of requests for instance-action."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> AwsMetadata:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The URL of the service."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def env(self) -> dict[str, str]:
        """Return the variable that points the trainer, and AWS's own tools, to this service."""
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url}

    def announce(self, seconds: float, action: str = "terminate") -> None:
        """Announce from now on that this machine will be taken in this many seconds."""
        when = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        with self._lock:
            self._action = {"action": action, "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")}

    def clear(self) -> None:
        """Announce from now on that no interruption is planned."""
        with self._lock:
            self._action = None

    def _answer(self) -> dict[str, str] | None:
        with self._lock:
            self.requests += 1
            return self._action

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                fresh = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
                self._send(200, _TOKEN) if fresh else self._send(400, "")

            def do_GET(self) -> None:
                if self.headers.get("X-aws-ec2-metadata-token") != _TOKEN:
                    self._send(401, "")
                elif self.path != "/latest/meta-data/spot/instance-action":
                    self._send(404, "")
                else:
                    action = service._answer()
                    self._send(200, json.dumps(action)) if action else self._send(404, "")

            def _send(self, code: int, body: str) -> None:
                data = body.encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
