"""What a rehearsal shows of a failed attempt's output: the error that is the cause, and the user's own line."""

import pytest

from skyspot.rehearsal.excerpt import read_excerpt

MACHINE = "/tmp/skyspot-rehearsal-1/preempted/machine-02"
WORK = f"{MACHINE}/home/sky_workdir"
SITE = "/opt/venv/lib/python3.11/site-packages"

TORCHRUN = f"""\
W1129 12:15:09.863000 23062 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 23333 closing signal SIGTERM
E1129 12:15:09.941000 23062 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: EXIT) local_rank: 1 (pid: 23334) of binary: /opt/venv/bin/python
Traceback (most recent call last):
  File "/opt/venv/bin/torchrun", line 8, in <module>
    sys.exit(main())
             ^^^^^^
  File "{SITE}/torch/distributed/elastic/multiprocessing/errors/__init__.py", line 367, in wrapper
    return f(*args, **kwargs)
           ^^^^^^^^^^^^^^^^^^
  File "{SITE}/torch/distributed/run.py", line 1028, in main
    run(args)
  File "{SITE}/torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-29_12:15:09
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 23333)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 23333
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_12:15:09
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : EXIT (pid: 23334) SIGNAL
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""  # noqa: E501, W291 (as torch 2.13 prints it)
OMP = """\
W1129 12:15:02.698000 23062 torch/distributed/run.py:874] 
W1129 12:15:02.698000 23062 torch/distributed/run.py:874] *****************************************
W1129 12:15:02.698000 23062 torch/distributed/run.py:874] Setting OMP_NUM_THREADS environment variable for each process
W1129 12:15:02.698000 23062 torch/distributed/run.py:874] *****************************************
"""  # noqa: W291
RANK_0_LOSES_ITS_PEER = f"""\
[rank0]: Traceback (most recent call last):
[rank0]:   File "{WORK}/train.py", line 8, in <module>
[rank0]:     step()
[rank0]:   File "{SITE}/torch/distributed/distributed_c10d.py", line 5356, in barrier
[rank0]:     work.wait()
[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:65200. Check the logs.
"""
RANK_1_FAILS = f"""\
[rank1]: Traceback (most recent call last):
[rank1]:   File "{WORK}/train.py", line 8, in <module>
[rank1]:     step()
[rank1]:   File "{WORK}/train.py", line 6, in step
[rank1]:     raise RuntimeError("the learning rate is negative")
[rank1]: RuntimeError: the learning rate is negative
"""
RANK_1 = (
    "rank 1: RuntimeError: the learning rate is negative",
    '  train.py, line 6, in step: raise RuntimeError("the learning rate is negative")',
)
PLAIN = f"""\
Traceback (most recent call last):
  File "{WORK}/train.py", line 4, in <module>
    load("ckpt.pt")
  File "{WORK}/lib/state.py", line 3, in load
    return torch.load(path)["model"]
           ^^^^^^^^^^^^^^^^
  File "{SITE}/torch/serialization.py", line 1501, in load
    with _open_file_like(f, "rb") as opened_file:
  File "/usr/lib/python3.11/zipfile.py", line 1302, in __init__
    self._RealGetContents()
RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory
"""
CAUSE = (
    "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
    '  lib/state.py, line 3, in load: return torch.load(path)["model"]',
)
ACCELERATE = f"""\
Traceback (most recent call last):
  File "/opt/venv/bin/accelerate", line 8, in <module>
    sys.exit(main())
             ^^^^^^
  File "{SITE}/accelerate/commands/launch.py", line 999, in simple_launcher
    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=cmd)
subprocess.CalledProcessError: Command '['/opt/venv/bin/python', 'train.py']' returned non-zero exit status 1.
"""
ACCELERATE_DEFAULTS = """\
The following values were not passed to `accelerate launch` and had defaults used instead:
\t`--num_machines` was set to a value of `1`
To avoid this warning pass in values for each of the problematic parameters or run `accelerate config`.
"""
CHAIN = f"""\
Traceback (most recent call last):
  File "{WORK}/train.py", line 4, in <module>
    a()
  File "{WORK}/train.py", line 2, in a
    raise KeyError("step")
