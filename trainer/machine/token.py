"""Tokens that identify this machine and its processes. Standard library only."""

from __future__ import annotations

import hashlib
import re
import secrets
from contextlib import suppress
from pathlib import Path

from trainer.machine import home

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESS_TOKEN = secrets.token_hex(8)


def machine_token() -> str:
    """This machine's token; made if there is none yet."""
    if folder := home.cache():
        path = folder / "machine"
        with suppress(OSError, ValueError):
            token = path.read_text().strip()
            if re.fullmatch(r"[0-9a-f]{16}", token):
                return token
        with suppress(OSError):
            token = secrets.token_hex(8)
            path.write_text(token)
            return token
    # There is no place to keep a token: this one lasts until the machine boots again.
    boot = boot_id()
    return hashlib.sha256(boot.encode()).hexdigest()[:16] if boot else _PROCESS_TOKEN


def boot_id() -> str:
    """An id of this boot of the machine; empty where the system has none (macOS)."""
    with suppress(OSError):
        return BOOT_ID.read_text().strip()
    return ""


def process_started(pid: object) -> int | None:
    """The start time of a process on this machine, in ticks since boot; None without such a process or /proc."""
    with suppress(OSError, ValueError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if state in (b"Z", b"X") else int(fields[18])
    return None
