"""Damage: what shows that a file of a checkpoint is not as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.layout.documents import LayoutError, says_not_there


class DamagedError(Exception):
    """A checkpoint is not whole; the message names the file and what is wrong with it."""


@contextmanager
def as_damage(name: str) -> Iterator[None]:
    """Raise DamagedError for what shows that a file is not as it was written; let errors of the bucket pass."""
    try:
        yield
    except OSError as error:
        if not says_not_there(error):
            raise
        raise DamagedError(f"{name}: {error.strerror}") from None
    except DamagedError as error:
        raise DamagedError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except (LayoutError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise DamagedError(f"{name}: {str(error)[:200]}") from None
