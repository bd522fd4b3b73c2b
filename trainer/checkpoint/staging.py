"""Staging: this rank's share of the state is copied to host memory while training goes on.

Tensors that change before the optimizer's next step are copied at once. Parameters and optimizer state, by far the
largest part, are copied in the background; training waits for them just before the optimizer steps. The memory is
allocated once and reused. If there is not enough, the share is written from the live tensors, and training waits.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.shards import Part, ShardError, local
from trainer.checkpoint.writing import bytes_of, in_order, paged_memory

RESERVE_BYTES = 256 << 20
"""Memory left for everything else."""
POPULATED_BYTES = 4 << 20
"""Bytes populated in one call; during the call no other thread can allocate memory."""
_MADV_POPULATE_WRITE = 23
try:
    _madvise: Any = ctypes.CDLL(None, use_errno=True).madvise
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
except (OSError, AttributeError):
    _madvise = None


class Copy:
    """A rank's share at a boundary."""

    def __init__(
        self,
        parts: Sequence[Part],
        live: Mapping[str, torch.Tensor],
        steady: Collection[str],
        buffers: Mapping[str, torch.Tensor],
        memory: memoryview,
    ) -> None:
        """Copy the tensors that cannot wait.

        Args:
            parts: The share.
            live: The tensors of the run.
            steady: Names of the tensors that nothing changes before the optimizer's next step.
            buffers: Host memory by tensor; empty if the share is to be written from the live tensors.
            memory: All of that memory, in the order of the parts.
        """
        self.parts = in_order(parts)
        self.torn: str | None = None
        """A tensor that was changed while it was copied, so that the copy mixes two states; None if none was."""
        self._live = {part.name: local(live[part.name]) for part in self.parts}
        for part in self.parts:
            held = tuple(self._live[part.name].shape)
            if held != part.sizes:
                raise ShardError(f"{part.name}: this rank holds {held} of it, but its layout says {part.sizes}")
        self._buffers = buffers
        self.memory = memory
        """The memory in which the parts lie side by side, in order; empty if they are not staged."""
        # For a DTensor watch the whole: the version of its local part never grows.
        self._watched = {part.name: live[part.name] for part in self.parts}
        self._versions = {name: version(tensor) for name, tensor in self._watched.items()}
        for name in [name for name in self._live if buffers and name not in steady]:
            if self._live[name].device.type == "cpu":
                _copy(self._live.pop(name), buffers[name])
            else:  # On the device, in the order of the computation; nothing waits for it.
                self._live[name] = self._watched[name] = self._live[name].clone()
                self._versions[name] = version(self._live[name])
        self._streams = _behind_the_computation(self._live.values()) if buffers else []
        self.copied = threading.Event()
        """Set once all of it is in host memory, or the copy failed."""

    def run(self) -> None:
        """Copy the rest; called on another thread than training's."""
        try:
            if self._buffers:
                with ExitStack() as used:
                    for stream in self._streams:
                        used.enter_context(torch.cuda.stream(stream))
                    for name, tensor in self._live.items():
                        _copy(tensor, self._buffers[name])
                        if not self._streams and self._changed(name):
                            self.torn = name
                for stream in self._streams:
                    stream.synchronize()
                if self._streams:
                    self.torn = next((name for name in self._live if self._changed(name)), None)
                self._live, self._watched = {}, {}
        finally:
            self.copied.set()

    def _changed(self, name: str) -> bool:
        return version(self._watched[name]) != self._versions[name]

    def here(self, part: Part) -> torch.Tensor:
        """A part's contents without copying: from the copy, or from the live tensor if there is no copy."""
        return self._buffers[part.name] if self._buffers else self._live[part.name]

    def fetch(self, part: Part) -> torch.Tensor:
        """A part's contents, on the host and contiguous."""
        if self._buffers:
            return self._buffers[part.name]
        return self._live[part.name].to("cpu").contiguous()


