"""Notices that this machine will be taken: SIGTERM, SIGINT, or the cloud's spot notice. Standard library only.

A signal handler only notes the time; everything else happens at a boundary between two steps. A thread polls the
cloud's metadata service, because on a virtual machine nothing else informs the user's process.
"""

from __future__ import annotations

import email.utils
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.layout.clouds import NOTICE_S

AWS_ENDPOINT = "http://169.254.169.254"
POLL_S = 5.0
REQUEST_S = 2.0
TOKEN_TTL_S = 21600
STALE_S = 10.0


@dataclass(frozen=True)
class Notice:
    """An announcement that the machine will be taken."""

    kind: str
    """A key of `ending.STOPS`: `sigterm`, `sigint`, or a cloud's, as `aws-notice`."""
    id: str
    """Identifies the notice; for a signal, its kind."""
    at: float
    """When it was received, in monotonic seconds."""
    seconds_left: float
    """From `at` until the machine is taken."""

    @property
    def deadline(self) -> float:
        """When the machine is taken, in monotonic seconds."""
        return self.at + self.seconds_left


class Notices:
    """All notices received so far."""

    def __init__(self, grace_s: float, ignored: frozenset[str] = frozenset()) -> None:
        """Start without notices.

        Args:
            grace_s: Seconds between SIGTERM and SIGKILL.
            ignored: Ids of the notices that ended an earlier attempt on this machine.
        """
        self.grace_s = grace_s
        self.ignored = ignored
        self.received = threading.Event()
        self.signalled = threading.Event()
        self._notices: list[Notice] = []
        self._replaced: dict[int, Any] = {}
        """The handlers of signals before `install`."""
        self._over = threading.Event()
        self._logged: set[str] = set()

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on; call on the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._replaced[number] = signal.signal(number, self._on_signal)

    def end(self) -> None:
        """Handle signals as before `install`, and stop polling; call on the main thread."""
        self._over.set()
        for number, handler in self._replaced.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def poll_metadata(self) -> None:
        """Poll the cloud's metadata service from now on, if there is one."""
        endpoint = aws_endpoint()
        if endpoint:
            threading.Thread(target=self._poll_aws, args=(endpoint,), daemon=True, name="notices").start()

    def first(self) -> Notice | None:
        """The notice with the earliest deadline; None if there is no notice."""
        return min(self._notices, key=lambda notice: notice.deadline, default=None)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        kind = "sigint" if number == signal.SIGINT else "sigterm"
        if kind not in {notice.kind for notice in self._notices}:  # A second signal does not move the deadline.
            self._notices.append(Notice(kind, kind, time.monotonic(), self.grace_s))
        self.received.set()
        self.signalled.set()

    def _poll_aws(self, endpoint: str) -> None:
        wait_s = float(os.environ.get("SKYSPOT_NOTICE_POLL_S") or POLL_S)
        token = ""
        while not self._over.is_set():
            try:
                token = token or aws_token(endpoint)
                notice = self._judge(*aws_action(endpoint, token))
                if notice:
                    self._notices.append(notice)
                    self.received.set()
                    return
            except urllib.error.HTTPError as error:
                if error.code == 401:
                    token = ""  # The token expired.
            except Exception:  # A torn answer counts as none; the next poll may succeed.
                pass
            self._over.wait(wait_s)

    def _judge(self, action: dict[str, str] | None, now: datetime) -> Notice | None:
        """The notice in the service's answer, unless it is for an earlier machine; `now` is the service's own time."""
        if action is None:
            return None
        text = str(action.get("time", ""))
        identity = f"aws/{text}"
        left = (datetime.fromisoformat(text.replace("Z", "+00:00")) - now).total_seconds()
        if left < -STALE_S or identity in self.ignored:
            if identity not in self._logged:
                self._logged.add(identity)
                why = f"its time passed {-left:.0f} s ago" if left < -STALE_S else "it ended an attempt here before"
                print(f"spot notice for {text} ignored: {why}", flush=True)
            return None
        return Notice("aws-notice", identity, time.monotonic(), min(max(left, 0.0), NOTICE_S["aws"]))


def aws_endpoint() -> str | None:
    """The address of AWS's metadata service; None if this machine does not belong to AWS."""
    override = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    if override:
        return override.rstrip("/")
    try:
        cloud = str(json.loads(os.environ.get("SKYPILOT_CLUSTER_INFO", "{}")).get("cloud", ""))
    except (ValueError, AttributeError):
        cloud = ""
    if cloud:
        return AWS_ENDPOINT if cloud.lower() == "aws" else None
    try:
        vendor = Path("/sys/class/dmi/id/sys_vendor").read_text().strip()
    except OSError:
        return None
    return AWS_ENDPOINT if vendor == "Amazon EC2" else None


def _request(request: urllib.request.Request) -> tuple[bytes, str]:
    """(body, Date header) of the answer to a request; never through a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=REQUEST_S) as answer:
        return answer.read(65536), answer.headers.get("Date") or ""


def aws_token(endpoint: str) -> str:
    """A session token for IMDSv2."""
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
    body, _ = _request(urllib.request.Request(f"{endpoint}/latest/api/token", method="PUT", headers=headers))
    return body.decode("ascii")


def aws_action(endpoint: str, token: str) -> tuple[dict[str, str] | None, datetime]:
    """(the spot instance-action or None, the service's own time)."""
    url = f"{endpoint}/latest/meta-data/spot/instance-action"
    try:
        body, date = _request(urllib.request.Request(url, headers={"X-aws-ec2-metadata-token": token}))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None, datetime.now(timezone.utc)
        raise
    now = email.utils.parsedate_to_datetime(date) if date else datetime.now(timezone.utc)
    document = json.loads(body)
    if not isinstance(document, dict) or document.get("action") not in ("terminate", "stop", "hibernate"):
        return None, now
    return document, now
