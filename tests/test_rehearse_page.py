"""docs/rehearse.md names the verdicts, kinds, options and mounts of the code, and has an example of each verdict."""

import os
import re
import shlex
from pathlib import Path

import click
import faultfs
import pytest
import yaml
from programs.scripts.truth import TRUTHS
from support import REPO
from support_rehearse import rehearse as rehearse_script

from skyspot.cli.rehearse import rehearse
from skyspot.rehearsal import by_kind, faults
from skyspot.rehearsal.bucketfs.manners import MANNERS, REMEDIES, Manners
from skyspot.rehearsal.machine import bucketfs_missing
from skyspot.rehearsal.remedies import FINDINGS

PAGE = (REPO / "docs" / "rehearse.md").read_text()
CONSTANTS = {value for name, value in vars(by_kind).items() if name.isupper() and isinstance(value, str)}
VERDICTS = CONSTANTS - set(faults.KINDS)
PROGRAMS = {"local": "a disk", "s3": "goofys", "gcs": "gcsfuse", "azure": "blobfuse2", "cached": "rclone: MOUNT_CACHED"}
"""What mounts a bucket of each kind."""


def options() -> set[str]:
    return {name for option in rehearse.params if isinstance(option, click.Option) for name in option.opts}


def outputs(shown: str = "") -> list[str]:
    """The outputs of rehearsals on the page; those marked `shown` are parts of one that another test repeats."""
    return [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S) if kind in ("", shown)]


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """The first cell of each row of a section's tables."""
    return [cells[0].strip() for line in text.splitlines() if len(cells := line.strip("|").split(" | ")) > 1]


def arrival(kind: Manners) -> str:
    if kind.direct:
        return "with each write"
    when = "when it is closed" if kind.upload_after_s is None else f"{kind.upload_after_s:g} s after it is closed"
    return f"whole, {when}{' or synced' if kind.fsync_uploads else ''}"


def mounts() -> str:
    lines = ["| `--mount-like` | mounted by | a file is in the bucket | a rename | refuses |", "|---|---|---|---|---|"]
    for name, kind in MANNERS.items():
        renames = "copies each file, then deletes it" if kind.rename_copies else "is one step"
        refuses = ", ".join(kind.refuses) or "nothing"
        lines.append(f"| `{name}` | {PROGRAMS[name]} | {arrival(kind)} | {renames} | {refuses} |")
    return "\n".join(lines)


def refusals() -> str:
    lines = ["| refused | by, with the error | remedy |", "|---|---|---|"]
    for what, remedy in REMEDIES.items():
        errors: dict[str, list[str]] = {}
        for name, kind in MANNERS.items():
            if what in kind.refuses:
                errors.setdefault(os.strerror(kind.refuses[what]), []).append(f"`{name}`")
        by = "; ".join(f"{', '.join(names)}: {error}" for error, names in errors.items())
        lines.append(f"| {what} | {by} | {remedy} |")
    return "\n".join(lines)


def findings() -> str:
    lines = ["| finding | remedy |", "|---|---|"]
    return "\n".join([*lines, *(f"| {one.name} | {one.remedy} |" for one in FINDINGS)])


@pytest.mark.parametrize("make", [mounts, refusals, findings])
def test_the_tables_of_mounts_and_findings_are_made_from_the_code(make) -> None:
    assert f"\n\n{make()}\n\n" in PAGE, f"docs/rehearse.md: put this table there:\n{make()}"


def test_every_verdict_is_explained_and_no_other() -> None:
    table = section("The verdicts").partition("\n\n**")[0]
    assert set(first_cells(table)) - {"verdict"} == VERDICTS


@pytest.mark.parametrize("verdict", sorted(VERDICTS))
def test_every_verdict_has_an_example(verdict: str) -> None:
    """In the table by kind of an output; that of a run, in its line."""
    line = "Preempted: inconclusive: " if verdict == by_kind.INCONCLUSIVE else rf"[\w -]+?  {re.escape(verdict)} "
    assert any(re.search(f"^{line}", text, re.M) for text in outputs(shown="text"))
    assert re.search(rf"^(?:\*\*.*)?\*\*{re.escape(verdict)}\*\*", section("The verdicts"), re.M)


