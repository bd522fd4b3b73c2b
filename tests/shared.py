"""What several pytest workers need is built by one of them."""

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
"""Around what no single test has to answer for; see budget.py."""


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that all workers of this run share. The first to ask builds it, and the others wait; none may change it.

    Args:
        factory: Knows the run's temporary folder.
        name: The folder's, within this run.
        build: Fills the folder, which is there and empty.
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
