"""The Hugging Face Hub on loopback: the requests of `repo_info` and `snapshot_download`."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Commits = dict[str, dict[str, bytes]]
"""Files by commit, the newest last."""


class HubServer:
    """Repositories by kind and name (`models/org/net`), and the ways in which the Hub may fail."""

    def __init__(self, repositories: dict[str, Commits]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        """The paths of all requests."""
        self.fail: list[tuple[int, str]] = []
        """Status and error code of each of the next answers; the last entry is used again and again."""
        self.fail_for = ""
        """Only requests whose path contains it fail."""
        self.on_request: Callable[[], None] = lambda: None
        """Called before each answer, which waits for it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator[HubServer]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.asked.append(path)
                hub.on_request()
                if hub.fail and hub.fail_for in path:
                    status, code = hub.fail[0] if len(hub.fail) == 1 else hub.fail.pop(0)
                    if status:
                        return self._send(status, b"", **{"X-Error-Code": code, "X-Error-Message": code})
                if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                    return self._info(f"{found[1]}/{found[2]}", found[3] or "main")
                if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    commits = hub.repositories.get(f"{found[1] or 'models/'}{found[2]}", {})
                    if found[4] in commits.get(found[3], {}):
                        return self._file(commits[found[3]][found[4]], found[3])
                return self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})

            do_HEAD = do_GET

            def _info(self, name: str, revision: str) -> None:
                commits = hub.repositories.get(name)
                if commits is None:
                    return self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})
                sha = list(commits)[-1] if revision == "main" else revision
                if sha not in commits:
                    return self._send(404, b"", **{"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": file} for file in commits[sha]]
                document = {"id": name.partition("/")[2], "sha": sha, "siblings": siblings, "private": False}
                return self._send(200, json.dumps(document).encode(), **{"Content-Type": "application/json"})

            def _file(self, body: bytes, sha: str) -> None:
                self._send(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', **{"X-Repo-Commit": sha})

            def _send(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    with suppress(ConnectionError):  # Whoever asked may be gone.
                        self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
