"""Progress, and Rereading of consumed batches: show a bar on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from trainer.training import console

PLAIN_LINE_S = 2.0
REREADING_S = 5.0
"""Reading again what was consumed is shown after so many seconds, and without a terminal each time they have passed."""


class Progress:
    """Shows the progress of the run; updated once a step, on rank 0."""

    def __init__(self, max_steps: int, done: int) -> None:
        """Begin after `done` steps of `max_steps` (0: unknown)."""
        self._max_steps = max_steps
        self._started, self._first = time.monotonic(), done
        self._tokens = 0.0
        self._line_at = 0.0
        self._bar = _bar(max_steps or None, "step {n_fmt}/{total_fmt} |{bar}| {postfix}", initial=done, leave=True)
        if self._bar is not None:
            console.bar = self._bar

    def rates(self, done: int, tokens: float) -> tuple[float, float]:
        """(tokens a second, seconds left), over this attempt."""
        self._tokens += tokens
        elapsed = max(1e-9, time.monotonic() - self._started)
        steps = max(1, done - self._first)
        return self._tokens / elapsed, (self._max_steps - done) * elapsed / steps

    def step(self, done: int, figures: str, eta_s: float, committed_step: int | None) -> None:
        """Show a step that was just done; `figures` are its loss, learning rate and so on."""
        saved = "-" if committed_step is None else str(committed_step)
        text = f"{figures}  {_clock(eta_s)} left  saved {saved}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._line_at >= PLAIN_LINE_S or done == self._max_steps:
            self._line_at = now
            print(f"step {done}{f'/{self._max_steps}' if self._max_steps else ''}  {text}", flush=True)

    def close(self) -> None:
        """Leave the bar on the screen, and go to the next line."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = console.bar = None


class Rereading:
    """Shows how many consumed batches are read again."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        """Begin with none.

        Args:
            print_line: Prints a line, on rank 0.
        """
        self._print_line, self._line_at, self._has_hint = print_line, time.monotonic(), False
        self._bar: Any = None

    def step(self, epoch: int, done: int, count: int) -> None:
        """Show that a batch was read again, `done` of `count`."""
        if self._bar is None:
            self._bar = _bar(count, "reading again {n_fmt}/{total_fmt} |{bar}|", delay=REREADING_S, leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == count:
                self._bar.close()
        now = time.monotonic()
        if now - self._line_at >= REREADING_S and (self._bar is None or not self._has_hint):
            self._line_at, self._has_hint = now, True
            self._print_line(
                f"reading the consumed batches of epoch {epoch} again: {done} of {count}. A map-style data set, or a "
                "loader with state_dict that is registered, needs no second reading"
            )


def _bar(total: int | None, bar_format: str, **options: Any) -> Any:
    """A bar, if this process is on a terminal."""
    if os.environ.get("SKYSPOT_TTY") != "1":
        return None
    columns = int(os.environ.get("COLUMNS") or 100)
    return tqdm(total=total, file=sys.stdout, ncols=columns, bar_format=bar_format, **options)


def figures(loss: float | None, lr: float | None, tokens_per_s: float | None = None) -> str:
    """The figures of a step, as they are shown; a loss of None is not finite."""
    shown = [f"loss {'nan' if loss is None else f'{loss:.4f}'}"]
    shown += [f"lr {lr:.2e}"] if lr is not None else []
    shown += [f"{_count(tokens_per_s)} tok/s"] if tokens_per_s is not None else []
    return "  ".join(shown)


def _count(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
