"""Rules about programs: what `setup` installs and `run` starts must work on a fresh machine."""

from __future__ import annotations

import itertools
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence

from skyspot.errors import shown
from skyspot.lint.resources import TOO_OLD, named_accelerators
from skyspot.lint.rules import Finding, Level
from skyspot.task.document import Task
from skyspot.task.mounts import WORKDIR, clean_path, within
from skyspot.task.shell import Command, Word

_SCRIPT = re.compile(r"(?:\$HOME/|\$\{HOME\}/)?[\w.~/-]+\.(?:py|sh|bash)")
_INTERPRETER = re.compile(r"python[\d.]*|bash|sh|zsh|source|\.")
# Launchers, which take their own options before the script.
_LAUNCHER = re.compile(r"torchrun|accelerate|deepspeed|composer|uv|mpirun|horovodrun|srun|colossalai")
_LAUNCHER_MODULES = ("torch.distributed.", "trainer.launch", "accelerate.commands.launch", "deepspeed.launcher.")
_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
# Modules that SkyPilot's own images may have.
_INSTALLED = (
    "conda",
    "deepspeed",
    "jupyter",
    "nvitop",
    "numpy",
    "pip",
    "pytest",
    "ray",
    "sky",
    "torch",
    "trainer",
    "uv",
)
# Programs that fetch or create files in places that lint cannot know.
_BRING = (
    "7z", "aws", "azcopy", "cp", "curl", "docker", "gcloud", "gdown", "gh", "git", "gsutil", "hf", "huggingface-cli",
    "hub", "install", "kaggle", "ln", "make", "mc", "mount", "mv", "rclone", "rsync", "s5cmd", "scp", "svn", "tar",
    "tee", "unzip", "wget",
)  # fmt: skip
# Programs that name a file without creating it.
_LOOK = ("[", "[[", "bash", "chmod", "dash", "echo", "eval", "ls", "printf", "sh", "stat", "test", "zsh")
_INSTALLERS = ("pip", "pip3", "uv", "conda", "mamba", "micromamba")
_TORCH = re.compile(r"(torch|pytorch|pytorch-gpu)(?:\[[^\]]*\])?((?:[<>=!~ ].*)?)", re.DOTALL)
_UPPER_BOUND = re.compile(r"==|~=|<|(?<![<>=!~])=(?!=)")
# Package indexes whose builds run on these accelerators: CUDA 11, and 12 up to 12.6.
_OLD_CUDA = re.compile(
    r"cu(?:11\d|12[0-6])\b|pytorch-cuda=(?:11|12\.[0-6])|(?:cuda|cuda-version|cudatoolkit)=+(?:11|12)"
)


def findings(task: Task) -> Iterator[Finding]:
    """Find problems with a task's programs."""
    yield from _scripts(task)
    if not task.trainer:  # The rule gpu-torch-cannot-use covers the trainer's torch.
        yield from _torch(task)


def _scripts(task: Task) -> Iterator[Finding]:
    """Find scripts that `run` starts but that nothing puts on the machine."""
    if task.root.get("workdir"):
        return
    # The image may hold them, though not where SkyPilot starts `run`.
    level: Level = "warning" if any("image_id" in rung.settings for rung in task.rungs) else "error"
    seen: set[str] = set()
    folder = WORKDIR
    before = list(task.setup.commands)
    for command in task.run.commands:
        script = _script(command) or _module(task, before, command)
        path = clean_path(_as_path(script.text), folder) if script else ""
        if script and path not in seen and not _brought(task, before, path):
            seen.add(path)
            yield Finding(
                task.run.line(script),
                level,
                "script-not-there",
                f"`run` starts {shown(script.text)}, but neither workdir nor file_mounts puts it on the machine",
                "Add workdir: FOLDER, which is copied to the machine, or clone the code in `setup`",
            )
        if command.words[0].text in ("cd", "pushd") and len(command.words) > 1:
            folder = clean_path(command.words[1].text, folder)
        before.append(command)


def _script(command: Command) -> Word | None:
    """Find the script that a command starts, if its path is plain."""
    program = command.program
    if _SCRIPT.fullmatch(program):
        return next((word for word in command.words if _SCRIPT.fullmatch(word.text) and "/" in word.text), None)
    if _LAUNCHER.fullmatch(program) or any(word.text.startswith(_LAUNCHER_MODULES) for word in command.words):
        return next((word for word in command.words[1:] if _SCRIPT.fullmatch(word.text)), None)
    if not _INTERPRETER.fullmatch(program):
        return None
    at = next(at for at, word in enumerate(command.words) if posixpath.basename(word.text) == program)
    for word in command.words[at + 1 :]:
        if re.fullmatch(r"-|-[A-Za-z]*[cm]", word.text):
            return None
        if not word.text.startswith("-"):
            return word if _SCRIPT.fullmatch(word.text) else None
    return None


