"""`skyspot launch --dryrun`: SkyPilot itself reads and validates the task, without network, server or credentials."""

import socket
from pathlib import Path

import pytest
from support_sky import CATALOGS, run_commands

# Nothing listens at that port: it stands for the network.
NO_NETWORK = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:1"),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), ""),
}
# Lint is overruled, so that what is said is SkyPilot's.
_PAST_LINT = ["--ignore", "unknown-key", "--ignore", "not-a-task", "--ignore", "unknown-recovery-key"]
Case = tuple[str, list[str], int, str]


def dry_runs(cases: list[Case], home: Path, before: str = "", **env: str) -> None:
    commands = []
    for number, (text, args, _, _) in enumerate(cases):
        (home / f"{number}.yaml").write_text(text)
        commands.append(["launch", *([f"{number}.yaml"] if text else []), "-n", "mine", "--dryrun", *args])
    results = run_commands(commands, home, home, before, **NO_NETWORK | env)
    for (text, args, code, said), (found, output) in zip(cases, results, strict=True):
        assert found == code, (text, args, output)
        assert said in output, (text, args, output)
        assert "Traceback" not in output
    assert not (home / ".skyspot").exists() or not list((home / ".skyspot").iterdir())


GOOD = "resources: {accelerators: A100:8, use_spot: false}\nrun: nvidia-smi\n"
WITH_CATALOGS: list[Case] = [
    (GOOD, [], 0, "Dry run: nothing was written or submitted."),
    (GOOD, [], 0, "not checked for an active job of this name: SkyPilot's API server does not answer"),
    (GOOD, ["--json"], 0, '"state": "not submitted"'),
    ("", ["--gpus", "A100:8", "--bucket", "s3://mine"], 0, "Dry run: nothing was written or submitted."),
    ("", ["--gpus", "A100:8", "--bucket", "s3://mine"], 0, "Prices:      of a node in the cheapest place"),
    ("", ["command", "--set", "command=0.py", "--set", "processes=2", "--set", "workdir=."], 0, "Dry run: nothing was"),
    ("services: {web: {image: nginx}}\n", [], 1, "this is a docker-compose file, not a SkyPilot task"),
    ("services: {web: {image: nginx}}\n", _PAST_LINT, 1, "SkyPilot refused: Invalid task YAML: "),
    ("jobs: {controller: {resources: {cpus: 4}}}\n", [], 1, "this is a file of SkyPilot settings"),
    ("jobs: {controller: {resources: {cpus: 4}}}\n", _PAST_LINT, 1, "SkyPilot refused: Invalid task YAML: "),
    ("name: v\ntype: k8s-pvc\nsize: 10Gi\n", [], 1, "this is a volume"),
    ("name: v\ntype: k8s-pvc\nsize: 10Gi\n", _PAST_LINT, 1, "SkyPilot refused: Invalid task YAML: "),
    ("service: {readiness_probe: /}\nresources: {ports: 80}\nrun: x\n", [], 1, "Start it with `sky serve up`"),
    ("max_restart_on_errors: 3\nrun: x\n", [], 1, "unknown key 'max_restart_on_errors'"),
    ("max_restart_on_errors: 3\nrun: x\n", _PAST_LINT, 1, "SkyPilot refused: Invalid task YAML: "),
    ("resources: {use_spots: true}\nrun: x\n", _PAST_LINT, 1, "SkyPilot refused: Invalid resources YAML: "),
    ("file_mounts: {/c: {sorce: s3://b}}\nrun: x\n", _PAST_LINT, 1, "SkyPilot refused: Invalid storage YAML: "),
    ("num_nodes: many\nrun: x\n", [], 1, "SkyPilot refused: Invalid task YAML: "),
    ("run: [a, b]\n", [], 1, "SkyPilot refused: Invalid task YAML: "),
    ("workdir: ./missing\nrun: x\n", [], 1, "missing not found"),
    ("file_mounts: {/c: ./missing}\nrun: x\n", [], 1, "'./missing' does not exist locally"),
    ("resources: {infra: awz}\nrun: x\n", [], 1, "SkyPilot refused: "),
    ("resources: {infra: aws/us-eest-1}\nrun: x\n", [], 1, "SkyPilot refused: Invalid region 'us-eest-1'"),
    ("resources: {infra: aws, instance_type: p9.big}\nrun: x\n", [], 1, "SkyPilot refused: Invalid instance type"),
    ("resources: {job_recovery: FAILOVR}\nrun: x\n", ["--ignore", "unknown-strategy"], 1, "SkyPilot refused: Jobs rec"),
    ("resources: {ports: 80, region: us-east-1}\nrun: x\n", [], 0, "Dry run: nothing was written"),
    ("envs: {A-B: x}\nrun: x\n", [], 1, "SkyPilot refused: "),
]


@pytest.mark.slow
def test_a_dry_run_has_skypilot_read_and_validate_the_task(tmp_path: Path) -> None:
    dry_runs(WITH_CATALOGS, tmp_path, CATALOGS)


OFFLINE: list[Case] = [
    (GOOD, [], 0, "Note: not checked: accelerators and places: SkyPilot's catalogs could not be downloaded"),
    ("resources: {cpus: 4}\nrun: x\n", [], 0, "Dry run: nothing was written or submitted."),
    (GOOD + "workdir: ./missing\n", [], 1, "missing not found"),
    (GOOD.replace("use_spot", "use_spots"), _PAST_LINT, 1, "SkyPilot refused: Invalid resources YAML: "),
    (GOOD + "file_mounts: {/c: {sorce: s3://b}}\n", _PAST_LINT, 1, "SkyPilot refused: Invalid storage YAML: "),
]


@pytest.mark.slow
def test_a_dry_run_without_network_says_what_it_could_not_check(tmp_path: Path) -> None:
    dry_runs(OFFLINE, tmp_path)


@pytest.mark.slow
def test_a_dry_run_starts_no_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = {
        "SKYPILOT_API_SERVER_ENDPOINT": f"http://127.0.0.1:{port}",
        "SKYPILOT_API_SERVER_LOCAL_PORT": str(port),
    }
    unasked = "not checked for an active job of this name: SkyPilot's API server does not answer"
    dry_runs([("resources: {cpus: 4}\nrun: x\n", [], 0, unasked)], tmp_path, **local)
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) != 0
