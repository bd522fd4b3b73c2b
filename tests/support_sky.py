"""Runs SkyPilot itself in a separate process, without an account; it reads small catalogs in a temporary HOME."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support import REPO

# Small catalogs under HOME; SkyPilot never overwrites those that it did not fetch.
CATALOGS = """
import os
from pathlib import Path
home = Path(os.environ["HOME"])
catalogs = home / ".sky" / "catalogs" / "v8"
kinds = ["A100", "A10G", "A100-80GB", "A100-80GB-SXM", "L4"]
head = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,"
head += "AvailabilityZone\\n"
for cloud, region in (("aws", "us-east-1"), ("gcp", "us-central1")):
    (catalogs / cloud).mkdir(parents=True)
    rows = [f"x.{kind},{kind},8,96.0,1152.0,,30.0,9.0,{region},{region}a" for kind in kinds]
    (catalogs / cloud / "vms.csv").write_text(head + "\\n".join(rows) + "\\n")
(catalogs / "common").mkdir()
listed = "".join(f'{kind},"AWS, GCP"\\n' for kind in kinds)
(catalogs / "common" / "accelerators.csv").write_text("AcceleratorName,Clouds\\n" + listed)
"""

# For each text: None if a launch would continue, else the reason why SkyPilot refuses it.
_VERDICTS = """
import json, sys
from sky.utils import dag_utils
verdicts = []
for text in json.loads(sys.stdin.read()):
    try:
        dag = dag_utils.load_dag_from_yaml_str(text)
        for task in dag.tasks:
            task.validate()
        dag_utils.fill_default_config_in_dag_for_job_launch(dag)
        verdicts.append(None)
    except Exception as error:
        verdicts.append(f"{type(error).__name__}: {error}")
print(json.dumps(verdicts))
"""

_COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from skyspot.cli import main as cli
results = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["skyspot", *words]
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
    results.append((code, out.getvalue()))
print(json.dumps(results))
"""


def run_sky(code: str, home: Path, given: object, cwd: Path | None = None, **env: str) -> str:
    """Run a program that imports sky and reads `given` as JSON from its stdin; returns its output."""
    env = {**os.environ, "HOME": str(home), "SKY_RUNTIME_DIR": str(home), "PYTHONPATH": str(REPO), **env}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(given), env=env, cwd=cwd, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refusals(texts: list[str], home: Path) -> list[str | None]:
    """Have SkyPilot read and validate task YAMLs, as for managed jobs; returns why each is refused, or None."""
    verdicts = json.loads(run_sky(CATALOGS + _VERDICTS, home, texts).splitlines()[-1])
    assert isinstance(verdicts, list)
    return verdicts


def run_commands(
    commands: list[list[str]], home: Path, project: Path, before: str = "", **env: str
) -> list[tuple[int, str]]:
    """Run `skyspot` commands in one process that imports sky once; returns the exit status and output of each.

    Args:
        commands: The words of each command, after `skyspot`.
        home: The user's HOME.
        project: The working folder.
        before: A program to run first, such as CATALOGS.
        env: Further variables. By default, SkyPilot's server does not answer.
    """
    alone = {"SKYPILOT_API_SERVER_ENDPOINT": "http://127.0.0.1:1", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    printed = run_sky(before + _COMMANDS, home, commands, project, **alone | env)
    return [(code, output) for code, output in json.loads(printed.splitlines()[-1])]
