"""Google Cloud: whether this instance is being preempted, by a request that waits for the change.

Source: https://cloud.google.com/compute/docs/instances/create-use-spot and .../metadata/querying-metadata. The value is
TRUE or FALSE; it says no time. Standard library only.
"""

from __future__ import annotations

import os
import time

from trainer.layout.clouds import NOTICE_S, notice_s
from trainer.machine.token import boot_id
from trainer.notices.service import REQUEST_S, Answer, Service, ServiceError
from trainer.notices.source import Announcement

ENDPOINT = "http://169.254.169.254"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
PREEMPTIBLE = "/computeMetadata/v1/instance/scheduling/preemptible"
POLL_S = 5.0
"""Seconds between two requests that do not wait."""
WAIT_S = 60
"""The longest time that the service lets a request wait for a change."""
FLAVOR = {"Metadata-Flavor": "Google"}


def endpoint() -> str:
    """The service's URL, as Google's own libraries take it from the environment.

    The default is its address, not its name: a name server that does not answer would hold up each request.
    """
    return os.environ.get("GCE_METADATA_HOST") or ENDPOINT


class Gcp:
    """The metadata service of an instance."""

    cloud = "gcp"

    def __init__(self) -> None:
        self._service = Service(endpoint())
        self.poll_s = POLL_S
        self.longest_s = notice_s("gcp") or NOTICE_S["gcp"]
        self._etag = ""

    def close(self) -> None:
        """As of `Source.close`."""
        self._service.close()

    def is_here(self) -> bool:
        """True if the service answers as Google's does."""
        return self._value(self._service.ask(PREEMPTED, headers=FLAVOR)) is not None

    def ask(self) -> list[Announcement]:
        """As of `Source.ask`. The first request does not wait: the value may be TRUE already."""
        begun, waits = time.monotonic(), bool(self._etag)
        wait = f"?wait_for_change=true&timeout_sec={WAIT_S}&last_etag={self._etag}" if waits else ""
        answer = self._service.ask(f"{PREEMPTED}{wait}", headers=FLAVOR, seconds=WAIT_S * waits + REQUEST_S)
        is_preempted = self._value(answer)
        etag = answer.headers.get("ETag") or ""
        # A service that answers at once although nothing has changed does not wait: it is asked every POLL_S.
        answers_at_once = waits and etag == self._etag and time.monotonic() - begun < POLL_S
        self._etag = "" if answers_at_once or not etag.isalnum() else etag
        self.poll_s = 0.0 if self._etag else POLL_S
        # An instance that was stopped can be started again and preempted again, with the same disk.
        announced = Announcement(f"gcp/preempted/{boot_id()}", "of this instance", self.longest_s)
        return [announced] if is_preempted else []

    def is_spot(self) -> bool | None:
        """True if this instance can be preempted, as a spot instance can."""
        return self._value(self._service.ask(PREEMPTIBLE, headers=FLAVOR))

    def _value(self, answer: Answer) -> bool:
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise ServiceError("another program answers in its place")
        if answer.text not in ("TRUE", "FALSE"):
            raise ServiceError("its answer is neither TRUE nor FALSE")
        return answer.text == "TRUE"
