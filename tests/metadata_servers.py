"""The metadata services of a rehearsal, made to misbehave."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from skyspot.rehearsal.metadata import NO_HEADERS, AwsMetadata, AzureMetadata, GcpMetadata, Metadata, send


class Server(Metadata):
    """A service that misbehaves from the moment that `misbehave` is set."""

    misbehave: Callable[[BaseHTTPRequestHandler], None] | None = None

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
