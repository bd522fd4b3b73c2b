"""LoopRecord: what the records of a run say of a loop of the user's own, or of a library's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.layout.events import read_events
from trainer.layout.names import RunPaths, list_attempts


@dataclass(frozen=True)
class LoopRecord:
    """A run whose steps are not the bundled trainer's."""

    loop: str
    """Whose loop it is, a key of `levels.LEVELS`."""
    objects: Mapping[str, str]
    """The classes of what is registered, by name."""
    unsaved: tuple[str, ...] = ()
    """Attributes that change during training and are in no state_dict."""
    scheduled: tuple[str, ...] = ()
    """Optimizers with a registered scheduler."""
    same_batches: bool = False
    """Several processes all trained on the same batch in their first step."""
    resumes: tuple[int, ...] = ()
    """The steps that attempts resumed from."""

    def resume_before(self, step: int) -> int | None:
        """The last step that an attempt resumed from and that lies before a step."""
        return max((one for one in self.resumes if one < step), default=None)


def read_loop_record(paths: RunPaths) -> LoopRecord | None:
    """Read the records of all attempts; None if no loop but the bundled trainer's wrote them."""
    found: Mapping[str, Any] | None = None
    resumes = []
    for name in list_attempts(paths):
        for event in read_events(paths, name, ("registered", "restored")):
            if event.name == "registered":
                found = event.fields
            elif isinstance(step := event.fields.get("step"), int) and step:
                resumes.append(step)  # 0: it began with nothing.
    if found is None:
        return None
    objects = found.get("objects")
    return LoopRecord(
        str(found.get("loop")),
        {str(name): str(kind) for name, kind in objects.items()} if isinstance(objects, Mapping) else {},
        _texts(found.get("unsaved")),
        _texts(found.get("scheduled")),
        bool(found.get("same_batches")),
        tuple(resumes),
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
