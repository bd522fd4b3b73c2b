"""AWS: the spot notice and the rebalance recommendation of the metadata service, version 2. Standard library only.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html and
.../rebalance-recommendations.html. The notice comes 120 s before; the service should be asked every 5 s.
"""

from __future__ import annotations

import json
import os
from datetime import datetime

from trainer.layout.clouds import NOTICE_S
from trainer.notices.service import Answer, Service, ServiceError, in_utc
from trainer.notices.source import Announcement

ENDPOINT = "http://169.254.169.254"
TOKEN_S = 21600
TAKES = ("terminate", "stop", "hibernate")


def endpoint() -> str:
    """The service's URL, as AWS's own tools take it from the environment."""
    return os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ENDPOINT


class Aws:
    """The metadata service of an instance."""

    cloud, poll_s, longest_s = "aws", 5.0, NOTICE_S["aws"]

    def __init__(self) -> None:
        self._service = Service(endpoint())
        self._token = ""

    def close(self) -> None:
        """As of `Source.close`."""
        self._service.close()

    def is_here(self) -> bool:
        """True if the service names an instance, as AWS's does."""
        return self._get("instance-id").text.startswith("i-")

    def ask(self) -> list[Announcement]:
        """As of `Source.ask`: the notice, or else the recommendation."""
        answer = self._get("spot/instance-action")
        if answer.status == 200:
            action = _document(answer)
            if action.get("action") not in TAKES:
                return []
            return [_announced(answer, "aws", action, "time")]
        if answer.status != 404:
            raise ServiceError(f"it answers with status {answer.status}")
        hint = self._get("events/recommendations/rebalance")
        if hint.status != 200:
            return []
        return [_announced(hint, "aws/rebalance", _document(hint), "noticeTime", is_hint=True)]

    def is_spot(self) -> bool | None:
        """True if this is a spot instance; None if the service does not say."""
        return {"spot": True, "on-demand": False}.get(self._get("instance-life-cycle").text)

    def _get(self, path: str) -> Answer:
        for _ in range(2):
            self._token = self._token or self._fresh_token()
            answer = self._service.ask(f"/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": self._token})
            if answer.status != 401:
                break
            self._token = ""  # It has expired.
        return answer

    def _fresh_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
        token = self._service.ask("/latest/api/token", method="PUT", headers=headers).text
        if not token or len(token) > 1024 or not token.isascii() or not token.isprintable() or "<" in token:
            raise ServiceError("its token is not one")
        return token


def _document(answer: Answer) -> dict[str, object]:
    document = json.loads(answer.text)
    if not isinstance(document, dict):
        raise ServiceError("its answer is not a JSON object")
    return document


def _announced(answer: Answer, kind: str, document: dict[str, object], key: str, is_hint: bool = False) -> Announcement:
    text = str(document.get(key))
    left = (in_utc(datetime.fromisoformat(text.replace("Z", "+00:00"))) - answer.now).total_seconds()
    return Announcement(f"{kind}/{text}", f"for {text}", left, is_hint=is_hint)