KeyError: 'step'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "{WORK}/train.py", line 6, in <module>
    raise ValueError("not a checkpoint") from e
ValueError: not a checkpoint
"""
WORKER = f"""\
Traceback (most recent call last):
  File "{WORK}/train.py", line 9, in <module>
    for batch in loader:
  File "{SITE}/torch/utils/data/dataloader.py", line 708, in __next__
    data = self._next_data()
IndexError: Caught IndexError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "{SITE}/torch/utils/data/_utils/worker.py", line 349, in _worker_loop
    data = fetcher.fetch(index)
  File "{WORK}/data.py", line 6, in __getitem__
    raise IndexError("no sample 7")
IndexError: no sample 7

"""
KILLED_WORKER = f"""\
Traceback (most recent call last):
  File "{SITE}/torch/utils/data/dataloader.py", line 1291, in _try_get_data
    data = self._data_queue.get(timeout=timeout)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "{SITE}/torch/utils/data/_utils/signal_handling.py", line 73, in handler
    _error_if_any_worker_fails()
RuntimeError: DataLoader worker (pid 5541) is killed by signal: Terminated.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "{WORK}/train.py", line 7, in <module>
    for batch in loader:
  File "{SITE}/torch/utils/data/dataloader.py", line 1304, in _try_get_data
    raise RuntimeError(
RuntimeError: DataLoader worker (pid(s) 5541) exited unexpectedly
"""
SPAWN = f"""\
W1129 12:39:13.990000 6119 torch/multiprocessing/spawn.py:165] Terminating process 7213 via signal SIGTERM
Traceback (most recent call last):
  File "{WORK}/train.py", line 7, in <module>
    mp.spawn(f, nprocs=2)
  File "{SITE}/torch/multiprocessing/spawn.py", line 211, in join
    raise ProcessRaisedException(msg, error_index, failed_process.pid)
torch.multiprocessing.spawn.ProcessRaisedException: 

-- Process 1 terminated with the following error:
Traceback (most recent call last):
  File "{SITE}/torch/multiprocessing/spawn.py", line 87, in _wrap
    fn(i, *args)
  File "{WORK}/train.py", line 4, in f
    raise ValueError("negative")
ValueError: negative

"""  # noqa: W291
FUTURES = f"""\
concurrent.futures.process._RemoteTraceback: 
\"\"\"
Traceback (most recent call last):
  File "/usr/lib/python3.11/concurrent/futures/process.py", line 261, in _process_worker
    r = call_item.fn(*call_item.args, **call_item.kwargs)
  File "{WORK}/prepare.py", line 3, in f
    return 1 // x
           ~~^^~~
ZeroDivisionError: integer division or modulo by zero
\"\"\"

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "{WORK}/prepare.py", line 6, in <module>
    print(list(pool.map(f, [1, 0])))
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 401, in __get_result
    raise self._exception
