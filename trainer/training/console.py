"""print_line: prints a line, above the progress bar if there is one."""

from __future__ import annotations

import sys
from typing import Any

bar: Any = None
"""The tqdm bar of this process, while it is shown."""


def print_line(text: str) -> None:
    """Print a line, above the bar if there is one."""
    if bar is not None:
        bar.write(text, file=sys.stdout)
    else:
        print(text, flush=True)
