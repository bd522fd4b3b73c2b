"""Builds once what several pytest workers need."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

not_counted: Callable[[], AbstractContextManager[None]] = nullcontext
"""Excludes time from the limit of a single test; see budget.py."""


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that all workers of this run share: the first to ask builds it, the others wait, and none may change it.

    Args:
        factory: Provides the run's temporary folder.
        name: Identifies the folder within this run.
        build: Fills the folder, which exists and is empty.
    """
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / f"shared-{name}"
    with not_counted(), folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = folder.with_suffix(".whole")
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            whole.touch()
    return folder
