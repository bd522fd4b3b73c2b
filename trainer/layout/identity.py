"""The identity of a run in the layout: the id that its folder's files agree on, and its newest committed checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from trainer.layout.documents import LayoutError, LayoutVersionError, check_seal, read_json
from trainer.layout.manifest import Manifest, read_manifest, sizes_agree
from trainer.layout.names import FINAL, STATE, CheckpointName, RunPaths, list_checkpoints


def newest_committed(
    paths: RunPaths,
    run_id: str | None = None,
    pass_over: Callable[[OSError], bool] = lambda error: False,
    only_finite: bool = False,
) -> tuple[CheckpointName, Manifest] | None:
    """The newest checkpoint whose files have the sizes in its manifest; None if there is none.

    Args:
        paths: The run's paths.
        run_id: Skip checkpoints of other runs; None: take all.
        pass_over: Decides whether a checkpoint that fails with this error is skipped, if an older one can be read.
        only_finite: Skip checkpoints whose weights are not finite.

    Raises:
        LayoutVersionError: a newer release wrote a checkpoint.
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
    """(the run's id in run.json, whether run.json is torn).

    Raises:
        OSError: run.json cannot be read.
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
    """The id of a folder's run: run.json's if a checkpoint agrees or there is none, else that of most checkpoints.

    Args:
        known: The id in run.json.
        found: The folder's checkpoints, newest first; read only as far as needed.
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
    """True if a checkpoint's manifest belongs to its folder, and was not copied there with another folder's files."""
    step, attempt = manifest.step, manifest.facts.get("attempt", str(name.attempt))
    return (manifest.kind, step, attempt) == ("checkpoint", name.step, str(name.attempt))


def missing_facts(name: str, manifest: Manifest) -> str | None:
    """The first fact that the manifest of a checkpoint or of `final/` must have and lacks, as a sentence; else None."""
    parsed = CheckpointName.parse(name)
    if parsed and not belongs(manifest, parsed):
        return "its manifest is another checkpoint's"
    if name != FINAL and STATE not in manifest.files:
        return f"its manifest lists no {STATE}"
    return None if manifest.files else "its manifest lists no file"


def is_of(manifest: Manifest, run_id: str | None) -> bool:
    """True if a checkpoint belongs to this run, or if either id is unknown."""
    return run_id is None or manifest.facts.get("run_id") in (None, run_id)
