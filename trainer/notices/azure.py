"""Azure: the scheduled events of this virtual machine. Standard library only.

Source: https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events. Only an event of type Preempt takes a
spot machine; it is at least 30 s off. Nothing is acknowledged: that would let Azure take the machine at once. The
first request of a machine makes Azure start the service, which takes up to two minutes.
"""

from __future__ import annotations

import email.utils
import json
import os
from contextlib import suppress
from typing import Any

from trainer.layout.clouds import NOTICE_S
from trainer.notices.service import REQUEST_S, Answer, Service, ServiceError, in_utc
from trainer.notices.source import Announcement

ENDPOINT = "http://169.254.169.254"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
PRIORITY = "/metadata/instance/compute/priority?api-version=2021-02-01&format=text"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
METADATA = {"Metadata": "true"}
FIRST_S = 150.0
"""The time limit of requests until the first answer."""


def endpoint() -> str:
    """The service's URL; Azure's own tools have no variable for it."""
    return os.environ.get("SKYSPOT_AZURE_METADATA") or ENDPOINT


class Azure:
    """The metadata service of a virtual machine."""

    cloud, poll_s, longest_s = "azure", 1.0, 120.0

    def __init__(self) -> None:
        self._service = Service(endpoint())
        self._name = ""
        self._seconds = FIRST_S

    def close(self) -> None:
        """As of `Source.close`."""
        self._service.close()

    def is_here(self) -> bool:
        """True if the service answers as Azure's does."""
        return bool(self._own_name())

    def ask(self) -> list[Announcement]:
        """As of `Source.ask`: every event that names this machine."""
        self._name = self._name or self._own_name()
        answer = self._service.ask(EVENTS, headers=METADATA, seconds=self._seconds)
        document = json.loads(answer.text)
        if not isinstance(document, dict) or not isinstance(document.get("Events"), list):
            raise ServiceError("its answer is not a list of events")
        self._seconds = REQUEST_S
        found = [event for event in document["Events"] if isinstance(event, dict) and self._is_ours(event)]
        return [_announced(answer, event) for event in found]

    def is_spot(self) -> bool | None:
        """True if this is a spot machine; None if the service does not say."""
        return {"Spot": True, "Regular": False}.get(self._service.ask(PRIORITY, headers=METADATA).text)

    def _own_name(self) -> str:
        name = self._service.ask(NAME, headers=METADATA).text
        if not name or len(name) > 80 or any(letter in name for letter in "<>{} \n"):
            raise ServiceError("its answer is no machine's name")
        return name

    def _is_ours(self, event: dict[str, Any]) -> bool:
        resources = event.get("Resources")
        return isinstance(resources, list) and self._name.casefold() in {str(one).casefold() for one in resources}


def _announced(answer: Answer, event: dict[str, Any]) -> Announcement:
    """An event; one that has begun, or that names no time that can be read, leaves no more than the least notice."""
    kind, when = str(event.get("EventType")), str(event.get("NotBefore") or "")
    left = 0.0 if event.get("EventStatus") == "Started" else NOTICE_S["azure"]
    with suppress(TypeError, ValueError, OverflowError, IndexError):  # An odd time hides no other event.
        left = (in_utc(email.utils.parsedate_to_datetime(when)) - answer.now).total_seconds()
    about = f"of type {kind}" + (f" for {when}" if when else "")
    return Announcement(f"azure/{event.get('EventId')}", about, left, takes_machine=kind == "Preempt")
