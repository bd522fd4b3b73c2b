"""Rules about programs: what `setup` installs and `run` starts must work on a fresh machine."""

from __future__ import annotations

import itertools
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence

from skyspot.errors import shown
from skyspot.lint.resources import TOO_OLD, accelerators
from skyspot.lint.rules import Finding, Level
from skyspot.task.document import Task
from skyspot.task.mounts import WORKDIR, clean_path, within
from skyspot.task.shell import Command, Word, option

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
    "virtualenv",
)
# Programs that fetch or create files in places that lint cannot know.
_BRING = (
    "7z", "aws", "azcopy", "cp", "curl", "docker", "gcloud", "gdown", "gh", "git", "gsutil", "hf", "huggingface-cli",
    "hub", "install", "kaggle", "ln", "make", "mc", "mount", "mv", "rclone", "rsync", "s5cmd", "scp", "svn", "tar",
    "tee", "unzip", "wget",
)  # fmt: skip
# Programs that name a file without creating it.
_LOOK = ("[", "[[", "bash", "chmod", "dash", "echo", "eval", "ls", "printf", "sh", "stat", "test", "zsh")
_PYTHON = re.compile(r"python[\d.]*")
_PIP = re.compile(r"pip[\d.]*")
_CONDA = ("conda", "mamba", "micromamba")
_INSTALLERS = (*_CONDA, "pdm", "pipenv", "poetry", "uv")
# What an installer reads: a file after one of these options, or a folder. Other options have other folders as values.
_FILE_OPTIONS = ("-r", "--requirement", "--requirements")
_FILE = re.compile(r"[\w.~/-]+")
_FOLDER = re.compile(r"\.{1,2}(?:/[\w./-]*)?(?:\[[^\]]*\])?")
_FLAGS = ("-e", "--editable", "-U", "--upgrade", "-q", "--quiet", "-v", "--no-deps", "--no-build-isolation", "--user")
# torchvision and torchaudio bring the torch that belongs to them.
_TORCH = re.compile(r"(torch|pytorch|pytorch-gpu|torchvision|torchaudio)(?:\[[^\]]*\])?((?:[@<>=!~ ].*)?)", re.DOTALL)
_UPPER_BOUND = re.compile(r"==|~=|<|(?<![<>=!~])=(?!=)|@(?!latest|\*)")
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
    """Find scripts and other files that `setup` or `run` needs but that nothing puts on the machine."""
    if task.root.get("workdir"):
        return
    # The image may hold them, though not where SkyPilot starts `setup` and `run`.
    level: Level = "warning" if any("image_id" in rung.settings for rung in task.rungs) else "error"
    seen: set[str] = set()
    before: list[Command] = []
    for key, script in (("setup", task.setup), ("run", task.run)):
        folder = WORKDIR
        for command in script.commands:
            module = _module(task, before, command)
            started = _script(command) or module
            needed = started or _installed_from(command)
            text = needed.text.partition("[")[0] if needed else ""  # Without extras: `.[dev]`.
            path = clean_path(text.replace(".", "/") if needed is module else text, folder) if text else ""
            if needed and path not in seen and not _brought(task, before, path):
                seen.add(path)
                yield Finding(
                    script.line(needed),
                    level,
                    "script-not-there",
                    f"`{key}` {'starts' if started else 'needs'} {shown(needed.text)}, but neither workdir nor "
                    "file_mounts puts it on the machine",
                    "Add workdir: FOLDER, which is copied to the machine, or clone the code in `setup`",
                )
            if command.words[0].text in ("cd", "pushd") and len(command.words) > 1:
                folder = clean_path(command.words[1].text, folder)
            before.append(command)


def _script(command: Command) -> Word | None:
    """Find the script that a command starts, if its path is plain."""
    words, program = command.inner, command.program
    if _SCRIPT.fullmatch(program):
        return words[0] if _SCRIPT.fullmatch(words[0].text) and "/" in words[0].text else None
    if _LAUNCHER.fullmatch(program) or any(word.text.startswith(_LAUNCHER_MODULES) for word in words):
        return next((word for word in words[1:] if _SCRIPT.fullmatch(word.text)), None)
    if not _INTERPRETER.fullmatch(program):
        return None
    for word in words[1:]:
        if re.fullmatch(r"-|-[A-Za-z]*[cm]", word.text):
            return None
        if not word.text.startswith("-"):
            return word if _SCRIPT.fullmatch(word.text) else None
    return None


