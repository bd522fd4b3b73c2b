"""Random numbers that do not depend on the rank.

Each micro-step runs under generators seeded from (seed, step, micro-step) alone. The user's own streams (torch, CUDA,
numpy, random) are set aside meanwhile, and put back afterwards.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def micro_step_seed(seed: int, step: int, micro_step: int) -> int:
    """A seed of 63 bits, the same on every rank; `step` and `micro_step` count from 0."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


Streams = tuple[Any, ...]
"""The states of the user's streams: torch, CUDA, numpy, random."""


def streams() -> Streams:
    """Copy the states of the user's streams."""
    is_initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state() if is_initialized else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def host_streams() -> Streams:
    """Copy the states of the user's streams but those of a device."""
    return torch.get_rng_state(), None, np.random.get_state(), random.getstate()


def put_back(kept: Streams) -> None:
    """Restore what `streams` returned."""
    cpu, cuda, numpy_state, python_state = kept
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


@contextmanager
def set_aside() -> Iterator[None]:
    """Keep the user's streams unchanged by what is drawn inside."""
    kept = streams()
    try:
        yield
    finally:
        put_back(kept)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run under generators seeded with `seed`, then put the user's own streams back."""
    with set_aside():
        seed_all(seed)
        yield


@contextmanager
def set_aside_on_host() -> Iterator[None]:
    """Keep the user's streams unchanged but those of a device, by what draws on the host alone (a data set's items)."""
    kept = host_streams()
    try:
        yield
    finally:
        put_back(kept)


def seed_host(seed: int) -> None:
    """Seed torch on the host, numpy and random."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_all(seed: int) -> None:
    """Seed torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def save_streams(kept: Streams | None = None) -> torch.Tensor:
    """Pack the user's streams (None: as they are now) into a uint8 tensor (of JSON), which a rank's share can hold."""
    cpu, cuda, numpy_state, python_state = kept or streams()
    kind, keys, position, has_gauss, gauss = numpy_state
    document = {
        "torch": base64.b64encode(cpu.numpy().tobytes()).decode(),
        "cuda": base64.b64encode(cuda.numpy().tobytes()).decode() if cuda is not None else None,
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [python_state[0], list(python_state[1]), python_state[2]],
    }
    return torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8).clone()


def load_streams(saved: torch.Tensor) -> None:
    """Restore the streams that `save_streams` packed."""
    document = json.loads(bytes(saved.numpy()))

    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()

    torch.set_rng_state(tensor(document["torch"]))
    if document["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(document["cuda"]))
    kind, keys, position, has_gauss, gauss = document["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = document["python"]
    random.setstate((version, tuple(internal), gauss_next))


def pack(parts: list[torch.Tensor | None]) -> torch.Tensor:
    """Pack several uint8 tensors into one; None is a part that is not there."""
    texts = [None if part is None else base64.b64encode(part.numpy().tobytes()).decode() for part in parts]
    return torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8).clone()


def unpack(packed: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the parts that `pack` was given."""
    texts = json.loads(bytes(packed.numpy()))
    return [
        None if text is None else torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()
        for text in texts
    ]
