"""The rules of lint, each by its code: the one list that the command line, the docs and the checks of codes share."""

from __future__ import annotations

from dataclasses import dataclass

from skyspot.errors import UsageError, did_you_mean, shown


@dataclass(frozen=True)
class Rule:
    """One thing that lint looks for."""

    code: str
    """Stable: it stands in people's files and scripts."""
    level: str
    """`error`, `warning`, or `error or warning`: that depends on what is at stake."""
    about: str
    """What is wrong, as a sentence without its full stop."""


_EITHER = "error or warning"
RULES = (
    # -- the file
    Rule("not-yaml", "error", "The file cannot be read as YAML"),
    Rule("not-a-task", "error", "The file is something else: docker-compose, SkyPilot's own settings, a volume, ..."),
    Rule("service-section", "error", "`service` or `pool`: the file is for `sky serve up` or `sky jobs pool apply`"),
    Rule("unknown-key", _EITHER, "SkyPilot knows no such key, and refuses the file"),
    Rule("unknown-ignore", "warning", "An ignore comment names no rule"),
    # -- checkpoints
    Rule("no-checkpoint-mount", _EITHER, "Spot machines are asked for, and no bucket is mounted for checkpoints"),
    Rule("checkpoint-on-machine", _EITHER, "Checkpoints go to the machine's own disk, and are lost with it"),
    Rule("checkpoint-outside-mounts", _EITHER, "Nothing is mounted where checkpoints go"),
    Rule("checkpoint-on-copy", _EITHER, "Checkpoints go into a COPY, which is never uploaded"),
    Rule("checkpoint-on-cached-mount", "warning", "Checkpoints go to MOUNT_CACHED, which uploads later"),
    Rule("checkpoint-on-read-only-mount", _EITHER, "Checkpoints go to a mount that is read-only"),
    Rule("exec-skips-uploads", "warning", "`exec` in `run` skips SkyPilot's wait for MOUNT_CACHED uploads"),
    # -- mounts
    Rule("prefix-under-mount", "error", "A bucket's prefix is mounted, which SkyPilot's server refuses"),
    Rule("azure-prefix-dropped", "warning", "An Azure container's prefix is mounted, which SkyPilot drops"),
    Rule("mount-refused", "error", "SkyPilot's server refuses the mount"),
    # -- recovery
    Rule("no-75", "error", "The trainer runs, and job_recovery does not list its exit code 75"),
    Rule("recovers-on-75", "warning", "75 is recovered on, and `run` does not start the trainer"),
    Rule("recovers-on-errors", _EITHER, "A code of recover_on_exit_codes would be tried for ever"),
    Rule("recovers-on-a-stop", "error", "A code of recover_on_exit_codes is one with which the trainer stops for good"),
    Rule("unknown-recovery-key", "error", "job_recovery has a key that SkyPilot's server refuses"),
    Rule("unknown-strategy", "error", "SkyPilot knows no such recovery strategy"),
    Rule("eager-next-region", "warning", "EAGER_NEXT_REGION does not skip the region that it lost"),
    Rule("differing-recovery", "error", "job_recovery differs among entries, which SkyPilot's server refuses"),
    Rule("differing-priority", "error", "priority differs among entries, which SkyPilot's server refuses"),
    # -- accelerators and places
    Rule("unknown-gpu", _EITHER, "SkyPilot's catalogs have no such accelerator"),
    Rule("gpu-torch-cannot-use", _EITHER, "The trainer's torch cannot run on this accelerator"),
    Rule("torch-unpinned", _EITHER, "The newest torch is installed, which cannot run on an accelerator asked for"),
    Rule("no-spot-there", _EITHER, "Spot machines are asked for where there are none"),
    Rule("on-demand-first", "warning", "An on-demand entry stands before spot ones, and is taken first"),
    Rule("grace-too-long", "warning", "The last save is given more time than the cloud gives notice"),
    # -- commands
    Rule("script-not-there", _EITHER, "`run` starts a file that nothing brings to the machine"),
    Rule("secret-in-envs", "warning", "A secret stands in `envs`, which everybody who sees the job can read"),
    Rule("setup-without-set-e", "warning", "`setup` goes on after a command that fails"),
)
CODES = tuple(rule.code for rule in RULES)


def check_code(option: str, code: str) -> None:
    """Refuse the code of no rule.

    Raises:
        UsageError: there is no such rule; the nearest is named.
    """
    if code not in CODES:
        raise UsageError(f"{option}: {no_such_rule(code)}. {nearest(code)}")


def no_such_rule(code: str) -> str:
    """What is wrong with a code that is none."""
    return f"there is no rule {shown(code)}"


def nearest(code: str) -> str:
    """The remedy for a code that is none."""
    return did_you_mean(code, CODES).strip() or "See `skyspot lint --list`"


def table() -> str:
    """The rules as a table of Markdown, as the docs have it."""
    rows = [f"| `{rule.code}` | {rule.level} | {rule.about} |" for rule in RULES]
    return "\n".join(["| code | level | what is wrong |", "|---|---|---|", *rows]) + "\n"
