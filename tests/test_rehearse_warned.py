"""The kinds of preemption that warn a task, and what is said of a task that ignores them."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faultfs
import pytest
from support_rehearse import rehearse

from skyspot.rehearsal import faults, unheeded
from skyspot.rehearsal.faults import WARNED
from skyspot.rehearsal.machine import bucketfs_missing
from skyspot.rehearsal.metadata import SERVICES, AwsMetadata, Metadata, services
from skyspot.rehearsal.result import Leg, Row
from trainer.notices import here
from trainer.notices.named import VARIABLES
from trainer.notices.named import named as name_of_cloud

OTHERS = tuple(kind for kind in WARNED if kind not in faults.DEFAULT_KINDS)
SCRIPT = """\
import os, signal, sys, time
out, handles = "/checkpoints/own/state", sys.argv[1] == "handles"
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: stop.append(1) if handles else None)
os.makedirs("/checkpoints/own", exist_ok=True)
step = int(open(out).read()) if os.path.exists(out) else 0
while step < 60:
    time.sleep(0.03)
    step += 1
    if step % 5 == 0 or stop:
        with open(out + ".new", "w") as file:
            file.write(str(step))
        os.replace(out + ".new", out)
    if stop:
        sys.exit(75)
open("/checkpoints/own/result", "w").write(str(step))
"""
TASK = """\
name: own
resources: {{use_spot: true}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT}}
  ~/code/train.py: ./train.py
run: {}
"""
LAUNCHED = "exec python -m trainer.launch --cpu --checkpoint-dir /checkpoints/own ~/code/train.py handles"


def rehearsed(folder: Path, run: str, *kinds: str) -> dict[str, Any]:
    (folder / "train.py").write_text(SCRIPT)
    (folder / "task.yaml").write_text(TASK.format(run))
    done = rehearse(
        "task.yaml", "--kinds", ",".join(kinds), "--preemptions", len(kinds), "--compare", "own/result",
        "--mount-like", "local", "--processes", 1, "--json", cwd=folder,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


needs_fuse = pytest.mark.skipif(bucketfs_missing() is not None, reason=str(faultfs.missing() or bucketfs_missing()))


@pytest.mark.slow
@needs_fuse
def test_a_script_that_saves_and_leaves_at_each_warning_is_exact(tmp_path: Path) -> None:
    """Without SpotRun: the launcher asks each cloud's metadata service, and passes the notice on."""
    result = rehearsed(tmp_path, LAUNCHED, *OTHERS)
    assert {row["kind"]: row["outcome"] for row in result["kinds"]} == dict.fromkeys(OTHERS, "exact"), result
    assert result["exact"]
    assert not [note for note in result["notes"] if "Remedy" in note]


@pytest.mark.slow
@needs_fuse
@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (("gcp-notice", "azure-notice"), "the task does not ask {}'s metadata service"),
        (("slurm-signal",), "ignored its SIGUSR1"),
        (("runpod-signal",), "ignored its SIGTERM"),
        (("kill-after-30s",), "ignored its SIGTERM"),
    ],
    ids=str,
)
def test_a_script_that_ignores_its_warning_is_told_so(tmp_path: Path, kinds: tuple[str, ...], told: str) -> None:
    """After a signal it goes on to its end, in less time than it had."""
    notes = rehearsed(tmp_path, "exec python ~/code/train.py ignores", *kinds)["notes"]
    found = {note.partition(":")[0]: note for note in notes if "Remedy" in note}
    assert set(found) == set(kinds), notes
    for kind, cloud in zip(kinds, ("Google Cloud", "Azure"), strict=False):
        assert told.format(cloud) in found[kind]


