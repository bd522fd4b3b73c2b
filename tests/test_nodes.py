"""Several machines: two launchers on loopback, each with a HOME of its own, as SkyPilot starts them."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_hf
import warm
from support import PROGRAMS, Ended, clean_env, column, event, limit_variables, losses, weights

from skyspot.rehearsal.metadata import AwsMetadata
from trainer.launch.nodes import Nodes, NodesError, interface_of
from trainer.layout.events import read_events
from trainer.layout.names import RunPaths, list_attempts, list_checkpoints


def environment(home: Path, node: int, task: str, nodes: int = 2, **more: str) -> dict[str, str]:
    home.mkdir(parents=True, exist_ok=True)
    ips = "\n".join(f"127.0.0.{number + 1}" for number in range(nodes))
    return clean_env(
        HOME=str(home), SKYPILOT_NUM_NODES=str(nodes), SKYPILOT_NODE_RANK=str(node), SKYPILOT_NODE_IPS=ips,
        SKYPILOT_TASK_ID=task, OMP_NUM_THREADS="1", **more,
    )  # fmt: skip


@dataclass
class Cluster:
    """The launchers of one attempt, one a machine."""

    launchers: list[subprocess.Popen[str]]

    def end(self, timeout: float = 120) -> list[Ended]:
        """Wait for all; what each said."""
        said: list[Ended | None] = [None] * len(self.launchers)

        def wait(number: int) -> None:
            output = self.launchers[number].communicate(timeout=timeout)[0]
            said[number] = Ended(self.launchers[number].returncode, output)

        threads = [threading.Thread(target=wait, args=(number,)) for number in range(len(said))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended = [one for one in said if one]
        assert len(ended) == len(said), "a launcher did not end"
        return ended


def start(
    run_dir: Path, *args: object, task: str, processes: int = 1, nodes: Sequence[int] = (0, 1), **more: str
) -> Cluster:
    """Start faulty.py on both machines."""
    command = [sys.executable, "-m", "trainer.launch", "--processes", str(processes), "--grace", "20"]
    command += [str(PROGRAMS / "faulty.py"), "--dir", str(run_dir), "--peer-timeout", "30", *map(str, args)]
    return Cluster(
        [
            warm.Popen(
                command, env=environment(run_dir.parent / f"home-{node}", node, task, **more), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
            for node in nodes
        ]
    )  # fmt: skip


IMPATIENT = ("--constant", "training.lifecycle.CRASH_PATIENCE_S=1")


def await_true(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def codes(ended: list[Ended]) -> list[int]:
    return [one.code for one in ended]


@pytest.fixture
def task() -> str:
    """A task id of the test's own, and so a port of its own."""
    return f"sky-managed-{secrets.token_hex(4)}_nodes_1-0"