def test_every_example_is_a_rehearsal_of_a_script_that_is_there_with_its_command() -> None:
    commands = re.findall(r"^    skyspot rehearse my-task\.yaml (.*)$", PAGE, re.M)
    assert len(commands) == len(outputs()) >= 5
    scripts = {one.script: one.result for one in TRUTHS}
    named = re.findall(r"`(\w+)\.py`", PAGE)
    assert len(named) == len(commands)
    for script, command in zip(named, commands, strict=True):
        assert f"--compare 'own/{scripts[script]}'" in command
    for text in outputs():
        lines = text.splitlines()
        assert lines[0] == "Undisturbed: the reference"
        kinds = lines[[line.split() for line in lines].index(["kind", "verdict", "what", "was", "struck"]) + 1 :]
        rows = kinds[: next(n for n, line in enumerate(kinds) if line.startswith("Preempted: "))]
        assert [line.split("  ")[0] for line in rows] == [str(number) for number in range(1, len(rows) + 1)]
        assert {line.split("  ")[1] for line in rows} <= {*faults.KINDS, "other processes"}


def told(output: str) -> list[str]:
    """The titles, the rows by kind and the verdicts of a rehearsal, without what time and chance decide."""
    titles = ("Undisturbed", "Preempted", "Only ", "  remedy: ", "  note: ", "exit ", "  _", "    ~/")
    found = []
    for line in output.splitlines():
        row = re.match(rf"\d+  ([\w -]+?) +({'|'.join(VERDICTS)}) ", line)
        if row and row[1] in (*faults.KINDS, "other processes"):
            found.append(f"{row[1]}: {row[2]}")
        elif line.startswith(titles):
            found.append(re.sub(r"\d+(\.\d+)?", "#", line).replace("saves", "save"))
    return found


def examples() -> list[tuple[str, str, str]]:
    """(script, options, output) of each example."""
    commands = re.findall(r"^    skyspot rehearse my-task\.yaml (.*)$", PAGE, re.M)
    return list(zip(re.findall(r"`(\w+)\.py`", PAGE), commands, outputs(), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(bucketfs_missing() is not None, reason=str(faultfs.missing() or bucketfs_missing()))
@pytest.mark.parametrize(("script", "options", "output"), examples(), ids=[one[0] for one in examples()])
def test_an_example_is_what_a_rehearsal_prints(script: str, options: str, output: str, tmp_path: Path) -> None:
    """In all but times, steps and numbers of saves."""
    [task] = re.findall(r"```yaml\n(name: own\n.*?)```", PAGE, re.S)
    (tmp_path / "my-task.yaml").write_text(task)
    code = next(one.path for one in TRUTHS if one.script == script).read_text()
    if script == "says_resuming":  # As the page says.
        code = "".join(line for line in code.splitlines(True) if not line.startswith("    load_checkpoint("))
    (tmp_path / "train.py").write_text(code)
    for _ in range(3):
        done = rehearse_script("my-task.yaml", *shlex.split(options), cwd=tmp_path, env={"COLUMNS": "100"})
        in_a_save = re.search(r"^\d+  killed  .*part of", done.stdout, re.M)
        if told(done.stdout) == told(output) or not in_a_save:
            break  # Else a kill at a time fell in a save, which is another example.
    assert not done.stderr, done.stderr
    assert told(done.stdout) == told(output), done.stdout


def test_every_kind_of_strike_is_explained_and_no_other() -> None:
    table = PAGE.partition("| `--kinds` |")[2].partition("\n\n")[0]
    assert [cell.strip("`") for cell in first_cells(table) if cell.startswith("`")] == list(faults.KINDS)


def test_every_option_on_the_page_is_one_of_the_command() -> None:
    prose = PAGE.replace(section("In GitHub Actions"), re.sub(r"pip install.*", "", section("In GitHub Actions")))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prose)) <= options()


def test_the_steps_for_github_install_what_a_rehearsal_needs_and_run_one() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", section("In GitHub Actions"), re.S)
    [job] = yaml.safe_load(text)["jobs"].values()
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    for needed in (
        "fuse3",
        "[rehearse]",
        "apparmor_restrict_unprivileged_userns=0",
        "\nskyspot rehearse my-task.yaml ",
    ):
        assert needed in commands
