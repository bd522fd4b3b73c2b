"""What each way to train promises: the line that a rehearsal prints beside its verdict."""

from __future__ import annotations

from skyspot.rehearsal.verdict import History

_EXACT = (
    "bit-identical on the same number of processes, unless loader workers draw random numbers, or the items of an "
    "IterableDataset do"
)
LEVELS = {
    "steps": f"run.register and run.steps: {_EXACT}; another number of processes gets other samples",
    "sampler": "run.register, run.steps and run.sampler: bit-identical on the same number of processes; the same "
    "samples on any number",
    "transformers": f"Hugging Face Trainer with SpotCallback: {_EXACT}; with exact=True, the same samples on any "
    "number",
    "lightning": f"Lightning with SpotCallback: {_EXACT}, or a metric has on_epoch=True; another number of processes "
    "gets other samples",
}
"""By whose loop it is, as the event `registered` says, in the order of the table in docs/your-own-script.md.

The table has more exceptions than a line can have.
"""


def promised(history: History) -> str | None:
    """What the run's way to train promises; None for the bundled trainer, whose verdicts say it."""
    if history.loop is None:
        return None
    has_order = all("order" in line for line in history.lines.values())
    text = LEVELS.get("sampler" if has_order and history.loop.loop == "steps" else history.loop.loop)
    return f"promised: {text} (all exceptions: docs/your-own-script.md)" if text else None