def _module(task: Task, before: Sequence[Command], command: Command) -> Word | None:
    """Find the module that `python -m` runs, unless an earlier command or the image may have installed it."""
    if not re.fullmatch(r"python[\d.]*", command.program) or any("image_id" in rung.settings for rung in task.rungs):
        return None
    words = [word.text for earlier in (*before, command) for word in earlier.words]
    if {*words} & {"install", "sync", "add", "create"} or "PYTHONPATH" in " ".join((*task.envs, *words)):
        return None
    at = next((at for at, word in enumerate(command.words) if re.fullmatch(r"-[A-Za-z]*m", word.text)), None)
    found = command.words[at + 1] if at is not None and at + 1 < len(command.words) else None
    root = found.text.partition(".")[0] if found else ""
    known = root in sys.stdlib_module_names or root in _INSTALLED
    return found if found and _MODULE.fullmatch(found.text) and not known else None


def _as_path(text: str) -> str:
    """Return a script's path, or a module's name as a path."""
    return text.replace(".", "/") if _MODULE.fullmatch(text) and not _SCRIPT.fullmatch(text) else text


def _brought(task: Task, before: Sequence[Command], path: str) -> bool:
    """Whether a file may be on the machine: in a mount, or created by an earlier command."""
    if not within(path, WORKDIR) or "$" in path or "`" in path:
        return True  # A folder of the image, or one that only the shell knows.
    if any(
        within(place, target)
        for place in (path, f"{path}.py")
        for target in (*(mount.path for mount in task.mounts), *task.volumes)
    ):
        return True
    name = posixpath.basename(path)
    return any(
        command.program in _BRING
        or any("download" in word.text or "clone" in word.text for word in command.words)
        or (command.program not in _LOOK and any(name in word.text for word in command.words[1:]))
        or re.search(rf">\s*\S*{re.escape(name)}", " ".join(word.text for word in command.words))
        for command in before
    )


def _torch(task: Task) -> Iterator[Finding]:
    """Find an unpinned torch on an accelerator that the newest torch does not support."""
    old = [(name, rung) for rung in task.rungs for name, _ in named_accelerators(rung) if name.lower() in TOO_OLD]
    if not old:
        return
    name, rung = old[0]
    # The image may have a torch, which pip then keeps.
    level: Level = "warning" if "image_id" in rung.settings else "error"
    for script in (task.setup, task.run):
        for command in script.commands:
            word = _unpinned(command)
            if word and script.at:
                yield Finding(
                    script.line(word),
                    level,
                    "torch-unpinned",
                    f"{shown(word.text)} installs the newest torch, whose CUDA 13 does not support {shown(name)}",
                    "Pin an older one: 'torch<2.8' --index-url https://download.pytorch.org/whl/cu126",
                )


def _unpinned(command: Command) -> Word | None:
    """Find the word with which a command installs the newest torch."""
    texts = [word.text for word in command.words]
    if command.program not in _INSTALLERS and not re.fullmatch(r"python[\d.]*", command.program):
        return None
    if not {"install", "add", "--with", "create"} & {*texts} or any(_OLD_CUDA.search(text) for text in texts):
        return None
    if re.fullmatch(r"python[\d.]*", command.program) and not {"pip", "uv"} & {*texts}:
        return None
    if command.program in ("conda", "mamba", "micromamba") and "pytorch" in _channels(texts):
        return None  # The last version on that channel is 2.5.
    for word in command.words[1:]:
        found = _TORCH.fullmatch(word.text)
        if found and not _UPPER_BOUND.search(found[2]) and not _is_value(command, word):
            return word
    return None


def _channels(texts: Sequence[str]) -> list[str]:
    named = [following for text, following in itertools.pairwise(texts) if text in ("-c", "--channel")]
    return named + [text.partition("=")[2] for text in texts if text.startswith(("-c=", "--channel="))]


def _is_value(command: Command, word: Word) -> bool:
    """Whether a word is the value of an option, as in `conda create -n torch`, and not a package."""
    at = next(at for at, other in enumerate(command.words) if other is word)
    return command.words[at - 1].text in ("-n", "--name", "-c", "--channel", "-p", "--prefix", "-e", "-r")
