"""Restoring: loads the newest whole checkpoint into a session's contents, and records it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from trainer.attempt.history import RECORDS_S
from trainer.attempt.record import Attempt, record
from trainer.bucket.retry import retry
from trainer.checkpoint import extras
from trainer.checkpoint.reading import Memory, fresh
from trainer.checkpoint.restore import NOT_FINITE, Found, Loaded, find_whole
from trainer.checkpoint.state import RANDOM
from trainer.layout.events import event_named, read_events, read_metrics
from trainer.layout.names import list_attempts, list_metrics
from trainer.training import changes
from trainer.training.contents import Contents, Restored
from trainer.training.host import Host


def load_newest(host: Host, contents: Contents, memory: Memory = fresh) -> Found:
    """Load the newest whole checkpoint into the contents, if there is one."""
    live, only_finite = contents.collect(), contents.only_finite
    found = find_whole(host.group, host.paths, live, host.check_stop, host.run_id, only_finite, memory)
    if found.loaded:
        _load(host, contents, found.loaded)
    return found


def _load(host: Host, contents: Contents, loaded: Loaded) -> None:
    facts, group = loaded.manifest.facts, host.group
    ranks_then = facts.get("world_size")
    tensors, plain, of_first_rank = extras.joined(
        loaded.tensors, loaded.plain, group.rank, group.world_size, ranks_then
    )
    same = ranks_then == group.world_size
    streams = loaded.tensors.get(f"{RANDOM}{group.rank}") if same else None
    contents.load(Restored(loaded.name, loaded.manifest, tensors, plain, streams, same))
    if of_first_rank:
        host.print_line(
            f"{' and '.join(of_first_rank)}: each process saved its own values, and the number of processes has "
            "changed; all processes now use those of rank 0"
        )
    if host.journal:
        host.journal.history = list(facts.get("metrics", []))


def report(host: Host, contents: Contents, found: Found, changed: dict[str, list[Any]], seconds: float) -> None:
    """Rank 0: record and print what was restored.

    Args:
        host: This process.
        contents: As they were restored.
        found: The result of the search.
        changed: The facts that have changed since the checkpoint.
        seconds: The time that the restore took.
    """
    attempt, name = host.attempt, found.loaded.name if found.loaded else None
    assert attempt
    done = retry(host.paths, lambda: last_step_done(attempt), host.check_stop, begun=True, limit_s=RECORDS_S)
    lost = max(0, done - contents.done)
    fields = {
        "step": contents.done,
        "samples": contents.samples_done,
        "checkpoint": str(name) if name else None,
        "from_attempt": str(name.attempt) if name else None,
        "lost_steps": lost,
        "seconds": round(seconds, 4),
        "rejected": found.rejected,
        "changed": changed,
    }
    retry(host.paths, lambda: record(attempt, "restored", **fields), host.check_stop, begun=True)
    for checkpoint in found.rejected:
        skipped = checkpoint["reason"].startswith(NOT_FINITE)
        problem = "is skipped" if skipped else "is not whole"
        remedy = "; --on-nan ignore would use it" if skipped and contents.spoilt_remedy else ""
        host.print_line(
            f"Checkpoint {checkpoint['checkpoint']} {problem}: {checkpoint['reason']}. Using an older one{remedy}"
        )
    if name:
        host.print_line(
            f"resumed at step {contents.done} from checkpoint {name} of attempt {name.attempt}: "
            f"{contents.position}, {lost} lost steps, {seconds:.1f} s"
        )
        if changed:
            host.print_line(changes.sentence(contents.done, changed))
    elif lost or found.rejected:
        host.print_line(f"starting from step 0: no whole checkpoint yet, {lost} lost steps")


def last_step_done(attempt: Attempt) -> int:
    """The last step that an earlier attempt is known to have done; 0 where none did any.

    It looks at the newest attempt that restored a state, and at those after it, which ended before they restored one.
    """
    paths, steps = attempt.paths, [0]
    for name in reversed([name for name in list_attempts(paths) if name < attempt.name]):
        events = read_events(paths, name, ("restored", "end"))
        ended = event_named(events, "end")
        if ended and isinstance(ended.get("step"), int):
            steps.append(ended["step"])
        for _, path in list_metrics(paths, name)[-1:]:
            with suppress(OSError):
                steps += [line["step"] for line in read_metrics(path.read_bytes())]
        if event_named(events, "restored"):
            break
    return max(steps)