def assert_as(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    for key in ("lr", "order", "rng", "grad_norm", "samples"):
        assert column(one, key) == column(other, key), key
    assert weights(one)
    assert weights(one) == weights(other)


@pytest.mark.parametrize("processes", [1, 2])
def test_two_machines_train_as_one_with_as_many_processes(
    tmp_path: Path, undisturbed: Callable[[int], Path], task: str, processes: int
) -> None:
    run_dir = tmp_path / "run"
    ended = start(run_dir, task=task, processes=processes).end()
    assert codes(ended) == [0, 0], ended
    assert_as(undisturbed(2 * processes), run_dir)
    machines = event(run_dir, "machines")["machines"]
    assert isinstance(machines, list)
    assert len(set(machines)) == 2


def test_a_machine_that_is_lost_costs_the_attempt_and_not_the_run(
    tmp_path: Path, undisturbed: Callable[[int], Path], task: str
) -> None:
    run_dir = tmp_path / "run"
    first = start(run_dir, "--fault", "kill@6", "--fault-rank", 1, "--commit-first", *IMPATIENT, task=task).end()
    assert first[0].code == 75, first[0].output
    assert first[1].code == -signal.SIGKILL
    assert event(run_dir, "end")["cause"] == "peer-gone"
    second = start(run_dir, task=task).end()
    assert codes(second) == [0, 0], second
    assert event(run_dir, "restored")["step"] == 4
    assert_as(undisturbed(2), run_dir)


def test_an_exception_on_one_machine_ends_all_with_1(tmp_path: Path, task: str) -> None:
    """A collective fails on the others before the crashed rank has left: with 75 a bug would be retried for ever."""
    for rank in (0, 1):
        run_dir = tmp_path / f"run-{rank}"
        ended = start(run_dir, "--fault", "raise@3", "--fault-rank", rank, task=f"{task}{rank}").end()
        assert codes(ended) == [1, 1], ended
        assert "a bug of the program's own" in ended[rank].output
        assert event(run_dir, "end")["code"] == 1


def test_a_rank_that_dies_on_one_machine_ends_all_with_75(tmp_path: Path, task: str) -> None:
    ended = start(tmp_path / "run", "--fault", "die@3", "--fault-rank", 1, *IMPATIENT, task=task).end()
    assert codes(ended) == [75, 75], ended


@pytest.mark.parametrize(
    "leaves", [pytest.param(None, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow), 1]
)
def test_a_notice_on_one_machine_stops_all_at_one_boundary_and_both_hold(
    tmp_path: Path, task: str, leaves: int | None
) -> None:
    """The second machine is noticed. Where none is planted that leaves, both hold until the recorded deadline."""
    run_dir = tmp_path / "run"

    def begin(node: int, **env: str) -> Cluster:
        past_s = -1000 if node == leaves else 0.2
        more = ("--slow", 0.01, "--constant", f"attempt.ending.HOLD_PAST_DEADLINE_S={past_s}")
        return start(run_dir, "--steps", 4000, "--save-every", 4000, *more, task=task, nodes=[node], **env)

    def left_at(cluster: Cluster) -> float:
        cluster.launchers[0].wait(120)
        return time.time()

    with AwsMetadata() as server, ThreadPoolExecutor(2) as pool:
        noticed = begin(1, **server.env, SKYSPOT_NOTICE_POLL_S="0.1")
        clusters = [begin(0), noticed]
        leaving = [pool.submit(left_at, cluster) for cluster in clusters]
        await_true(lambda: list(run_dir.glob("attempts/*/metrics-*")))
        server.announce(15 if leaves is None else 120)
        await_true(lambda: event(run_dir, "end"))
        if leaves is not None:
            leaving[leaves].result()
            if leaves == 1:  # The first machine's end is the end of every hold.
                assert clusters[0].launchers[0].poll() is None
            clusters[1 - leaves].launchers[0].send_signal(signal.SIGTERM)
        left = [one.result() for one in leaving]
    assert [codes(cluster.end()) for cluster in clusters] == [[75], [75]]
    end, heard = event(run_dir, "end"), event(run_dir, "notice")
    assert (end["cause"], end["committed_step"]) == ("notice", end["step"])
    assert heard["id"] == end["notice"]["id"]  # type: ignore[index]
    assert str(heard["id"]).startswith("aws/20"), "the other machine's: its next attempt ignores it"
    held = [at >= float(str(heard["deadline"])) for at in left]
    assert held == [leaves is None] * 2, (left, heard)


def test_a_signal_on_one_machine_stops_all_at_one_boundary_and_loses_no_step(
    tmp_path: Path, undisturbed: Callable[[int], Path], task: str
) -> None:
    run_dir = tmp_path / "run"
    ended = start(run_dir, "--fault", "sigterm@6", "--fault-rank", 1, task=task).end()
    assert codes(ended) == [75, 75], ended
    end = event(run_dir, "end")
    assert end["cause"] == "signal"
    assert end["committed_step"] == end["step"]
    assert codes(start(run_dir, task=task).end()) == [0, 0]
    assert event(run_dir, "restored")["lost_steps"] == 0
    assert_as(undisturbed(2), run_dir)


@pytest.mark.slow
def test_at_a_limit_two_machines_leave_with_79_and_go_on_once_it_is_raised(
    tmp_path: Path, undisturbed: Callable[[int], Path], task: str
) -> None:
    run_dir, spend = tmp_path / "run", limit_variables(max_spend=900)
    quick = ("--constant", "training.journal.LOOK_S=0.1")
    reached = start(run_dir, "--fault", "limit@6", *quick, task=task, **spend).end()
    assert codes(reached) == [79, 79], reached
    end, limit = event(run_dir, "end"), event(run_dir, "limit")
    assert (end["code"], end["cause"], end["step"]) == (79, "max-spend", end["committed_step"])
    assert (limit["nodes"], limit["usd_per_hour"]) == (2, 3600.0)
    again = start(run_dir, task=task, **spend).end()
    assert codes(again) == [79, 79], again
    assert "not started: the spend limit allows no more than a last save" in again[0].output
    assert not event(run_dir, "restored")
    assert codes(start(run_dir, task=task, **limit_variables(max_spend=9000)).end()) == [0, 0]
    assert event(run_dir, "restored")["step"] == end["step"]
    assert_as(undisturbed(2), run_dir)


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_all_machines(tmp_path: Path, task: str) -> None:
    run_dir = tmp_path / "run"
    lone = start(run_dir, task=task, nodes=[1])
    time.sleep(0.1)
    rest = start(run_dir, "--fault", "sigterm@0", "--fault-rank", 0, task=task, nodes=[0])
    ended = [*rest.end(), *lone.end()]
    assert codes(ended) == [75, 75], ended


def test_an_older_attempt_that_is_still_alive_is_not_joined(
    tmp_path: Path, undisturbed: Callable[[int], Path], task: str
) -> None:
    """Its store answers at the same address: the new ranks wait for their own, and the old attempt stops itself."""
    run_dir = tmp_path / "run"
    old = start(run_dir, "--fault", "await-newer@6", "--constant", "training.journal.LOOK_S=1", task=task)
    await_true(lambda: list_checkpoints(RunPaths(run_dir)))
    new = start(run_dir, task=task)
    assert codes(new.end()) == [0, 0]
    assert codes(old.end()) == [76, 76]
    names = list_attempts(RunPaths(run_dir))
    assert [name.number for name in names] == [1, 2]
    assert [one.name for one in read_events(RunPaths(run_dir), names[0]) if one.name == "end"] == ["end"]
    assert_as(undisturbed(2), run_dir)


@pytest.mark.slow
def test_a_save_that_finds_a_newer_attempt_ends_all_machines_with_76(tmp_path: Path, task: str) -> None:
    """The other machine is waiting for the first in a collective by then; a lost peer would have it come back."""
    run_dir = tmp_path / "run"
    newer = ("--fault", "outnumber:state-written@1", "--slow-save", "0.5", "--late-check")
    ended = start(run_dir, *newer, *IMPATIENT, task=task).end()
    assert codes(ended) == [76, 76], ended
    assert event(run_dir, "end", -2)["cause"] == "superseded"
    assert not list(run_dir.glob("checkpoints/*/MANIFEST.json"))


OLD_STORE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
for rank in range(2):
    store.add(f"seat/{rank}", 1)
store.set("seats", sys.argv[2])
print("serving", flush=True)
while store.add("seat/1", 0) < 2:
    time.sleep(0.02)
print("asked for the seat", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_store_of_an_older_attempt_is_left_alone(tmp_path: Path, task: str) -> None:
    """It still answers where the new rank 0 will: all its seats are taken."""
    nodes = Nodes(2, 0, ("127.0.0.1", "127.0.0.2"), task)
    seats = json.dumps({"start": nodes.start, "world_size": 2, "random": "an older attempt's"})
    old = subprocess.Popen([sys.executable, "-c", OLD_STORE, str(nodes.port), seats], text=True, stdout=subprocess.PIPE)
    assert old.stdout
    assert old.stdout.readline() == "serving\n"
    new = start(tmp_path / "run", task=task)
    assert old.stdout.readline() == "asked for the seat\n"
    old.kill()
    old.communicate()
    ended = new.end()
    assert codes(ended) == [0, 0], ended


def test_a_port_that_stays_in_use_ends_the_attempt_with_75(tmp_path: Path, task: str) -> None:
    nodes = Nodes(2, 0, ("127.0.0.1", "127.0.0.2"), task)
    with socket.create_server(("", nodes.port)):
        ended = start(tmp_path / "run", "--bind-patience", 1, task=task, nodes=[0]).end()
    assert codes(ended) == [75], ended
    assert f"port {nodes.port} has been in use" in str(event(tmp_path / "run", "end")["error"])


def test_a_machine_without_the_mount_ends_all_and_writes_nothing(tmp_path: Path, task: str) -> None:
    run_dir = tmp_path / "run"
    not_mounted = tmp_path / "not-mounted"
    not_mounted.mkdir()
    first = start(run_dir, task=task, nodes=[0])
    second = start(run_dir, task=task, nodes=[1], SKYSPOT_MOUNT=str(not_mounted))
    ended = [*first.end(), *second.end()]
    assert codes(ended) == [1, 1], ended
    assert "no bucket is mounted there" in ended[1].output
    assert not (run_dir / "checkpoints").exists()
    assert list(not_mounted.iterdir()) == []


def test_a_first_machine_without_the_mount_ends_all_too(tmp_path: Path, task: str) -> None:
    run_dir = tmp_path / "run"
    not_mounted = tmp_path / "not-mounted"
    not_mounted.mkdir()
    second = start(run_dir, task=task, nodes=[1])
    first = start(run_dir, task=task, nodes=[0], SKYSPOT_MOUNT=str(not_mounted))
    ended = [*first.end(), *second.end()]
    assert codes(ended) == [1, 1], ended
    assert "no bucket is mounted there" in ended[0].output
    assert not run_dir.exists()


def test_a_machine_that_sees_another_bucket_ends_all_and_writes_nothing(tmp_path: Path, task: str) -> None:
    (tmp_path / "other").mkdir()
    first = start(tmp_path / "run", task=task, nodes=[0])
    second = start(tmp_path / "other" / "run", "--constant", "training.opening.SEE_ATTEMPT_S=1", task=task, nodes=[1])
    ended = [*first.end(), *second.end()]
    assert codes(ended) == [1, 1], ended
    assert "Mount the same bucket and folder on all machines" in ended[1].output
    assert not (tmp_path / "other" / "run").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_machines_that_run_unequal_numbers_of_processes_are_refused(tmp_path: Path, task: str) -> None:
    first = start(tmp_path / "run", task=task, nodes=[0])
    impatient = ("--constant", "ranks.rendezvous.UNEQUAL_PATIENCE_S=0.5")
    second = start(tmp_path / "run", *impatient, task=task, nodes=[1], processes=2)
    ended = [*first.end(), *second.end()]
    assert codes(ended) == [1, 1], ended
    assert "node 0 expects 2 processes in total, node 1 expects 4" in ended[1].output


def test_a_run_that_is_asked_to_stop_before_its_first_step_ends_on_all_machines(tmp_path: Path, task: str) -> None:
    run_dir = tmp_path / "run"
    cluster = start(run_dir, "--prepare", 60, "--constant", "training.participant.LOOK_AT_BUCKET_S=0.2", task=task)
    await_true(lambda: event(run_dir, "machines") if run_dir.exists() else None)
    (run_dir / "stop").mkdir()
    RunPaths(run_dir).stop(task).touch()
    assert codes(cluster.end()) == [79, 79]
    assert event(run_dir, "end")["cause"] == "stop-request"


def test_a_run_that_is_asked_to_stop_holds_on_all_machines(tmp_path: Path, task: str) -> None:
    run_dir = tmp_path / "run"
    cluster = start(run_dir, "--fault", "stop@3", "--constant", "training.journal.LOOK_S=0.2", task=task)
    await_true(lambda: event(run_dir, "end") if list(run_dir.glob("attempts/a*")) else None)
    assert [launcher.poll() for launcher in cluster.launchers] == [None, None]
    for launcher in cluster.launchers:
        launcher.send_signal(signal.SIGTERM)
    assert codes(cluster.end()) == [79, 79]
    end = event(run_dir, "end")
    assert (end["code"], end["committed_step"]) == (79, end["step"])


PLAIN = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
rows = torch.zeros(dist.get_world_size())
rows[dist.get_rank()] = int(os.environ["NODE_RANK"])
dist.all_reduce(rows)
print("nodes", rows.int().tolist(), flush=True)
dist.destroy_process_group()
"""


def test_a_plain_torch_script_finds_the_other_machines(tmp_path: Path, task: str) -> None:
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", str(script)]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    cluster = Cluster(
        [warm.Popen(command, env=environment(tmp_path / str(node), node, task), **pipes) for node in (0, 1)]
    )
    ended = cluster.end()
    assert codes(ended) == [0, 0], ended
    assert [one.output.strip() for one in ended] == ["nodes [0, 1]"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("group", ["before", "inside"])
def test_a_script_makes_its_own_group_over_several_machines(tmp_path: Path, task: str, group: str) -> None:
    """Its group and ours meet at one port, whichever comes first."""
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", str(PROGRAMS / "launched.py")]
    command += ["--dir", str(tmp_path / "run"), "--group", group]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    cluster = Cluster(
        [warm.Popen(command, env=environment(tmp_path / str(node), node, task), **pipes) for node in (0, 1)]
    )
    ended = cluster.end()
    assert codes(ended) == [0, 0], ended
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))


@pytest.mark.slow
def test_hugging_faces_trainer_resumes_exactly_over_two_machines(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, task: str
) -> None:
    """Each machine has a local disk of its own, to which its rank writes its files."""
    args = ("--log", "2", "--evaluate", "epoch", "--masks")
    whole, run_dir = test_hf.undisturbed(tmp_path_factory, *args, processes=2), tmp_path / "run"
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", str(test_hf.SCRIPT), "--dir", str(run_dir)]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    def attempt(*more: str) -> list[Ended]:
        homes = [tmp_path / f"home-{node}" for node in (0, 1)]
        environments = [environment(home, node, task, TMPDIR=str(home)) for node, home in enumerate(homes)]
        return Cluster([warm.Popen([*command, *args, *more], env=env, **pipes) for env in environments]).end(300)

    stopped = attempt("--strike", "6:SIGTERM")
    assert codes(stopped) == [75, 75], stopped
    end = event(run_dir, "end")
    assert (end["cause"], end["committed_step"]) == ("signal", 6), "no step is lost"
    ended = attempt()
    assert codes(ended) == [0, 0], ended
    assert event(run_dir, "restored")["step"] == 6
    assert losses(run_dir) == losses(whole)
    assert weights(run_dir) == weights(whole)
    said = (whole.parent / "output.txt").read_text()
    assert test_hf.logged(ended[0].output) == test_hf.logged(said)
    assert test_hf.logged(said)


def test_a_script_that_several_machines_start_without_the_launcher_is_refused(tmp_path: Path, task: str) -> None:
    command = [sys.executable, str(PROGRAMS / "mlp.py"), "--dir", str(tmp_path / "run")]
    done = warm.run(command, env=environment(tmp_path / "home", 1, task), capture_output=True, text=True)
    assert done.returncode == 1
    assert "python -m trainer.launch" in done.stderr
    assert not (tmp_path / "run").exists()


# -- what SkyPilot says ------------------------------------------------------------------------------------------------


def test_the_machines_are_read_from_skypilots_variables() -> None:
    env = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n"}
    found = Nodes.from_env({**env, "SKYPILOT_TASK_ID": "t"})
    assert (found.count, found.rank, found.ips, found.several, found.leads) == (
        2, 1, ("10.0.0.4", "10.0.0.5"), True, False,
    )  # fmt: skip
    assert 20000 <= found.port < 30000
    assert Nodes.from_env({}) == Nodes()
    assert not Nodes.from_env({"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}).several
    for wrong in ({"SKYPILOT_NODE_RANK": "2"}, {"SKYPILOT_NODE_IPS": "10.0.0.4"}, {"SKYPILOT_NUM_NODES": "two"}):
        with pytest.raises(NodesError):
            Nodes.from_env({**env, **wrong})


def test_the_interface_of_an_address_is_found() -> None:
    if os.uname().sysname == "Linux":
        assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
