"""What tells this machine, and its processes, from others. Standard library only."""

from __future__ import annotations

import hashlib
import re
import secrets
from contextlib import suppress
from pathlib import Path

from trainer.machine import home

_PROCESS_TOKEN = secrets.token_hex(8)


def machine_token() -> str:
    """This machine's token, made where it is missing."""
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
    # Nowhere to keep it: then as long as the system runs.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return hashlib.sha256(boot).hexdigest()[:16]
    return _PROCESS_TOKEN


def process_started(pid: object) -> int | None:
    """When a process of this machine started, in ticks since the system did; None where there is none, or no /proc."""
    with suppress(OSError, ValueError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if state in (b"Z", b"X") else int(fields[18])
    return None
