"""print_line: a line of output, above the progress bar where there is one."""

from __future__ import annotations

import sys
from typing import Any

bar: Any = None
"""tqdm's bar of this process, while it is shown."""


def print_line(text: str) -> None:
    """Print a line, above the bar where there is one."""
    if bar is not None:
        bar.write(text, file=sys.stdout)
    else:
        print(text, flush=True)
