"""SkyPilot's price catalogs: one CSV file for each cloud, read without SkyPilot and without a network.

The format is schema v8 of SkyPilot's catalogs (sky/catalog/common.py). Only the lines that name a wanted accelerator or
instance type are parsed, so that a file of 100,000 rows takes a fraction of a second.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from skyspot.home import expanded
from skyspot.task.ladder import CLOUDS, OWN_MACHINES

SCHEMA = "v8"
"""CATALOG_SCHEMA_VERSION in sky/skylet/constants.py."""
MAX_BYTES = 256 << 20
"""A larger file is no catalog; SkyPilot's largest have about 30 MB."""
_REQUIRED = ("InstanceType", "AcceleratorName", "AcceleratorCount", "Price", "SpotPrice", "Region")
_OPTIONAL = ("AvailabilityZone", "vCPUs", "MemoryGiB")
_REMEDY = "delete it, and SkyPilot downloads it again"


class Row(NamedTuple):
    """One row of a catalog. Prices are in USD an hour; None: no price. A tuple, because there are thousands."""

    instance_type: str
    """Empty in Google Cloud's rows of accelerators without their host."""
    accelerator: str
    """Empty if the machine has none, or if the row is Google Cloud's of a host without its accelerators."""
    number: float
    """The number of accelerators of a machine."""
    cpus: float | None
    memory_gib: float | None
    on_demand: float | None
    spot: float | None
    region: str
    zone: str | None


@dataclass(frozen=True)
class Catalog:
    """The wanted rows of one cloud's catalog."""

    cloud: str
    path: Path
    rows: tuple[Row, ...] = ()
    downloaded_at: float | None = None
    """Unix seconds of its download; None: unknown, because SkyPilot did not download this file as it is."""
    problems: tuple[str, ...] = ()
    """What is wrong with the file, each in a line with its remedy."""


def catalog_folder() -> Path:
    """The folder of the catalogs, in SKY_RUNTIME_DIR or the home folder (sky/skylet/runtime_utils.py)."""
    return _runtime_folder() / ".sky" / "catalogs" / SCHEMA


def _runtime_folder() -> Path:
    return expanded(os.environ.get("SKY_RUNTIME_DIR", "~"))


def clouds_here() -> tuple[str, ...]:
    """The clouds whose catalogs are on this machine."""
    folder = catalog_folder()
    return tuple(cloud for cloud in CLOUDS if cloud not in OWN_MACHINES and _path(folder, cloud).exists())


def enabled_clouds() -> tuple[str, ...] | None:
    """The clouds that SkyPilot has enabled for this user (`sky check`), in any workspace; None: unknown.

    SkyPilot's local server keeps them in state.db (set_enabled_clouds() in sky/global_user_state.py).
    """
    import sqlite3  # Only a plan needs it.

    path = _runtime_folder() / ".sky" / "state.db"
    if not path.is_file():
        return None
    found: set[str] = set()
    rows: list[tuple[Any]] = []
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.2)) as database:
        query = "SELECT value FROM config WHERE key LIKE 'enabled_clouds\\_%\\_compute%' ESCAPE '\\'"
        rows = database.execute(query).fetchall()
    for (value,) in rows:
        with suppress(ValueError, TypeError):
            found |= {str(cloud).lower() for cloud in json.loads(value)}
    return tuple(cloud for cloud in CLOUDS if cloud in found) or None


def _path(folder: Path, cloud: str) -> Path:
    return folder / cloud / "vms.csv"


def read_catalog(cloud: str, wanted: Collection[str] | None) -> Catalog | None:
    """Read one cloud's catalog; None if it is not on this machine. A file that cannot be read has `problems`.

    Args:
        cloud: In lower case.
        wanted: Accelerators, instance types or parts of them, in any case; rows that name none of them may be left
            out. None: all rows.
    """
    folder = catalog_folder()
    path = _path(folder, cloud)
    empty = Catalog(cloud, path)
    try:
        if not path.is_file():
            return replace(empty, problems=(f"{path} is no file; {_REMEDY}",)) if path.exists() else None
        if (size := path.stat().st_size) > MAX_BYTES:
            return replace(empty, problems=(f"{path} has {size >> 20} MB, more than a catalog can have; {_REMEDY}",))
        data = path.read_bytes()
    except OSError as error:
        return replace(empty, problems=(f"{path}: {error.strerror}",))
    header, problem = _header(data)
    if problem:
        return replace(empty, problems=(f"{path} {problem}; {_REMEDY}",))
    lines = _lines(data) if wanted is None else _lines_with(data, wanted)
    rows, torn = _rows(header, lines)
    if cloud == "aws":
        rows = _with_zone_names(rows, folder / cloud)
    several = f"{torn} rows are" if torn > 1 else "1 row is"
    problems = (f"{path}: {several} torn and left out; {_REMEDY}",) if torn else ()
    return replace(empty, rows=tuple(rows), problems=problems, downloaded_at=_downloaded_at(folder, cloud, data))


