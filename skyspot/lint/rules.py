"""The registry of lint's rules, by code. The command line, the docs and `--ignore` all use this one list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skyspot.errors import UsageError, did_you_mean, shown

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """A problem that SkyPilot accepts now but that harms the run later, or that its server refuses."""

    line: int
    """Line number of the key or value, from 1."""
    level: Level
    """`error`: it fails on SkyPilot's server, certainly loses training, or costs money without end.

    `note`: the user ignores it.
    """
    name: str
    """The code of its rule, like `prefix-under-mount`."""
    reason: str
    remedy: str
    task: str = ""
    """Name of the task, in a pipeline."""


@dataclass(frozen=True)
class Rule:
    """One kind of problem that lint looks for."""

    code: str
    """Stable, because users write it in files and scripts."""
    level: str
    """`error`, `warning`, or `error or warning` if it depends on the case."""
    about: str
    """The problem, as a sentence without a full stop."""


_EITHER = "error or warning"
RULES = (
    # -- the file
    Rule("not-yaml", "error", "The file cannot be read as YAML"),
    Rule(
        "not-a-task",
        "error",
        "The file is not a task but, for example, docker-compose, SkyPilot's own settings or a volume",
    ),
    Rule(
        "service-section",
        "error",
        "The file has `service` or `pool`: it is for `sky serve up` or `sky jobs pool apply`",
    ),
    Rule("unknown-key", _EITHER, "SkyPilot does not know the key and refuses the file"),
    Rule("unknown-ignore", "warning", "An ignore comment names no rule, or one that does not exist"),
    # -- checkpoints
    Rule("no-checkpoint-mount", _EITHER, "The task uses spot instances and mounts no bucket for checkpoints"),
    Rule("checkpoint-on-machine", _EITHER, "Checkpoints go to the machine's own disk and are lost with it"),
    Rule("checkpoint-outside-mounts", _EITHER, "Nothing is mounted where checkpoints go"),
    Rule("checkpoint-on-copy", _EITHER, "Checkpoints go into a COPY mount, which is never uploaded"),
    Rule("checkpoint-on-cached-mount", "warning", "Checkpoints go to a MOUNT_CACHED mount, which uploads later"),
    Rule("checkpoint-on-read-only-mount", _EITHER, "Checkpoints go to a read-only mount"),
    Rule("exec-skips-uploads", "warning", "`exec` in `run` skips SkyPilot's wait for MOUNT_CACHED uploads"),
    # -- mounts
    Rule("prefix-under-mount", "error", "A mount's source is a prefix in a bucket, which SkyPilot's server refuses"),
    Rule(
        "azure-prefix-dropped",
        "warning",
        "A mount's source is a prefix in an Azure container, and SkyPilot drops the prefix",
    ),
    Rule("mount-refused", "error", "SkyPilot's server refuses the mount"),
    # -- recovery
    Rule("no-75", "error", "`run` starts the trainer, but job_recovery does not list its exit code 75"),
    Rule("recovers-on-75", "warning", "recover_on_exit_codes lists 75, but `run` does not start the trainer"),
    Rule("recovers-on-errors", _EITHER, "recover_on_exit_codes lists a code that would restart the job forever"),
    Rule(
        "recovers-on-a-stop",
        "error",
        "recover_on_exit_codes lists a code that the trainer exits with when it must not restart",
    ),
    Rule("unknown-recovery-key", "error", "job_recovery has a key that SkyPilot's server does not know"),
    Rule("unknown-strategy", "error", "SkyPilot does not know the recovery strategy"),
    Rule("eager-next-region", "warning", "EAGER_NEXT_REGION does not skip the region that was lost"),
    Rule("differing-recovery", "error", "job_recovery differs among entries, which SkyPilot's server refuses"),
    Rule("differing-priority", "error", "priority differs among entries, which SkyPilot's server refuses"),
    # -- accelerators and places
    Rule("unknown-gpu", _EITHER, "SkyPilot's catalogs do not list the accelerator"),
    Rule("gpu-torch-cannot-use", _EITHER, "The trainer's torch cannot run on the accelerator"),
    Rule(
        "torch-unpinned",
        _EITHER,
        "The task installs the newest torch, which cannot run on an accelerator that it requests",
    ),
    Rule("no-spot-there", _EITHER, "The task requests spot instances where there are none"),
    Rule("on-demand-first", "warning", "An on-demand entry comes before spot entries and is used first"),
    Rule("grace-too-long", "warning", "The grace for the last save is longer than the cloud's notice"),
    # -- commands
    Rule("script-not-there", _EITHER, "`setup` or `run` needs a file that nothing brings to the machine"),
    Rule("secret-in-envs", "warning", "`envs` holds a secret, which everyone who can see the job can read"),
    Rule("setup-without-set-e", "warning", "`setup` continues after a failed command"),
)
CODES = tuple(rule.code for rule in RULES)


def check_code(option: str, code: str) -> None:
    """Refuse an unknown code.

    Raises:
        UsageError: no rule has this code; names the nearest.
    """
    if code not in CODES:
        raise UsageError(f"{option}: {no_such_rule(code)}. {nearest(code)}")


def no_such_rule(code: str) -> str:
    """Describe the problem with an unknown code."""
    return f"there is no rule {shown(code)}"


def nearest(code: str) -> str:
    """Suggest a remedy for an unknown code."""
    return did_you_mean(code, CODES).strip() or "See `skyspot lint --list`"


def table() -> str:
    """Format the rules as the Markdown table in docs/lint.md."""
    rows = [f"| `{rule.code}` | {rule.level} | {rule.about} |" for rule in RULES]
    return "\n".join(["| code | level | what is wrong |", "|---|---|---|", *rows]) + "\n"
