"""Rules about mounts: they must work, and checkpoints must outlive the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from skyspot.errors import shown
from skyspot.lint.rules import Finding, Level
from skyspot.task.document import Task
from skyspot.task.ladder import OWN_MACHINES
from skyspot.task.mounts import WORKDIR, Mount, clean_path, innermost, within
from skyspot.task.shell import Command, Word

# A bucket with a prefix. IBM's URLs begin with a region; a Hugging Face path may be mounted.
_PREFIX = re.compile(r"((?:s3|gs|r2|oci|nebius|cw|vastdata)://[^/]+|cos://[^/]+/[^/]+)/+[^/].*")
_AZURE_PREFIX = re.compile(r"(https://[a-z0-9]{3,24}\.blob\.core\.windows\.net/[^/]+)/+[^/].*")
_URL = re.compile(r"[a-z0-9]+://", re.IGNORECASE)
# `--checkpoint-dir`, `--output_dir`, `trainer.save_path=`; not options that name a folder to load from.
_SAVED = re.compile(
    r"(?:^|[._])(?:checkpoint|ckpt|save|output|out|default_root|result)s?_?(?:dir|directory|folder|path|root)$"
)
_SAVED_ENV = re.compile(r"(?:^|_)(?:checkpoint|ckpt)s?_(?:dir|directory|folder|path|root)$")
_LOADED = re.compile(r"(?:^|[._])(?:load|init|pretrain(?:ed)?|resume|from|base|teacher|ref)_")
_NAMED_CHECKPOINTS = re.compile(r"(?:checkpoint|ckpt)s?", re.IGNORECASE)
_NAMED_DATA = re.compile(r"data|dataset|corpus|input|image|model|weight|cache|code", re.IGNORECASE)
# Programs whose files are not training results.
_FETCHES = ("aws", "curl", "gcloud", "git", "gsutil", "hf", "huggingface-cli", "pip", "tar", "unzip", "wget")
# Programs that copy or mount between the machine and storage that outlives it.
_MOUNTS_OR_COPIES = (
    "aws", "azcopy", "blobfuse2", "cp", "gcloud", "gcsfuse", "goofys", "gsutil", "hf", "huggingface-cli", "juicefs",
    "ln", "mount", "mount-s3", "rclone", "rsync", "s3fs", "s5cmd", "scp", "sshfs",
)  # fmt: skip
_REMOTE = re.compile(r"(?:s3|gs|r2|oci|cos|az|abfss?|hf|hdfs)://|push[_-]to[_-]hub", re.IGNORECASE)
_TRAINS = re.compile(r"python[\d.]*|torchrun|accelerate|deepspeed|composer|axolotl|llamafactory-cli|uv|mpirun|srun")
# On a rented machine. On one's own machines, /home may be a file server.
_LOCAL = ("/root", "/home", "/tmp", "/var/tmp", "/dev/shm")
# Usual mount points of file servers.
_SHARED = re.compile(
    r"/(?:mnt|media|net|srv|efs|fsx|nfs|lustre|gpfs|beegfs|ceph|weka|shared?|scratch|projects?|workspace|fs|volumes?)\b"
)
_HOME_OF_A_USER = re.compile(r"^(?:/root|/home/[^/]+)(?=/|$)")


@dataclass(frozen=True)
class _Saved:
    """A folder or URL that the task names for its checkpoints."""

    path: str
    line: int


def findings(task: Task) -> Iterator[Finding]:
    """Find problems with a task's mounts and checkpoints."""
    for mount in task.mounts:
        yield from _refused(mount)
    saved = _saved(task)
    lasting = [folder for folder in saved if _lasts(task, folder.path)]
    without = list(_no_mount(task)) if all(_unmounted(task, folder.path) for folder in saved) else []
    yield from without
    for folder in saved if not without else ():
        # If one folder lasts, another may hold prepared data or logs, which need not last.
        yield from _checkpoints(task, folder, "error" if task.preemptible and not lasting else "warning")
    if not saved:
        yield from _by_name(task)


