"""Rehearses every example under the default kinds of preemption, and every broken form; then writes the results.

    python tests/example_campaign.py                              everything (make examples)
    python tests/example_campaign.py --only plain,gan             these examples
    python tests/example_campaign.py --only broken                the broken forms

    python tests/example_campaign.py --state FILE --report docs/examples-results.md     also writes the results

--state FILE keeps the results, and an interrupted campaign continues from there. The report is written once everything
was rehearsed and every verdict was as the table says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from example_table import BROKEN, FOLDER, KINDS, WHY_NOT, Broken, entry, rehearse
from support import REPO

from skyspot.rehearsal.faults import DEFAULT_KINDS


@dataclass(frozen=True)
class Job:
    """One rehearsal."""

    name: str
    example: str
    processes: str = "1"
    broken: Broken | None = None


@dataclass(frozen=True)
class Done:
    """What a rehearsal gave."""

    processes: str
    strikes: int
    verdict: str
    seconds: float
    wrong: str
    """What is not as the table says; empty if all is."""
    commit: str = ""
    """Of the repository before and after it; of both if they differ: machines that start later get other code."""


def all_jobs() -> list[Job]:
    """Every rehearsal, in the order of the report."""
    found = []
    for safe in sorted(FOLDER.glob("*.py")):
        moves = [",".join(map(str, entry(safe).moves))] if entry(safe).moves else []
        for processes in [*map(str, entry(safe).processes), *moves]:
            found.append(Job(f"{safe.stem}, {processes}", safe.stem, processes))
    forms = [(one, str(processes)) for one in BROKEN for processes in one.processes]
    return found + [Job(f"broken: {one.name}, {count}", one.example, count, one) for one, count in forms]


def do(job: Job) -> Done:
    """Rehearse an example or a broken form, and compare the verdict with the table."""
    example, broken = entry(FOLDER / f"{job.example}.py"), job.broken
    with tempfile.TemporaryDirectory(prefix="skyspot-examples-") as folder:
        home = Path(folder)
        task = broken.task(home) if broken else FOLDER / f"{job.example}.yaml"
        kinds = ("sigterm",) if broken else DEFAULT_KINDS
        options = ("--preemptions", len(kinds), "--kinds", ",".join(kinds))
        done = rehearse(task, example.steps, home, "--processes", job.processes, *options, "--json")
    try:
        result = json.loads(done.stdout)
    except ValueError:
        return Done(job.processes, 0, "", 0.0, (done.stderr or done.stdout).strip()[-2000:])
    return judged(job, result)


def judged(job: Job, result: dict[str, Any]) -> Done:
    """What a rehearsal's JSON says, compared with the table."""
    legs = [leg for leg in result["legs"] if leg["verdict"]]
    verdict = " ".join(leg["verdict"]["text"] for leg in legs)
    strikes = sum(leg["preempted"] for leg in legs)
    says = [job.broken.verdict, job.broken.says] if job.broken else [entry(FOLDER / f"{job.example}.py").says]
    missing = [text for text in says if text not in verdict]
    wrong = f"the verdict does not say {missing}: {verdict}" if missing else ""
    if result["exact"] == bool(job.broken):
        wrong = f"{'exact' if result['exact'] else 'not exact'}: {verdict}"
    return Done(job.processes, strikes, verdict, result["seconds"], wrong)


def campaign(jobs: list[Job], state: Path | None, work: Callable[[Job], Done] = do) -> dict[str, Done]:
    """Do what is not done yet; the state is kept after each rehearsal."""
    done: dict[str, Done] = {}
    if state and state.exists():
        done = {name: Done(**fields) for name, fields in json.loads(state.read_text()).items()}
    for job in jobs:
        if job.name in done and not done[job.name].wrong:
            continue
        before = commit()
        found = work(job)
        commits = dict.fromkeys([before, commit()])
        done[job.name] = found = replace(found, commit=", ".join(commits))
        print(f"{job.name}: {found.wrong or 'as it should be'} ({found.seconds:.0f} s)", flush=True)
        if state:
            new = state.with_suffix(".new")
            new.write_text(json.dumps({name: asdict(one) for name, one in done.items()}))
            new.replace(state)
    return done


def commit() -> str:
    """The repository's commit, with `-dirty` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.strip() or "unknown"


def first_cells(job: Job) -> str:
    """A row's beginning: which rehearsal it is."""
    cells = f"| `{job.example}.py` | {job.processes.replace(',', ' then ')} |"
    return f"| {job.broken.rule} {cells}" if job.broken else cells


def report(jobs: list[Job], done: dict[str, Done], ran: str) -> str:
    """The results as Markdown."""
    lines = [
        "# The examples, rehearsed", "",
        "`make examples` writes this file. [your-own-script.md](your-own-script.md) shows the examples.", "",
        f"{ran}. One preemption of each of the kinds {', '.join(DEFAULT_KINDS)}; one more where the number of "
        "processes changes.", "",
        "| example | processes | preemptions | verdict | seconds | commit |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for job in jobs:
        one = done[job.name]
        if job.broken is None:
            lines.append(f"{first_cells(job)} {one.strikes} | {one.verdict} | {one.seconds:.0f} | {one.commit} |")
    lines += [
        "", "The same scripts with one rule broken on purpose: one preemption by SIGTERM. *Not checked*: the script "
        "refuses to train, or two undisturbed runs of it differ.", "",
        "| rule that is broken | example | processes | verdict | commit |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for job in jobs:
        if job.broken:
            text = done[job.name].verdict.partition("\n  its whole output")[0]
            verdict = " ".join(text.split()).replace("|", "\\|")
            lines.append(f"{first_cells(job)} {verdict} | {done[job.name].commit} |")
    return "\n".join([*lines, "", *matrix(jobs)]) + "\n"


def matrix(jobs: list[Job]) -> list[str]:
    """The kinds of what is not saved, for each example: what the verdict says, or why there is no such form."""
    lines = ["What is not saved in a broken form, and the verdict:", "", f"| example | {' | '.join(KINDS)} |"]
    lines.append("|---" * (len(KINDS) + 1) + "|")
    for example in dict.fromkeys(job.example for job in jobs):
        cells = []
        for kind in KINDS:
            forms = [job for job in jobs if job.broken and (job.example, job.broken.kind) == (example, kind)]
            counts = " and ".join(job.processes for job in forms)
            said = f"{forms[0].broken.verdict} ({counts})" if forms and forms[0].broken else ""
            cells.append(said or f"not rehearsed: {WHY_NOT[example, kind]}")
        lines.append(f"| `{example}.py` | {' | '.join(cells)} |")
    return [*lines, "", "In parentheses: the numbers of processes."]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="EXAMPLE,EXAMPLE", help="names of examples, or `broken`")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep the results here, and continue from them")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    jobs = [job for job in all_jobs() if not only or ("broken" if job.broken else job.example) in only]
    try:
        done = campaign(jobs, options.state)
    except KeyboardInterrupt:
        print(f"\ninterrupted{'; run the same command to continue' if options.state else ''}")
        return 130
    wrong = [name for name in done if done[name].wrong]
    print(f"{len(jobs)} rehearsals, {len(wrong)} not as they should be")
    if options.report and not wrong and not only:
        options.report.write_text(report(jobs, done, f"{datetime.now(timezone.utc):%Y-%m-%d}"))
        print(f"results written to {options.report}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
