"""Errors that mean that another rank of the attempt is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


class PeerGoneError(Exception):
    """Another rank of this attempt is gone, or gives no sign of life."""


def is_peer_trouble(error: BaseException) -> bool:
    """True if an error's type says that a peer is gone, rather than that this rank is at fault."""
    return isinstance(error, (PeerGoneError, dist.DistError))


def may_be_peer_trouble(error: BaseException | None) -> bool:
    """True if an error may come from a collective in the user's own code, which has no error type of its own.

    In a forward or backward pass, DistributedDataParallel's collectives raise a plain RuntimeError, as user code does.
    """
    while error is not None:
        if type(error) is RuntimeError or is_peer_trouble(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def collective() -> Iterator[None]:
    """A context for a collective of our own: if it fails, a peer is gone.

    Raises:
        PeerGoneError: the collective failed.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise PeerGoneError(f"a collective failed: {error}") from error