def _refused(mount: Mount) -> Iterator[Finding]:
    """Find mounts that pass SkyPilot's validation but fail on its server in Storage.construct()."""
    prefix, azure = _PREFIX.fullmatch(mount.source), _AZURE_PREFIX.fullmatch(mount.source)
    if mount.lasts and prefix:
        # sky/data/storage.py, _validate_source: StorageModeError, "MOUNT mode does not support ...", from construct().
        yield Finding(
            mount.line,
            "error",
            "prefix-under-mount",
            f"{shown(mount.source)} has a prefix, which SkyPilot's server refuses with mode: {mount.mode}",
            f"Mount {shown(prefix[1])} and use its folder {_deeper(mount, prefix[1])}",
        )
    elif mount.lasts and azure:
        # The same function lets https:// pass, and split_az_path()'s third part, the prefix, is thrown away.
        yield Finding(
            mount.line,
            "warning",
            "azure-prefix-dropped",
            f"{shown(mount.source)} has a prefix, which SkyPilot drops: {shown(mount.path)} shows the whole container",
            f"Mount {shown(azure[1])} and use its folder {_deeper(mount, azure[1])}",
        )
    why = _why_refused(mount) if mount.lasts else None
    if why:
        yield Finding(mount.line, "error", "mount-refused", f"SkyPilot's server refuses this mount: {why[0]}", why[1])


def _deeper(mount: Mount, root: str) -> str:
    return shown(f"{mount.path}/{mount.source[len(root) :].strip('/')}")


def _why_refused(mount: Mount) -> tuple[str, str] | None:
    """Give reason and remedy, following Storage._validate_storage_spec() in sky/data/storage.py."""
    remote = bool(_URL.match(mount.source))
    if remote and mount.name:
        return "the bucket's URL already contains its name", "Remove `name`"
    if _URL.match(mount.name):
        return f"{shown(mount.name)} is a URL, not a name", "Use it as `source`"
    if mount.source and not remote and not mount.name:
        return (
            "a local folder needs a bucket name to be uploaded to",
            "Add a `name`, or write TARGET: FOLDER to copy it",
        )
    return None


def _saved(task: Task) -> list[_Saved]:
    """List the folders that checkpoints go to, each once; paths that only a running shell knows are left out."""
    found = [(entry.text, entry.line, WORKDIR) for key, entry in task.env_entries.items() if _is_saved_env(key)]
    folder = WORKDIR
    for command in task.run.commands:
        if command.words[0].text == "cd" and len(command.words) > 1 and command.depth == 0:
            folder = clean_path(command.words[1].text, folder)
        if command.program not in _FETCHES:
            found += [(word.text, task.run.line(word), folder) for word in _arguments(command)]
    places: dict[str, _Saved] = {}
    for path, line, start in found:
        place = path if _URL.match(path) else clean_path(path, start)
        if path and "$" not in place and "`" not in place:
            places.setdefault(place, _Saved(place, line))
    return list(places.values())


def _is_saved_env(key: str) -> bool:
    return bool(_SAVED_ENV.search(key.lower())) and not _LOADED.search(key.lower())


def _arguments(command: Command) -> Iterator[Word]:
    """List the folders that a command's arguments name for saving."""
    for word, following in zip(command.words, (*command.words[1:], None), strict=True):
        name, equals, value = word.text.partition("=")
        key = name.lstrip("-").lower().replace("-", "_")
        if not _SAVED.search(key) or _LOADED.search(key):
            continue
        if equals:
            yield Word(value, word.line)
        elif following and name.startswith("-") and not following.text.startswith("-"):
            yield following


def _mount_of(task: Task, path: str) -> Mount | None:
    """Find the innermost mount that contains a path."""
    spellings = (path, _HOME_OF_A_USER.sub("~", path))
    around = [mount for spelling in spellings if (mount := innermost(task.mounts, spelling))]
    return max(around, key=lambda mount: len(mount.path), default=None)


def _lasts(task: Task, path: str) -> bool:
    mount = _mount_of(task, path)
    if mount:
        return mount.lasts and not mount.read_only
    return bool(_URL.match(path)) or any(within(path, place) for place in task.volumes)


def _checkpoints(task: Task, saved: _Saved, level: Level) -> Iterator[Finding]:
    mount = _mount_of(task, saved.path)
    if mount:
        yield from _on_mount(mount, level)
        return
    if _lasts(task, saved.path):
        return
    handled = _handled(task, saved.path)
    if _on_disk(task, saved.path):
        where = "in the working folder" if within(saved.path, WORKDIR) else "on the machine's own disk"
        yield Finding(
            saved.line,
            "warning" if handled else level,
            "checkpoint-on-machine",
            f"{shown(saved.path)} is {where}, which is deleted with the machine: "
            + ("files not copied by then are lost" if handled else "every checkpoint in it is lost"),
            "Mount a bucket in file_mounts with mode: MOUNT, and save there",
        )
    elif not handled and not (_looks_for_itself(task) and _shared(task, saved.path)):
        yield Finding(
            saved.line,
            "warning" if _looks_for_itself(task) or _shared(task, saved.path) else level,
            "checkpoint-outside-mounts",
            f"nothing in file_mounts or volumes is mounted at {shown(saved.path)}: "
            "unless every node has a shared file system there, checkpoints are lost with the machine",
            "Mount a bucket there with mode: MOUNT",
        )


