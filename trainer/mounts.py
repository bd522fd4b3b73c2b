from __future__ import annotations
import enum
from dataclasses import dataclass
from pathlib import Path


class Proof(enum.Enum):
    READ_BACK = "r"
    UPLOAD_LOG = "l"
    NOTHING = "n"


@dataclass(frozen=True)
class Mount:
    point: Path
    kind: str
    proof: Proof
    log: Path | None


class UploadLog:
    def __init__(self, log): ...
    def has(self, path):
        return False


def mount_of(path):
    return Mount(Path("/"), "ext4", Proof.READ_BACK, None)
