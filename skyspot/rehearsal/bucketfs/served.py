"""A bucket that a machine sees through the file system: where it is mounted, and how its daemon is started."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from skyspot.rehearsal.bucketfs.strike import Strike

_START = """import sys
sys.path[:] = {path!r}
from skyspot.rehearsal.bucketfs.serve import main
main(sys.argv[1])"""


@dataclass(frozen=True)
class Served:
    """One bucket of one machine."""

    bucket: Path
    """The folder that stands for it, and outlives the machine."""
    point: Path
    """Where it is mounted, inside the machine's namespace alone: to all others an empty folder, which exists."""
    disk: Path
    """A folder of the machine's for what has not arrived in the bucket; on the bucket's file system."""
    trace: Path
    """Outside the machine's folder, which it outlives."""
    manners: str
    """A key of MANNERS."""


def missing() -> str | None:
    """Say what the file system needs and is not installed; None if nothing."""
    if find_spec("mfusepy") is None:
        return "mfusepy is not installed: pip install 'skyspot[rehearse]'"
    if not Path("/dev/fuse").exists():
        return "this system has no /dev/fuse"
    try:
        import_module("mfusepy")
    except (OSError, AttributeError):
        return "libfuse 3 is not installed: apt install fuse3"
    return None


def write_daemons(file: Path, buckets: list[Served], proc: Path, strike: tuple[Served, Strike] | None) -> None:
    """Write what namespace.py starts: a command for each bucket's daemon.

    Args:
        file: Gets the commands, as JSON; the daemons' settings are written beside it.
        buckets: What they serve.
        proc: /proc of the machine's process namespace.
        strike: Which of the buckets it falls on, and where.
    """
    code = _START.format(path=[entry for entry in sys.path if entry])
    commands = []
    for number, served in enumerate(buckets):
        settings = {key: str(value) for key, value in asdict(served).items()} | {"proc": str(proc)}
        falls = asdict(strike[1]) if strike and strike[0] == served else None
        config = file.with_name(f"{file.stem}-{number}.json")
        config.write_text(json.dumps(settings | {"strike": falls}))
        commands.append([sys.executable, "-I", "-c", code, str(config)])
    file.write_text(json.dumps(commands))
