"""Which run a folder and its checkpoints belong to, and the newest of them that is committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from trainer.layout.documents import LayoutError, LayoutVersionError, check_seal, read_json
from trainer.layout.manifest import Manifest, read_manifest, sizes_agree
from trainer.layout.names import CheckpointName, RunPaths, list_checkpoints


def newest_committed(
    paths: RunPaths,
    run_id: str | None = None,
    pass_over: Callable[[OSError], bool] = lambda error: False,
    only_finite: bool = False,
) -> tuple[CheckpointName, Manifest] | None:
    """The newest checkpoint whose files have the sizes that its manifest says; None where there is none.

    Args:
        paths: The run's.
        run_id: Another run's checkpoints are passed over; None: all count.
        pass_over: Whether one that cannot be looked at for this is passed over, if another one can.
        only_finite: Those whose weights are not finite are passed over.

    Raises:
        LayoutVersionError: a newer release wrote it.
        OSError: the bucket cannot be read.
    """
    unreadable: OSError | None = None
    for name in list_checkpoints(paths):
        try:
            manifest = read_manifest(paths.checkpoint(name))
            mine = belongs(manifest, name) and is_of(manifest, run_id) and (manifest.finite or not only_finite)
            if mine and sizes_agree(paths.checkpoint(name), manifest) is None:
                return name, manifest
        except LayoutVersionError:
            raise
        except (LayoutError, FileNotFoundError):
            continue
        except OSError as error:
            if not pass_over(error):
                raise
            unreadable = unreadable or error
    if unreadable:
        raise unreadable
    return None


def known_id(paths: RunPaths) -> tuple[str | None, bool]:
    """(the run's id as run.json has it, whether that is torn).

    Raises:
        OSError: it cannot be read.
    """
    try:
        document = read_json(paths.run_json)
        check_seal(document)
        known = document.get("run_id")
        return (known, False) if isinstance(known, str) else (None, True)
    except FileNotFoundError:
        return None, False
    except LayoutError:
        return None, True


def id_among(known: str | None, found: Iterable[tuple[CheckpointName, Manifest]]) -> str | None:
    """Which run a folder is of: as run.json says, if a checkpoint agrees or there is none; else as most of them say.

    Args:
        known: What run.json says.
        found: The folder's checkpoints, newest first; asked for no more of them than it takes.
    """
    ids = Counter[str]()
    for name, manifest in found:
        its = manifest.facts.get("run_id")
        if not isinstance(its, str) or manifest.facts.get("attempt", str(name.attempt)) != str(name.attempt):
            continue
        if its == known:
            return known
        ids[its] += 1
    return ids.most_common(1)[0][0] if ids else known


def belongs(manifest: Manifest, name: CheckpointName) -> bool:
    """Whether a checkpoint's manifest is of its own folder, and not copied there with another one's files."""
    step, attempt = manifest.step, manifest.facts.get("attempt", str(name.attempt))
    return (manifest.kind, step, attempt) == ("checkpoint", name.step, str(name.attempt))


def is_of(manifest: Manifest, run_id: str | None) -> bool:
    """Whether a checkpoint is of this run, as far as both are known."""
    return run_id is None or manifest.facts.get("run_id") in (None, run_id)