def _on_disk(task: Task, path: str) -> bool:
    """True if a path without a mount is on the machine's own disk."""
    # So is HOME on Slurm, a folder of the job's own (sky/provision/slurm/instance.py).
    return any(within(path, place) for place in ("~", *(_LOCAL if _rented(task) else ())))


def _rented(task: Task) -> bool:
    return any(rung.cloud not in OWN_MACHINES for rung in task.rungs)


def _shared(task: Task, path: str) -> bool:
    """True if a path is likely a shared file system that every node has."""
    return not _rented(task) or bool(_SHARED.match(path))


def _looks_for_itself(task: Task) -> bool:
    """True if our trainer itself refuses a missing folder, as with `--bucket PATH`, which mounts nothing."""
    return task.trainer is not None and "SKYSPOT_MOUNT" not in task.envs


def _unmounted(task: Task, path: str) -> bool:
    """True if a path is outside all mounts and so seems to be on the root disk."""
    mounted = _mount_of(task, path) is not None or _lasts(task, path)
    return not (mounted or _on_disk(task, path) or _shared(task, path) or _handled(task, path))


def _handled(task: Task, path: str) -> bool:
    return any(_handles(command, path) for script in (task.setup, task.run) for command in script.commands)


def _handles(command: Command, path: str) -> bool:
    """True if a command mounts, links or copies a path."""
    named = [clean_path(word.text) for word in command.words[1:] if not word.text.startswith("-")]
    return command.program in _MOUNTS_OR_COPIES and any(
        within(path, name) or within(name, path) for name in named if name not in ("/", "~")
    )


def _on_mount(mount: Mount, level: Level) -> Iterator[Finding]:
    if mount.read_only and mount.lasts:
        yield Finding(
            mount.line,
            level,
            "checkpoint-on-read-only-mount",
            f"checkpoints go to {shown(mount.path)}, which is mounted read-only: the first save will fail",
            "Remove `read_only`, or save to another mount",
        )
    elif mount.mode == "MOUNT_CACHED":
        # rclone uploads several files at once, unordered, seconds after close(): sky/data/mounting_utils.py.
        yield Finding(
            mount.mode_line,
            "warning",
            "checkpoint-on-cached-mount",
            f"checkpoints go to {shown(mount.path)} on MOUNT_CACHED, which uploads in the background: files that are "
            "not uploaded when the machine is taken are lost, and a checkpoint's last files may be uploaded before "
            "its first",
            "Use mode: MOUNT, where a file is in the bucket once it is closed",
        )
    elif not mount.lasts:
        yield Finding(
            mount.mode_line,
            level,
            "checkpoint-on-copy",
            f"checkpoints go to {shown(mount.path)}, a copy: files written there are never uploaded and are lost "
            "with the machine",
            f"Use {{source: {shown(mount.source)}, mode: MOUNT}} instead"
            if _URL.match(mount.source)
            else "Mount a bucket there: {name: BUCKET, mode: MOUNT}",
        )


def _by_name(task: Task) -> Iterator[Finding]:
    """Check the mounts with `checkpoint` in their path, if nothing else says where checkpoints go."""
    for mount in task.mounts:
        if _NAMED_CHECKPOINTS.search(mount.path) and not mount.read_only:
            yield from _on_mount(mount, "error" if task.preemptible else "warning")


def _no_mount(task: Task) -> Iterator[Finding]:
    """Find spot instances without storage that outlives them."""
    spot = next((rung.settings["use_spot"] for rung in task.rungs if rung.use_spot), None)
    kept = [mount for mount in task.mounts if mount.lasts and not mount.read_only]
    copied = [mount for mount in task.mounts if not mount.lasts and _NAMED_CHECKPOINTS.search(mount.path)]
    if spot is None or not task.run.commands or task.volumes or copied:
        return
    data = [mount for mount in kept if _NAMED_DATA.search(mount.path)]
    if len(kept) > len(data):
        return
    texts = [word.text for command in task.run.commands for word in command.words] + list(task.envs.values())
    elsewhere = any(_REMOTE.search(text) for text in texts)
    trains = any(_TRAINS.fullmatch(command.program) for command in task.run.commands)
    yield Finding(
        spot.line,
        "error" if trains and not elsewhere and not data and not _looks_for_itself(task) else "warning",
        "no-checkpoint-mount",
        "use_spot requests machines that can be preempted, but no bucket is mounted for checkpoints: "
        "training starts over after each preemption",
        "Add file_mounts: {/checkpoints: {name: BUCKET, mode: MOUNT}}, save there, and load the newest on startup",
    )