def test_only_a_warning_that_was_ignored_is_told() -> None:
    def said(row: Row, *asked: str) -> list[str]:
        return unheeded.told([Leg("preempted", "Preempted", rows=[row])], asked)

    notice, signalled = "azure-notice", "runpod-signal"
    assert said(Row(2, "kill", "killed")) == []
    assert said(Row(2, notice, "spot notice"))[0].startswith("azure-notice: the task does not ask Azure's metadata")
    assert said(Row(2, notice, "spot notice", saved_since=0), "azure") == [], "it would have asked later"
    for saved, did in ((0, "it neither saved nor exited."), (2, "it went on with its work.")):
        [line] = said(Row(2, notice, "spot notice", heard=notice, saved_since=saved), "azure")
        assert line.startswith(f"azure-notice: attempt 2 ignored its spot notice: {did} Remedy: ")
        [line] = said(Row(2, signalled, "SIGTERM", heard=signalled, saved_since=saved))
        assert line.startswith(f"runpod-signal: attempt 2 ignored its SIGTERM: {did} Remedy: ")
    assert said(Row(2, "finished", "finished", heard=signalled, saved_since=3, exit_code=0))
    for row in (
        Row(2, signalled, "SIGTERM", heard=signalled, saved_since=1),
        Row(2, signalled, "SIGTERM", heard=signalled, saved_since=0, exit_code=143),
        Row(2, signalled, "SIGTERM", heard=signalled),
        Row(2, "finished", "finished", heard=signalled, saved_since=0, exit_code=0),
        Row(2, "finished", "finished", heard=signalled, saved_since=2, exit_code=0, exited_early=True),
    ):
        assert said(row) == [], row


def test_each_kind_has_its_own_length() -> None:
    lengths = {kind: one.notice_s for kind, one in WARNED.items()}
    assert lengths == {
        "aws-notice": 120, "gcp-notice": 30, "azure-notice": 30, "runpod-signal": 5, "kill-after-30s": 30,
        "slurm-signal": 120, "sigterm": 45,
    }  # fmt: skip
    assert {one.cloud for one in WARNED.values() if one.signal is None} == set(SERVICES) == set(here.SOURCES)


def status(server: Metadata, path: str, headers: Mapping[str, str], method: str = "GET") -> int:
    request = urllib.request.Request(server.url + path, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


GCP, AZURE = "/computeMetadata/v1/instance/preempted", "/metadata/scheduledevents?api-version=2020-07-01"
AWS, TOKEN = "/latest/meta-data/spot/instance-action", "/latest/api/token"


@pytest.mark.parametrize(
    ("cloud", "path", "headers", "method", "code"),
    [
        ("aws", TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT", 200),
        ("aws", TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": "21601"}, "PUT", 400),
        ("aws", TOKEN, {}, "PUT", 400),
        ("aws", AWS, {"X-aws-ec2-metadata-token": AwsMetadata.token}, "GET", 200),
        ("aws", AWS, {"X-aws-ec2-metadata-token": "another"}, "GET", 401),
        ("aws", AWS, {}, "GET", 401),
        ("aws", "/latest/meta-data/other", {"X-aws-ec2-metadata-token": AwsMetadata.token}, "GET", 404),
        ("gcp", GCP, {"Metadata-Flavor": "Google"}, "GET", 200),
        ("gcp", GCP, {}, "GET", 403),
        ("gcp", GCP, {"Metadata-Flavor": "Google", "X-Forwarded-For": "1.2.3.4"}, "GET", 403),
        ("gcp", GCP + "/other", {"Metadata-Flavor": "Google"}, "GET", 404),
        ("azure", AZURE, {"Metadata": "true"}, "GET", 200),
        ("azure", AZURE, {"Metadata": "true"}, "POST", 200),
        ("azure", AZURE, {}, "GET", 400),
        ("azure", AZURE.partition("?")[0], {"Metadata": "true"}, "GET", 400),
        ("azure", "/metadata/other?api-version=2020-07-01", {"Metadata": "true"}, "GET", 404),
    ],
)
def test_a_service_is_as_strict_as_the_clouds_own(
    cloud: str, path: str, headers: dict[str, str], method: str, code: int
) -> None:
    with services(["aws", "gcp", "azure", "runpod"]) as servers:
        assert set(servers) == {"aws", "gcp", "azure"}
        server = servers[cloud]
        server.announce(60)
        assert status(server, path, headers, method) == code
        assert server.told == (code == 200 and method == "GET"), "only the notice itself is told"
        server.clear()
        if (path, code) == (AWS, 200):
            assert status(server, path, headers) == 404


@pytest.mark.parametrize("cloud", SERVICES)
def test_the_variables_of_a_service_name_its_cloud(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with services([cloud]) as servers:
        for variable in VARIABLES:
            monkeypatch.delenv(variable, raising=False)
        [(name, value)] = servers[cloud].env.items()
        monkeypatch.setenv(name, value)
        assert name_of_cloud() == cloud
        source = here.source_of(cloud)
        assert source
        assert source.ask() == []
        servers[cloud].announce(20)
        [announced] = source.ask()
        assert announced.takes_machine
        source.close()
