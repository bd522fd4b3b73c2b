"""A cloud's metadata service, asked over HTTP; no answer of it can hold up the caller. Standard library only.

No proxy is used and no redirect is followed: the service answers on this machine's own network. A request has one time
limit in all, however slowly the answer drips in, and one limit of size.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from types import MappingProxyType
from typing import Any

REQUEST_S = 2.0
"""The time limit of a request, unless the caller sets another."""
LARGEST_ANSWER = 65536
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ServiceError(OSError):
    """The service gave no answer that can be used."""


@dataclass(frozen=True)
class Answer:
    """An answer of the service."""

    status: int
    body: bytes
    headers: Message
    """By name, in any case."""

    @property
    def text(self) -> str:
        """The body as text.

        Raises:
            ServiceError: the status is not 200, or the body is not text.
        """
        if self.status != 200:
            raise ServiceError(f"it answers with status {self.status}")
        try:
            return self.body.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ServiceError("its answer is not text") from None

    @property
    def now(self) -> datetime:
        """The time by the service's own clock; by this machine's where the answer does not say."""
        try:
            return in_utc(email.utils.parsedate_to_datetime(self.headers.get("Date") or ""))
        except (TypeError, ValueError):
            return datetime.now(timezone.utc)


class Service:
    """Asks the service at a URL, one request at a time; `close`, from any thread, ends a request under way."""

    def __init__(self, url: str) -> None:
        """Prepare; nothing is sent.

        Raises:
            ServiceError: the URL is not one of HTTP.
        """
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port:
            raise ServiceError(f"{url} is not the URL of a metadata service (http://HOST:PORT)")
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._is_closed = False

    def ask(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] = NO_HEADERS, seconds: float = REQUEST_S
    ) -> Answer:
        """Return the answer to a request.

        Args:
            path: What to ask for, from the root of the service.
            method: The method of HTTP.
            headers: Headers to send.
            seconds: The time limit of the request, from the connection to the last byte.

        Raises:
            ServiceError: there is none within the limits, or `close` was called.
            OSError: the service cannot be reached.
        """
        end = time.monotonic() + seconds
        connection = socket.create_connection((self._host, self._port), min(seconds, REQUEST_S))
        try:
            with self._lock:
                if self._is_closed:
                    raise ServiceError("it is not asked any more")
                self._connection = connection
            lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._host}:{self._port}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            if method != "GET":
                lines.append("Content-Length: 0")
            connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii"))
            return _read(connection, method, end)
        except (http.client.HTTPException, ValueError) as error:
            raise ServiceError(f"its answer is not one of HTTP ({type(error).__name__})") from None
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def close(self) -> None:
        """End the request under way; further ones raise."""
        with self._lock:
            self._is_closed = True
            if self._connection:
                with suppress(OSError):  # It may be gone already.
                    self._connection.shutdown(socket.SHUT_RDWR)


class _Received(io.RawIOBase):
    """What a connection receives until a time, however slowly it comes."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        self._connection, self._end = connection, end

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return a file to read from: all that `HTTPResponse` asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left > 0:
            self._connection.settimeout(left)
            with suppress(TimeoutError):
                return self._connection.recv_into(buffer)
        raise ServiceError("its answer takes too long")


def _read(connection: socket.socket, method: str, end: float) -> Answer:
    """Read an answer until the time `end`."""
    response = http.client.HTTPResponse(_Received(connection, end), method=method)  # type: ignore[arg-type]
    response.begin()
    body = response.read(LARGEST_ANSWER + 1)
    if len(body) > LARGEST_ANSWER:
        raise ServiceError("its answer is too long")
    return Answer(response.status, body, response.headers)


def in_utc(moment: datetime) -> datetime:
    """The same moment in UTC; one without a time zone is taken as UTC, as each of the clouds writes it."""
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
