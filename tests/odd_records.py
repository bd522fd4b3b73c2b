"""The records of a run in which a few values are odd ones: what a reader of records has to bear."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crafted import three_attempts

from skyspot.runs.records import RunRecords, parse_attempt
from trainer.layout.names import AttemptName


def odd_records(root: Path, seed: int, values: Sequence[Any], count: int) -> Iterator[RunRecords]:
    """Records of three attempts, `count` times; one file of one attempt has one to three of the values in it."""
    rng = random.Random(seed)
    names = {AttemptName(one.number, one.name[-6:]): one.folder for one in three_attempts(root)}
    raw = {name: {path.name: path.read_bytes() for path in sorted(folder.iterdir())} for name, folder in names.items()}
    for _ in range(count):
        files = {name: dict(own) for name, own in raw.items()}
        own = rng.choice(list(files.values()))
        file = rng.choice(list(own))
        lines = [json.loads(line) for line in own[file].splitlines()]
        for _ in range(rng.randint(1, 3)):
            line = rng.choice(lines)
            line[rng.choice(list(line))] = rng.choice(values)
        own[file] = b"\n".join(json.dumps(line).encode() for line in lines)
        yield RunRecords("run", tuple(parse_attempt(name, own) for name, own in files.items()), True)
