"""Several machines: two launchers on loopback, each with a HOME of its own, as SkyPilot starts them."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import PROGRAMS, Ended, clean_env, column, event, losses, mlp, weights

from trainer.layout import RunPaths, list_attempts, list_checkpoints, read_events
from trainer.nodes import Nodes, NodesError, interface_of


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
    """Start mlp.py on both machines."""
    command = [sys.executable, "-m", "trainer.launch", "--processes", str(processes), "--grace", "20"]
    command += [str(PROGRAMS / "mlp.py"), "--dir", str(run_dir), "--peer-timeout", "30", *map(str, args)]
    return Cluster(
        [
            subprocess.Popen(
                command, env=environment(run_dir.parent / f"home-{node}", node, task, **more), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
            for node in nodes
        ]
    )  # fmt: skip


def codes(ended: list[Ended]) -> list[int]:
    return [one.code for one in ended]


@pytest.fixture
def task() -> str:
    """A task id of the test's own, and so a port of its own."""
    return f"sky-managed-{secrets.token_hex(4)}_nodes_1-0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Undisturbed runs on one machine, by number of processes."""
    found = {}
    for processes in (2, 4):
        found[processes] = tmp_path_factory.mktemp(f"whole-{processes}") / "run"
        assert mlp(found[processes], processes=processes, env=clean_env(OMP_NUM_THREADS="1")).code == 0
    return found


def assert_as(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    for key in ("lr", "order", "rng", "grad_norm", "samples"):
        assert column(one, key) == column(other, key), key
    assert weights(one)
    assert weights(one) == weights(other)


@pytest.mark.parametrize("processes", [1, 2])
def test_two_machines_train_as_one_with_as_many_processes(
    tmp_path: Path, whole: dict[int, Path], task: str, processes: int
) -> None:
    run_dir = tmp_path / "run"
    ended = start(run_dir, task=task, processes=processes).end()
    assert codes(ended) == [0, 0], ended
    assert_as(whole[2 * processes], run_dir)
    machines = event(run_dir, "machines")["machines"]
    assert isinstance(machines, list)
    assert len(set(machines)) == 2


def test_a_machine_that_is_lost_costs_the_attempt_and_not_the_run(
    tmp_path: Path, whole: dict[int, Path], task: str
) -> None:
    run_dir = tmp_path / "run"
    first = start(run_dir, "--fault", "kill@6", "--fault-rank", 1, "--commit-first", task=task).end()
    assert first[0].code == 75, first[0].output
    assert first[1].code == -signal.SIGKILL
    assert event(run_dir, "end")["cause"] == "peer-gone"
    second = start(run_dir, task=task).end()
    assert codes(second) == [0, 0], second
    assert event(run_dir, "restored")["step"] == 4
    assert_as(whole[2], run_dir)


def test_an_exception_on_one_machine_ends_all_with_1(tmp_path: Path, task: str) -> None:
    """A collective fails on the others before the crashed rank has left: with 75 a bug would be retried for ever."""
    for number in range(3):
        for rank in (0, 1):
            run_dir = tmp_path / f"run-{number}-{rank}"
            ended = start(run_dir, "--fault", "raise@3", "--fault-rank", rank, task=f"{task}{number}{rank}").end()
            assert codes(ended) == [1, 1], ended
            assert "a bug of the program's own" in ended[rank].output
            assert event(run_dir, "end")["code"] == 1


def test_a_signal_on_one_machine_stops_all_at_one_boundary_and_loses_no_step(
    tmp_path: Path, whole: dict[int, Path], task: str
) -> None:
    run_dir = tmp_path / "run"
    ended = start(run_dir, "--fault", "sigterm@6", "--fault-rank", 1, task=task).end()
    assert codes(ended) == [75, 75], ended
    end = event(run_dir, "end")
    assert end["cause"] == "signal"
    assert end["committed_step"] == end["step"]
    assert codes(start(run_dir, task=task).end()) == [0, 0]
    assert event(run_dir, "restored")["lost_steps"] == 0
    assert_as(whole[2], run_dir)


def test_a_signal_before_the_first_step_ends_all_machines(tmp_path: Path, task: str) -> None:
    run_dir = tmp_path / "run"
    lone = start(run_dir, task=task, nodes=[1])
    time.sleep(0.1)
    rest = start(run_dir, "--fault", "sigterm@0", "--fault-rank", 0, task=task, nodes=[0])
    ended = [*rest.end(), *lone.end()]
    assert codes(ended) == [75, 75], ended


def test_an_older_attempt_that_is_still_alive_is_not_joined(tmp_path: Path, whole: dict[int, Path], task: str) -> None:
    """Its store answers at the same address: the new ranks wait for their own, and the old attempt stops itself."""
    run_dir = tmp_path / "run"
    old = start(run_dir, "--steps", 12, "--slow", "0.5", task=task)
    end = time.monotonic() + 60
    while not list_checkpoints(RunPaths(run_dir)):
        assert time.monotonic() < end
        time.sleep(0.05)
    new = start(run_dir, task=task)
    assert codes(new.end()) == [0, 0]
    assert codes(old.end()) == [76, 76]
    names = list_attempts(RunPaths(run_dir))
    assert [name.number for name in names] == [1, 2]
    assert [one.name for one in read_events(RunPaths(run_dir), names[0]) if one.name == "end"] == ["end"]
    assert_as(whole[2], run_dir)


OLD_STORE = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
store.set("token", "an old attempt's")
for rank in range(2):
    store.add(f"seat/{rank}", 1)
print("serving", flush=True)
while store.add("seat/1", 0) < 2:
    time.sleep(0.02)
print("asked for the seat", flush=True)
time.sleep(600)
"""


def test_a_store_of_an_older_attempt_is_left_alone(tmp_path: Path, task: str) -> None:
    """It still answers where the new rank 0 will: all its seats are taken."""
    port = Nodes(2, 0, ("127.0.0.1", "127.0.0.2"), task).port
    old = subprocess.Popen([sys.executable, "-c", OLD_STORE, str(port)], text=True, stdout=subprocess.PIPE)
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
