"""What each way to train promises: the line that a rehearsal prints beside its verdict."""

from __future__ import annotations

from skyspot.rehearsal.verdict import History

LEVELS = {
    "steps": "run.register and run.steps: bit-identical on the same number of processes, unless loader workers draw "
    "random numbers; another number of processes gets other samples",
    "sampler": "run.register, run.steps and run.sampler: bit-identical on the same number of processes; the same "
    "samples on any number",
    "transformers": "Hugging Face Trainer with SpotCallback: bit-identical on the same number of processes, unless "
    "loader workers draw random numbers; with exact=True, the same samples on any number",
    "lightning": "Lightning with SpotCallback: bit-identical on the same number of processes, unless loader workers "
    "draw random numbers or a metric has on_epoch=True; another number of processes gets other samples",
}
"""By whose loop it is, as the event `registered` says; docs/your-own-script.md has the whole table."""


def promised(history: History) -> str | None:
    """What the run's way to train promises; None for the bundled trainer, whose verdicts say it."""
    if history.loop is None:
        return None
    has_order = all("order" in line for line in history.lines.values())
    text = LEVELS.get("sampler" if has_order and history.loop.loop == "steps" else history.loop.loop)
    return f"promised: {text}" if text else None
