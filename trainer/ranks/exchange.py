"""An all-reduce in which every rank tells all others one row of integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from trainer.ranks.peers import collective


class Exchange:
    """One all-reduce under way: each rank's integers, each in its own row, seen by all."""

    def __init__(self, rows: torch.Tensor, work: dist.Work | None) -> None:
        self._rows = rows
        self._work = work

    @classmethod
    def start(cls, row: Sequence[int], rank: int, world_size: int, control: dist.ProcessGroup | None) -> Exchange:
        """Send this rank's integers (64 bit). Every rank calls it in the same order.

        Args:
            row: This rank's integers; all ranks send the same number of them.
            rank: This rank.
            world_size: The number of ranks.
            control: The gloo group of all ranks; None for a single rank.
        """
        rows = torch.zeros(world_size, len(row), dtype=torch.int64)
        rows[rank] = torch.tensor(row, dtype=torch.int64)
        if control is None:
            return cls(rows, None)
        with collective():
            return cls(rows, dist.all_reduce(rows, group=control, async_op=True))

    def wait(self) -> list[list[int]]:
        """Return the rows of all ranks, by rank.

        Raises:
            PeerGoneError: the all-reduce failed.
        """
        if self._work is not None:
            with collective():
                self._work.wait()
        rows: list[list[int]] = self._rows.tolist()
        return rows