class Staging:
    """The host memory that shares are copied to."""

    def __init__(self) -> None:
        self._whole, self._pinned = torch.empty(0, dtype=torch.uint8), False
        self._buffers: dict[str, torch.Tensor] = {}

    def holds(self, parts: Sequence[Part]) -> bool:
        """True if the memory has exactly the form of a share."""
        return self._buffers.keys() == {part.name for part in parts} and all(
            self._buffers[part.name].shape == part.sizes and self._buffers[part.name].dtype == part.dtype
            for part in parts
        )

    def has_room(self, needed: int) -> bool:
        """Give this rank's memory back; whether the machine then has `needed` bytes to spare."""
        self.drop()
        return needed + RESERVE_BYTES <= available_bytes()

    def allocate(self, parts: Sequence[Part]) -> bool:
        """Allocate memory for a share; returns whether that succeeded.

        With a GPU the memory is pinned, so that copies run beside the computation.
        """
        self.drop()
        self._pinned = pinned = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        try:
            self._whole, self._buffers = _side_by_side(in_order(parts), pinned)
        # A limit that cannot be seen beforehand (RLIMIT_AS, no overcommitting).
        except (RuntimeError, MemoryError, OSError):
            self.drop()
            return False
        return True

    def populate(self) -> None:
        """Have the system map the memory now, in small pieces, beside training; its contents stay as they are."""
        whole = self._whole
        if _madvise is None or self._pinned:
            return
        for at in range(0, whole.numel(), POPULATED_BYTES):
            count = min(POPULATED_BYTES, whole.numel() - at)
            if whole is not self._whole or _madvise(whole.data_ptr() + at, count, _MADV_POPULATE_WRITE):
                return  # It was given back; or the system cannot do it, and the first copy takes longer.

    def drop(self) -> None:
        """Give the memory back."""
        self._whole, self._buffers = torch.empty(0, dtype=torch.uint8), {}

    def begin(self, parts: Sequence[Part], live: Mapping[str, torch.Tensor], steady: Collection[str]) -> Copy:
        """Begin a copy into this memory; without memory the copy refers to the live tensors."""
        return Copy(parts, live, steady, self._buffers, self._whole.numpy().data)


def _side_by_side(parts: Sequence[Part], pinned: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Memory for parts in the order of a share, from the start of a page: (all of it, by tensor)."""
    count = sum(part.bytes for part in parts)
    if pinned:
        whole = torch.empty(max(1, count), dtype=torch.uint8, pin_memory=True)
    else:
        whole = torch.frombuffer(paged_memory(max(1, count)), dtype=torch.uint8)
    buffers, at = {}, 0
    for part in parts:
        buffers[part.name] = whole[at : at + part.bytes].view(part.dtype).view(part.sizes)
        at += part.bytes
    return whole[:count], buffers


def available_bytes() -> int:
    """Memory that this process can still allocate: the machine's, within the container's limits (cgroup 1 and 2)."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found += _left_in(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                top = Path("/sys/fs/cgroup/memory")
                found += _left_in(top, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    return max(0, min(found, default=1 << 62))


def _left_in(top: Path, path: str, limit: str, used: str, prefix: str) -> list[int]:
    """The memory left in a group and in those above it; cached pages of files count as free."""
    found, folder = [], top / path.lstrip("/")
    for group in [folder, *folder.parents]:
        with suppress(OSError, ValueError):
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            found.append(int((group / limit).read_text()) - int((group / used).read_text()) + files)
        if group == top:
            break
    return found


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.device.type == "cpu" and source.is_contiguous() and source.numel():
        # torch would use as many threads as training computes on.
        np.copyto(bytes_of(target), bytes_of(source))
    else:
        target.copy_(source, non_blocking=True)


def version(tensor: torch.Tensor) -> int:
    """A tensor's version, which grows with each change in place; 0 if it has none."""
    with suppress(RuntimeError):  # Tensors of inference mode have none.
        return tensor._version
    return 0


def _behind_the_computation(tensors: Iterable[torch.Tensor]) -> list[Any]:
    """A new stream for each GPU that has some of the tensors; it waits for all work queued there so far."""
    streams = []
    for gpu in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:  # Perhaps not the current one.
        stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(gpu))
        streams.append(stream)
    return streams
