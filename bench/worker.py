"""Runs each way to save in a process of its own, so that no way sees another's memory; they take turns."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.cgroup import Group

MODULES = ["torch", "torch._dynamo", "bench.ours", "bench.peers"]
"""Loaded once, before the processes are forked."""
SAVERS = {
    "skyspot": "ours.Ours",
    "torch.save + fsync": "peers.TorchSave",
    "accelerate.save_state": "peers.AccelerateSave",
    "DCP save": "peers.DcpSave",
    "DCP async_save": "peers.DcpAsync",
    "DCP async_save, own stager": "peers.DcpAsyncStaged",
}
LOADERS = {
    "skyspot": ("skyspot", "ours.load"),
    "torch.load": ("torch.save + fsync", "peers.load_torch"),
    "torch.load, mmap": ("torch.save + fsync", "peers.load_torch_mapped"),
    "accelerate.load_state": ("accelerate.save_state", "peers.load_accelerate"),
    "DCP load": ("DCP save", "peers.load_dcp"),
}
"""By name: the way to save whose checkpoint is loaded, and the function that loads it."""
MOST_STEPS = 40
"""Maximum number of steps trained beside one save; a longer save is waited for."""


class WorkerError(Exception):
    """A worker ended with an error; the message is its traceback."""


class Worker:
    """A process that answers one request at a time."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, serve, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, request: str = "", *arguments: Any) -> Any:
        """Send a request; returns the answer.

        Raises:
            WorkerError: there was an error, or the process was killed.
        """
        try:
            with suppress(BrokenPipeError):
                self._pipe.send((request, arguments))
            answer, trouble = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(f"killed by signal {-(self._process.exitcode or 0)}") from None
        if trouble:
            raise WorkerError(trouble)
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        serving = make(*arguments)
        while True:
            request, more = pipe.recv()
            pipe.send((getattr(serving, request)(*more), None))
    except EOFError:
        pass
    except BaseException:
        with suppress(OSError):
            pipe.send((None, traceback.format_exc()))
    finally:
        os._exit(0)  # There is nothing to clean up, and freeing gigabytes takes a while.


def _named(name: str) -> Any:
    module, _, attribute = name.partition(".")
    return getattr(__import__(f"bench.{module}", fromlist=[attribute]), attribute)


class Saving:
    """A training that saves in one way."""

    def __init__(self, way: str, folder: Path, state_bytes: int, threads: int, group: Group | None = None) -> None:
        from bench.training import Training, keep_freed_memory

        if group:
            group.enter()
        keep_freed_memory()
        self.training = Training(state_bytes, threads)
        self.saver = _named(SAVERS[way])(folder, self.training)
        self.count = 0
        self.peak_without = 0

    def calibrate(self, seconds: float) -> int:
        """Choose the batch with which forward and backward last at least `seconds`."""
        return self.training.calibrate(seconds)

    def warm(self, batch: int) -> dict[str, float]:
        """Train without saving; returns the seconds of the fastest `forward_backward` and of an average `step`."""
        self.training.batch = batch
        for _ in range(2):
            self.training.step()
        reset_peak()
        took, begun = [], time.perf_counter()
        for _ in range(3):
            took.append(self.training.step())
        step_s = (time.perf_counter() - begun) / len(took)
        self.peak_without = peak_bytes()
        reset_peak()
        return {"forward_backward": min(took), "step": step_s}

    def first(self) -> tuple[float, int]:
        """Save for the first time; returns (seconds that training was blocked, steps trained beside the save)."""
        if prepare := getattr(self.saver, "prepare", None):  # skyspot: after an attempt's first step.
            prepare()
            self.training.step()
        stall_s, steps = self._save_beside(None)
        self.saver.settle()
        self.saver.clear()
        return stall_s, steps

    def _save_beside(self, steps: int | None) -> tuple[float, int]:
        """Save while training `steps` steps, or until the save is over; returns (seconds blocked, steps trained)."""
        self.count += 1
        stalled = 0.0

        def timed(wait: Callable[[], None]) -> None:
            nonlocal stalled
            begun = time.perf_counter()
            wait()
            stalled += time.perf_counter() - begun

        timed(lambda: self.saver.save(self.count))
        self.training.step(lambda: timed(self.saver.before_step))
        done = 1
        while done < steps if steps is not None else done < MOST_STEPS and not self.saver.over():
            self.training.step()
            done += 1
        return stalled, done

    def round(self, steps: int, save_first: bool) -> dict[str, float]:
        """Train `steps` steps with a save and as many without; returns seconds: `stall`, `lost`, `cpu` and `step`."""
        found = {}
        for saves in (True, False) if save_first else (False, True):
            cpu, begun = time.process_time(), time.perf_counter()
            if saves:
                found["stall"], _ = self._save_beside(steps)
                self.saver.settle()
            else:
                for _ in range(steps):
                    self.training.step()
            found[f"wall_{saves}"], found[f"cpu_{saves}"] = time.perf_counter() - begun, time.process_time() - cpu
            self.saver.settle()
            self.saver.clear()
        return {
            "stall": found["stall"],
            "lost": found["wall_True"] - found["wall_False"],
            "cpu": found["cpu_True"] - found["cpu_False"],
            "step": found["wall_False"] / steps,
        }

    def commit(self) -> float:
        """Seconds until a save is durable, with training idle."""
        self.count += 1
        begun = time.perf_counter()
        self.saver.save(self.count)
        self.saver.durable()
        took = time.perf_counter() - begun
        self.saver.settle()
        self.saver.clear()
        return took

    def kept(self) -> tuple[Path, str]:
        """(path of the newest checkpoint, digest of the saved state)."""
        return self.saver.kept(), self.training.digest()

    def extra_bytes(self) -> int | None:
        """Peak memory since the first save, minus the peak while training without saves; None if it is unknown."""
        return peak_bytes() - self.peak_without if peak_bytes() else None

    def limit_memory(self, group: Group, spare_bytes: int) -> None:
        """Limit this process's memory to `spare_bytes` more than it has now."""
        group.limit(spare_bytes)

    def printed(self) -> list[str]:
        """The lines printed for the user."""
        return list(self.saver.printed)


class Loading:
    """A new model, into which a checkpoint is loaded once."""

    def __init__(self, way: str, state_bytes: int) -> None:
        from bench.training import Training

        self.load = _named(LOADERS[way][1])
        self.training = Training(state_bytes, os.cpu_count() or 1)

    def once(self, place: Path, digest: str) -> tuple[float, float | None]:
        """Load; returns (seconds until the model could train, seconds of the load alone if measured)."""
        begun = time.perf_counter()
        alone_s = self.load(place, self.training)
        took = time.perf_counter() - begun
        assert self.training.digest() == digest, f"{place}: what was loaded is not what was saved"
        return took, alone_s


def reset_peak() -> None:
    """Reset the peak of this process's memory to what it has now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak of this process's memory in bytes; 0 if the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def prepare() -> None:
    """Load what the workers need once, in the process that they are forked from."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    multiprocessing.get_context("forkserver").set_forkserver_preload(MODULES)