def _header(data: bytes) -> tuple[list[str], str]:
    """The names of the columns, and what is wrong with them."""
    first = data[: data.find(b"\n")] if b"\n" in data else data
    header = next(iter(csv.reader([first.decode("utf-8-sig", "replace")])), [])
    if not header:
        return [], "is empty"
    missing = [name for name in _REQUIRED if name not in header]
    return header, f"has no column {', '.join(missing)}" if missing else ""


def _lines(data: bytes) -> Iterator[bytes]:
    return iter(data.splitlines()[1:])


def _lines_with(data: bytes, wanted: Collection[str]) -> Iterator[bytes]:
    """The lines below the header that name what is wanted, in the file's order."""
    lower = data.lower()
    spans: set[tuple[int, int]] = set()
    below = data.find(b"\n") + 1 or len(data)
    for text in wanted:
        needle = text.lower().encode()
        at = lower.find(needle, below)
        while at >= 0:
            start, end = lower.rfind(b"\n", 0, at) + 1, lower.find(b"\n", at)
            end = len(data) if end < 0 else end
            spans.add((start, end))
            at = lower.find(needle, end)
    return (data[start:end] for start, end in sorted(spans))


def _rows(header: Sequence[str], lines: Iterable[bytes]) -> tuple[list[Row], int]:
    """Parse lines; returns the rows, and how many lines are torn."""
    at = {name: header.index(name) for name in (*_REQUIRED, *_OPTIONAL) if name in header}
    kind, name, count = at["InstanceType"], at["AcceleratorName"], at["AcceleratorCount"]
    price, spot, region = at["Price"], at["SpotPrice"], at["Region"]
    zone, cpus, memory = (at.get(column) for column in _OPTIONAL)
    found: list[Row] = []
    torn, width = [0], len(header)
    for cells in csv.reader(_whole(lines, torn)):
        if len(cells) != width:
            torn[0] += bool(cells)
            continue
        found.append(
            Row(  # By position, which is quicker than by name.
                cells[kind],
                cells[name],
                _number(cells[count]) or 0.0,
                None if cpus is None else _number(cells[cpus]),
                None if memory is None else _number(cells[memory]),
                _number(cells[price]),
                _number(cells[spot]),
                cells[region],
                (cells[zone] or None) if zone is not None else None,
            )
        )
    return found, torn[0]


def _whole(lines: Iterable[bytes], torn: list[int]) -> Iterator[str]:
    """The lines as text, without those that have an odd quote, which are counted in `torn`.

    A field never spans lines, so an odd quote is torn, and must not swallow the lines after it.
    """
    for line in lines:
        if line.count(b'"') % 2:
            torn[0] += 1
        else:
            yield line.decode("utf-8", "replace")


@lru_cache(None)  # Sizes and prices repeat.
def _number(text: str) -> float | None:
    """A number of a catalog; None for an empty cell, NaN, infinity, a negative number and what is no number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < 1e9 else None


def _with_zone_names(rows: list[Row], folder: Path) -> list[Row]:
    """Rename AWS's zone ids (use1-az1), which the catalog has, to the account's names (us-east-1a) where known.

    SkyPilot writes the mapping once it has credentials. Zones that are not in it belong to regions that the account
    has not enabled, and are dropped (_fetch_and_apply_az_mapping() in sky/catalog/aws_catalog.py).
    """
    with suppress(OSError, UnicodeDecodeError, KeyError, csv.Error):
        files = sorted(folder.glob("az_mappings-*.csv"), key=lambda path: path.stat().st_mtime)
        if files:
            with files[-1].open(encoding="utf-8", newline="") as file:
                names = {row["AvailabilityZone"]: row["AvailabilityZoneName"] for row in csv.DictReader(file)}
            return [row._replace(zone=names[row.zone]) for row in rows if row.zone in names]
    return rows


def _downloaded_at(folder: Path, cloud: str, data: bytes) -> float | None:
    """When SkyPilot downloaded these contents; None if it did not, or they were changed since.

    SkyPilot writes the file's MD5 beside each successful download. The file's own time is no evidence: a refresh that
    fails sets it, too (_update_catalog() in sky/catalog/common.py).
    """
    note = folder / ".meta" / cloud / "vms.csv.md5"
    try:
        same = note.read_text(encoding="utf-8").strip() == hashlib.md5(data, usedforsecurity=False).hexdigest()
        return note.stat().st_mtime if same else None
    except (OSError, UnicodeDecodeError):
        return None
