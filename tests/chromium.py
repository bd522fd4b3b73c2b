"""Pages in headless Chromium, over the DevTools protocol: what they request and log, their pixels and their colours."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from needs import find_browser
from websockets.sync.client import ClientConnection, connect

PHONE, SCREEN, PAPER = 390, 1200, 718
"""Widths in CSS pixels; that of A4 between margins of a centimeter."""
ANSWER_S = 60
_OPTIONS = (
    "--headless=new", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--font-render-hinting=none", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


def missing() -> str | None:
    """Why no page can be looked at here, as in needs.py; None if it can."""
    return None if find_browser() else "pages in a browser: apt install chromium"


class Browser:
    """A running browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._sent = 0
        self._events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str = "", **parameters: object) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        self._connection.send(json.dumps({**message, "sessionId": session} if session else message))
        while (found := json.loads(self._connection.recv(ANSWER_S))).get("id") != self._sent:
            self._events.append(found)
        assert "error" not in found, f"{method}: {found['error']}"
        return dict(found["result"])

    def wait_for(self, method: str, session: str) -> None:
        """Wait for an event that may have come already."""
        while not any(one.get("method") == method and one.get("sessionId") == session for one in self._events):
            self._events.append(json.loads(self._connection.recv(ANSWER_S)))

    def events(self, session: str, *methods: str) -> list[dict[str, Any]]:
        """What a page has reported."""
        return [
            one["params"] for one in self._events if one.get("sessionId") == session and one.get("method") in methods
        ]

    def open(self, url: str, width: int = SCREEN, *, dark: bool = False, media: str = "screen") -> Page:
        """A page, loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = str(self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        self.ask("Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1,
                 mobile=width == PHONE)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", session, media=media, features=[scheme])
        self.ask("Page.navigate", session, url=url)
        self.wait_for("Page.loadEventFired", session)
        return Page(self, target, session, width)


class Page:
    """A page in a browser."""

    def __init__(self, browser: Browser, target: str, session: str, width: int) -> None:
        self.browser, self.target, self.session, self.width = browser, target, session, width

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.browser.ask("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """The URLs that it asked for, its own included."""
        return [one["request"]["url"] for one in self.browser.events(self.session, "Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """What the console shows."""
        self.value("1")  # All that was reported before has arrived then.
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(one) for one in self.browser.events(self.session, *names)]

    def whole(self) -> int:
        """Make the window as high as the page; returns the height."""
        height = int(self.value("document.documentElement.scrollHeight"))
        self.browser.ask("Emulation.setDeviceMetricsOverride", self.session, width=self.width, height=height,
                         deviceScaleFactor=1, mobile=self.width == PHONE)  # fmt: skip
        return height

    def picture(self, height: int | None = None, scale: float = 1.0) -> bytes:
        """A PNG of the page from its top."""
        clip = {"x": 0, "y": 0, "width": self.width, "height": height or self.whole(), "scale": scale}
        return base64.b64decode(self.browser.ask("Page.captureScreenshot", self.session, clip=clip,
                                                 captureBeyondViewport=True)["data"])  # fmt: skip

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.browser.ask("Page.printToPDF", self.session, printBackground=False)["data"])

    def faint_texts(self, least: float = 4.5) -> list[str]:
        """The texts whose contrast with what is painted behind them is below the least ratio of WCAG."""
        self.whole()
        script = Path(__file__).with_name("contrast.js").read_text()
        found = self.value(f"({script})()")
        assert len(found) > 20, "texts were found"
        return [f"{one['text']}: {one['ratio']:.2f}" for one in found if one["ratio"] < least]

    def close(self) -> None:
        """Close it."""
        self.browser.ask("Target.closeTarget", targetId=self.target)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that reaches no network, with a profile of its own."""
    with tempfile.TemporaryDirectory(prefix="skyspot-chromium-", ignore_cleanup_errors=True) as profile:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        process = subprocess.Popen(
            [str(find_browser()), *_OPTIONS, *sandbox, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "HOME": profile},
        )  # fmt: skip
        try:
            assert process.stderr
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"DevTools listening on (ws://\S+)", line):
                    break
            else:
                raise AssertionError(f"Chromium did not start:\n{''.join(lines)}")
            with connect(found[1], max_size=None, compression=None, proxy=None) as connection:
                yield Browser(connection)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stderr:
                process.stderr.close()