def _installed_from(command: Command) -> Word | None:
    """Find the local file or folder that a command installs from: `pip install -r FILE`, `pip install .`."""
    texts = [word.text for word in command.inner]
    if command.program in _CONDA:
        named = option(command, "-f") or option(command, "--file")
        return named if "env" in texts and named and _FILE.fullmatch(named.text) else None
    if "install" not in texts or not (_PIP.fullmatch(command.program) or "pip" in texts[1:3]):
        return None
    named = next((word for name in _FILE_OPTIONS if (word := option(command, name))), None)
    if named:
        return named if _FILE.fullmatch(named.text) else None
    for previous, word in itertools.pairwise(command.inner):
        if _FOLDER.fullmatch(word.text) and (not previous.text.startswith("-") or previous.text in _FLAGS):
            return word
    return None


def _module(task: Task, before: Sequence[Command], command: Command) -> Word | None:
    """Find the module that `python -m` runs, unless an earlier command or the image may have installed it."""
    if not _PYTHON.fullmatch(command.program) or any("image_id" in rung.settings for rung in task.rungs):
        return None
    words = [word.text for earlier in (*before, command) for word in earlier.words]
    if {*words} & {"install", "sync", "add", "create"} or "PYTHONPATH" in " ".join((*task.envs, *words)):
        return None
    at = next((at for at, word in enumerate(command.words) if re.fullmatch(r"-[A-Za-z]*m", word.text)), None)
    found = command.words[at + 1] if at is not None and at + 1 < len(command.words) else None
    root = found.text.partition(".")[0] if found else ""
    known = root in sys.stdlib_module_names or root in _INSTALLED
    return found if found and _MODULE.fullmatch(found.text) and not known else None


def _brought(task: Task, before: Sequence[Command], path: str) -> bool:
    """True if a file may be on the machine: in a mount, or created by an earlier command."""
    if not within(path, WORKDIR) or "$" in path or "`" in path:
        return True  # A folder of the image, or one that only the shell knows.
    if any(
        within(place, target) or within(target, place)
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
    old = [(name, rung) for rung in task.rungs for name, _ in accelerators(rung) if name.lower() in TOO_OLD]
    if not old:
        return
    name, rung = old[0]
    # The image may have a torch, which pip then keeps.
    level: Level = "warning" if "image_id" in rung.settings else "error"
    wanted = [
        (script, word, found)
        for script in (task.setup, task.run)
        for command in script.commands
        for word, found in _installed_torch(command)
    ]
    pinned = any(_is_pinned(found) for _, _, found in wanted)
    seen: set[int] = set()
    for script, word, found in wanted:
        line = script.line(word)
        companion = found[1] in ("torchvision", "torchaudio")
        if not _is_pinned(found) and not (companion and pinned) and line not in seen:
            seen.add(line)
            yield Finding(
                line,
                level,
                "torch-unpinned",
                f"{shown(word.text)} installs the newest torch, whose CUDA 13 does not support {shown(name)}",
                "Pin an older one: 'torch<2.8' --index-url https://download.pytorch.org/whl/cu126",
            )


def _installed_torch(command: Command) -> Iterator[tuple[Word, re.Match[str]]]:
    """Find the words with which a command installs torch, from where the newest is built for the newest CUDA."""
    texts = [word.text for word in command.words]
    python = bool(_PYTHON.fullmatch(command.program))
    if command.program not in _INSTALLERS and not _PIP.fullmatch(command.program) and not python:
        return
    if not {"install", "add", "--with", "create"} & {*texts} or any(_OLD_CUDA.search(text) for text in texts):
        return
    if python and not {"pip", "uv"} & {*texts}:
        return
    if command.program in _CONDA and "pytorch" in _channels(texts):
        return  # The last version on that channel is 2.5.
    for word in command.inner[1:]:
        found = _TORCH.fullmatch(word.text)
        if found and not _is_value(command, word):
            yield word, found


def _is_pinned(found: re.Match[str]) -> bool:
    """True if a requirement that _TORCH matches has an upper bound."""
    return _UPPER_BOUND.search(found[2]) is not None


def _channels(texts: Sequence[str]) -> list[str]:
    named = [following for text, following in itertools.pairwise(texts) if text in ("-c", "--channel")]
    return named + [text.partition("=")[2] for text in texts if text.startswith(("-c=", "--channel="))]


def _is_value(command: Command, word: Word) -> bool:
    """True if a word is the value of an option, as in `conda create -n torch`, and not a package."""
    at = next(at for at, other in enumerate(command.words) if other is word)
    return command.words[at - 1].text in ("-n", "--name", "-c", "--channel", "-p", "--prefix", "-e", "-r")
