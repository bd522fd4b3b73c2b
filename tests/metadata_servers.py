"""The metadata services of a rehearsal, made to misbehave."""

from __future__ import annotations

from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler

from skyspot.rehearsal.metadata import NO_HEADERS, Answer, AwsMetadata, AzureMetadata, GcpMetadata, Metadata, send

REFUSALS = (400, 401, 403, 405)


class Server(Metadata):
    """A service that misbehaves from the moment that `misbehave` is set."""

    misbehave: Callable[[BaseHTTPRequestHandler], None] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []
        """Each request so far that was not as the cloud wants it, with the status."""

    def answer(self, method: str, path: str, headers: Message) -> Answer:
        answer = super().answer(method, path, headers)
        if answer[0] in REFUSALS:
            self.refused.append(f"{method} {path}: {answer[0]}")
        return answer

    def await_requests(self, more: int = 3) -> None:
        """Wait for so many further requests."""
        with self.changed:
            so_far = len(self.requests)
            assert self.changed.wait_for(lambda: len(self.requests) >= so_far + more, 30)

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        if not self.misbehave:
            super().respond(handler)
            return
        with self.changed:
            self.requests.append(f"{handler.command} {handler.path}")
            self.changed.notify_all()
        self.misbehave(handler)


class AwsServer(Server, AwsMetadata):
    pass


class GcpServer(Server, GcpMetadata):
    pass


class AzureServer(Server, AzureMetadata):
    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        assert handler.command == "GET", "nothing is acknowledged"
        super().respond(handler)


# -- misbehaviour ------------------------------------------------------------------------------------------------------


def html(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b"<html><title>Log in</title></html>", NO_HEADERS)


def error(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 503, b"try later", NO_HEADERS)


def torn(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b'{"action": "termin', NO_HEADERS)


def too_long(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b"x" * 2**20, NO_HEADERS)


def binary(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 200, b"\xff\xfe\x00" * 10, NO_HEADERS)


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x16\x03\x01 hello\r\n\r\n")


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def redirect(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 302, b"", {"Location": "/latest/elsewhere"})


MISBEHAVIOUR = [html, error, torn, too_long, binary, no_http, hang_up, redirect]