ZeroDivisionError: integer division or modulo by zero
"""  # noqa: W291
STATE_DICT = f"""\
Traceback (most recent call last):
  File "{WORK}/train.py", line 12, in main
    model.load_state_dict(state)
  File "{SITE}/torch/nn/modules/module.py", line 2593, in load_state_dict
    raise RuntimeError(
RuntimeError: Error(s) in loading state_dict for Linear:
\tsize mismatch for weight: copying a param with shape torch.Size([2, 2]) from checkpoint.
\tMissing key(s) in state_dict: "bias".
"""
RICH = f"""\
╭───────────────────── Traceback (most recent call last) ──────────────────────╮
│ {WORK}/train.py:8 in <module>            │
│                                                                              │
│    7                                                                         │
│ ❱  8 main()                                                                  │
│                                                                              │
│ {WORK}/train.py:5 in main                │
│                                                                              │
│    4 │   rate = -1                                                           │
│ ❱  5 │   raise ValueError("negative")                                        │
╰──────────────────────────────────────────────────────────────────────────────╯
ValueError: negative
"""
GROUP = f"""\
  + Exception Group Traceback (most recent call last):
  |   File "{WORK}/train.py", line 1, in <module>
  |     raise ExceptionGroup("all readers failed", [ValueError("1"), KeyError("2")])
  | ExceptionGroup: all readers failed (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: 1
    +---------------- 2 ----------------
    | KeyError: '2'
    +------------------------------------
"""
FAULTHANDLER = f"""\
Fatal Python error: Segmentation fault

Current thread 0x00007f8d95e74b80 (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at
  File "{WORK}/train.py", line 7 in step
{MACHINE}/run.sh: line 2: 27747 Segmentation fault      python train.py
"""
CPP = f"""\
terminate called after throwing an instance of 'c10::Error'
  what():  CUDA driver error: unknown error
Exception raised from run at ../c10/driver.cpp:9 (most recent call first):
frame #0: c10::Error::Error + 0x96

{MACHINE}/run.sh: line 2: 9 Aborted                 (core dumped) python train.py
"""
NO_NCCL = f"""\
Traceback (most recent call last):
  File "{WORK}/train.py", line 3, in <module>
    dist.init_process_group("nccl")
  File "{SITE}/torch/distributed/distributed_c10d.py", line 2181, in _new_process_group_helper
    raise RuntimeError("Distributed package doesn't have NCCL built in")
RuntimeError: Distributed package doesn't have NCCL built in
"""
NO_GPUS = NO_NCCL.replace(
    "RuntimeError: Distributed package doesn't have NCCL built in",
    "ValueError: ProcessGroupNCCL is only supported with GPUs, no GPUs found!",
)
NCCL_CALL = '  train.py, line 3: dist.init_process_group("nccl")'
NCCL_REMEDY = '  NCCL needs a GPU: init_process_group("nccl" if torch.cuda.is_available() else "gloo") needs none'
MPI = """\
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
"""
MPI_KILLED = """\
--------------------------------------------------------------------------
mpirun noticed that process rank 1 with PID 4712 on node here exited on signal 9 (Killed).
--------------------------------------------------------------------------
"""


def torchrun(exit_code: str = "1", signal: str = "") -> str:
    return TORCHRUN.replace("EXIT", exit_code).replace("SIGNAL", signal)


def steps(count: int) -> str:
    return "".join(f"step {number}: loss {1 / number:.3f}\n" for number in range(1, count + 1))


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        pytest.param(PLAIN, CAUSE, id="the deepest line that is the user's own"),
        pytest.param(steps(50) + PLAIN, CAUSE, id="after progress"),
        pytest.param(PLAIN.replace("\n", "\r\n"), CAUSE, id="a terminal's line ends"),
        pytest.param("\x1b[31m" + PLAIN.replace("\n", "\x1b[0m\n\x1b[31m"), CAUSE, id="in colour"),
        pytest.param(OMP + RANK_1_FAILS + RANK_0_LOSES_ITS_PEER + torchrun(), RANK_1, id="torchrun"),
        pytest.param(OMP + RANK_0_LOSES_ITS_PEER + RANK_1_FAILS + torchrun(), RANK_1, id="the peer's loss comes first"),
        pytest.param(RANK_1_FAILS + steps(3) + RANK_0_LOSES_ITS_PEER + torchrun(), RANK_1, id="rank 0 goes on a while"),
        pytest.param(
            RANK_0_LOSES_ITS_PEER.replace("Connection closed by peer", "an unheard-of text")
            + RANK_1_FAILS
            + torchrun(),
            RANK_1,
            id="torchrun names the rank",
        ),
        pytest.param(RANK_0_LOSES_ITS_PEER + RANK_1_FAILS, RANK_1, id="a launcher without a summary"),
        pytest.param(
            "".join(f"[default1]:{line}\n" for line in RANK_1_FAILS.splitlines()) + torchrun(),
            RANK_1,
            id="torchrun --tee",
        ),
        pytest.param(RANK_1_FAILS.replace("[rank1]:", "rank 1:"), RANK_1, id="skyspot's launcher"),
        pytest.param(RANK_1_FAILS.replace("[rank1]: ", "[1,1]<stderr>:") + MPI, RANK_1, id="mpirun"),
        pytest.param(
            RANK_0_LOSES_ITS_PEER + torchrun("-11", " (SIGSEGV)"),
            ("rank 1: killed by SIGSEGV",),
            id="torchrun, a signal",
        ),
        pytest.param(steps(3) + MPI_KILLED, ("rank 1: killed by signal 9 (Killed)",), id="mpirun, a signal"),
        pytest.param(
            NO_NCCL,
            ("RuntimeError: Distributed package doesn't have NCCL built in", NCCL_CALL, NCCL_REMEDY),
            id="NCCL without a GPU, torch for the CPU",
        ),
        pytest.param(
            NO_GPUS,
            ("ValueError: ProcessGroupNCCL is only supported with GPUs, no GPUs found!", NCCL_CALL, NCCL_REMEDY),
            id="NCCL without a GPU",
        ),
        pytest.param(PLAIN + OMP + torchrun(), CAUSE, id="before the ranks have numbers"),
        pytest.param(ACCELERATE_DEFAULTS + PLAIN + ACCELERATE, CAUSE, id="accelerate launch"),
        pytest.param(
            CHAIN,
            (
                "KeyError: 'step'",
                '  train.py, line 2, in a: raise KeyError("step")',
                "then ValueError: not a checkpoint",
                '  train.py, line 6: raise ValueError("not a checkpoint") from e',
            ),
            id="a chain",
        ),
        pytest.param(
            WORKER,
            (
                "IndexError: Caught IndexError in DataLoader worker process 0.",
                "  train.py, line 9: for batch in loader:",
                "then IndexError: no sample 7",
                '  data.py, line 6, in __getitem__: raise IndexError("no sample 7")',
            ),
            id="a loader's worker",
        ),
        pytest.param(
            KILLED_WORKER,
            (
                "RuntimeError: DataLoader worker (pid 5541) is killed by signal: Terminated.",
                "then RuntimeError: DataLoader worker (pid(s) 5541) exited unexpectedly",
                "  train.py, line 7: for batch in loader:",
            ),
            id="a loader's worker is killed",
        ),
        pytest.param(
            SPAWN, ("ValueError: negative", '  train.py, line 4, in f: raise ValueError("negative")'), id="mp.spawn"
        ),
        pytest.param(
            FUTURES,
            ("ZeroDivisionError: integer division or modulo by zero", "  prepare.py, line 3, in f: return 1 // x"),
            id="a pool's process",
        ),
        pytest.param(
            "usage: accelerate <command> [<args>]\nAccelerate CLI tool: error: unrecognized arguments: --nope\n",
            ("Accelerate CLI tool: error: unrecognized arguments: --nope",),
            id="a launcher's wrong usage",
        ),
        pytest.param(
            STATE_DICT,
            (
                "RuntimeError: Error(s) in loading state_dict for Linear: size mismatch for weight: copying a param "
                'with shape torch.Size([2, 2]) from checkpoint. Missing key(s) in state_dict: "bias".',
                "  train.py, line 12, in main: model.load_state_dict(state)",
            ),
            id="a message of several lines",
        ),
        pytest.param(
            RICH, ("ValueError: negative", '  train.py, line 5, in main: raise ValueError("negative")'), id="rich"
        ),
        pytest.param(
            GROUP,
            (
                "ExceptionGroup: all readers failed (2 sub-exceptions)",
                '  train.py, line 1: raise ExceptionGroup("all readers failed", [ValueError("1"), KeyError("2")])',
            ),
            id="a group",
        ),
        pytest.param(
            f'  File "{WORK}/bad.py", line 1\n    def f(:\n          ^\nSyntaxError: invalid syntax\n',
            ("SyntaxError: invalid syntax", "  bad.py, line 1: def f(:"),
            id="a file that Python cannot read",
        ),
        pytest.param(
            FAULTHANDLER,
            ("Fatal Python error: Segmentation fault", "  train.py, line 7, in step"),
            id="faulthandler",
        ),
        pytest.param(
            CPP,
            ("c10::Error: CUDA driver error: unknown error",),
            id="C++, with a stack",
        ),
        pytest.param(
            "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n",
            ("std::bad_alloc: std::bad_alloc",),
            id="C++",
        ),
        pytest.param(
            "terminate called without an active exception\n",
            ("terminate called without an active exception",),
            id="C++, no exception",
        ),
        pytest.param(
            f"{steps(5)}{MACHINE}/run.sh: line 4: 27739 Killed                  python train.py\n",
            ("run: line 4: 27739 Killed                  python train.py",),
            id="out of memory",
        ),
        pytest.param("Bus error (core dumped)\n", ("Bus error (core dumped)",), id="bus error"),
        pytest.param(
            f"{MACHINE}/run.sh: line 7: 27742 Done                    yes\n"
            "     27743 Segmentation fault      | python train.py\n",
            ("27743 Segmentation fault      | python train.py",),
            id="in a pipe",
        ),
        pytest.param(
            f"{MACHINE}/run.sh: line 2: torchrun: command not found\n",
            ("run: line 2: torchrun: command not found",),
            id="no such command",
        ),
        pytest.param(
            f"{MACHINE}/run.sh: line 8: ./go.sh: No such file or directory\n",
            ("run: line 8: ./go.sh: No such file or directory",),
            id="no such script",
        ),
        pytest.param(
            f"python: can't open file '{WORK}/no.py': [Errno 2] No such file or directory\n{ACCELERATE}",
            ("python: can't open file 'no.py': [Errno 2] No such file or directory",),
            id="no such file",
        ),
        pytest.param(
            "/opt/venv/bin/python: No module named trainr\n",
            ("/opt/venv/bin/python: No module named trainr",),
            id="no such module",
        ),
        pytest.param(
            'Traceback (most recent call last):\n  File "<string>", line 1, in <module>\n'
            "ModuleNotFoundError: No module named 'nothere'\n",
            ("ModuleNotFoundError: No module named 'nothere'", "  <string>, line 1"),
            id="python -c",
        ),
        pytest.param(
            "usage: train.py [-h] [--lr LR]\ntrain.py: error: unrecognized arguments: --rate\n",
            ("train.py: error: unrecognized arguments: --rate",),
            id="wrong usage",
        ),
        pytest.param(
            "cat: /checkpoints/latest: No such file or directory\n" + PLAIN,
            CAUSE,
            id="a line less certain than a traceback",
        ),
        pytest.param(
            "2026-11-29 12:00:00 ERROR trainer: the config has no model\n",
            ("2026-11-29 12:00:00 ERROR trainer: the config has no model",),
            id="a log's line",
        ),
        pytest.param(CHAIN + steps(3) + PLAIN, CAUSE, id="an earlier error was handled"),
        pytest.param(
            f"{WORK}/train.py:3: UserWarning: RuntimeError: not really\n  warnings.warn(x)\n" + PLAIN,
            CAUSE,
            id="a warning",
        ),
        pytest.param(
            PLAIN + "wandb: Find logs at: ./wandb/run-1\nwandb: Synced 5 files\n",
            CAUSE,
            id="a tracker has the last word",
        ),
        pytest.param(
            RANK_0_LOSES_ITS_PEER,
            (
                "rank 0: RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer "
                "[127.0.0.1]:65200. Check the logs.",
                "  train.py, line 8: step()",
            ),
            id="only a consequence is there",
        ),
    ],
)
def test_the_cause_and_the_users_own_line_are_shown(output: str, shown: tuple[str, ...]) -> None:
    found = read_excerpt(output, MACHINE)
    assert found.lines == shown
    assert found.is_cause


@pytest.mark.parametrize(
    "output",
    [
        steps(30),
        "UserWarning: deprecated\n" + steps(3),
        PLAIN + steps(60),
        f"{WORK}/train.py:3: UserWarning: x\n  warnings.warn(x)\n",
        "Traceback (most recent call last):\n",
        "Traceback (most recent call last):\n  File",
        'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n',
        "╭──── Traceback (most recent call last) ────╮\n│ x.py:1 in main │\n",
        torchrun(),
        "0 errors, 0 warnings\nno error: fine\n",
    ],
)
def test_where_no_cause_is_seen_the_last_lines_are_shown(output: str) -> None:
    found = read_excerpt(output, MACHINE)
    assert not found.is_cause
    assert found.lines == tuple(line for line in output.splitlines() if line.strip())[-12:]


def test_nothing_printed_is_nothing_shown() -> None:
    assert read_excerpt("\n\n", MACHINE).lines == ()


def test_a_line_without_end_is_cut_and_takes_no_time() -> None:
    found = read_excerpt("ValueError: " + "x: " * 1_000_000, MACHINE)
    assert found.is_cause
    assert len(found.lines[0]) < 500
