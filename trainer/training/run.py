"""SpotRun: one attempt at a run, from the rendezvous to the exit code. The public API for a training script.

    from trainer.training.run import SpotRun

    with SpotRun(config, binding={"model": "mlp"}) as run:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run.train(model, optimizer, samples=dataset, loss=loss_sum, max_steps=1000)

The `with` block is the attempt's whole life: when it ends, so does the process, with an exit code of the stop table
(ending.py). A SIGTERM is heard from its beginning on; one that comes earlier ends the process, and the launcher exits
with 75. This module imports torch only inside the block.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.attempt.binding import plain_binding
from trainer.attempt.ending import (
    ENDINGS,
    ERROR,
    FINISHED,
    MOUNT_HANGS,
    NO_PROGRESS,
    PEER_CRASHED,
    PEER_GONE,
    SUPERSEDED,
    Leaving,
)
from trainer.bucket.deadlines import await_overdue
from trainer.errors import RunError, TrainerError, one_line
from trainer.launch.nodes import Nodes
from trainer.layout.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PRECEDENCE
from trainer.layout.identity import newest_committed
from trainer.layout.names import AttemptName
from trainer.machine import home, scratch
from trainer.ranks.messages import CRASHED, STOPPED
from trainer.training.participant import Participant, exit_code

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer.training.config import RunConfig

PEER_GONE_PATIENCE_S = 2.0
CRASH_PATIENCE_S = 5.0


class SpotRun(Participant):
    """One attempt at a run; `rank`, `world_size`, `grace_s`, `paths` and `attempt` are a script's to read."""

    def __init__(self, config: RunConfig, binding: Mapping[str, Any] | None = None) -> None:
        """Describe the run.

        Args:
            config: How to run it.
            binding: What may not change between attempts, by name; compared with the newest whole checkpoint's.
        """
        _refuse_while_imported()
        home.stand_in()
        super().__init__(config, dict(binding if binding is not None else default_binding(config)))

    def __enter__(self) -> SpotRun:
        try:
            self.notices.install()
            self.link.watch(self._on_peer_gone)
            threading.Thread(target=self._watch_the_bucket, daemon=True, name="bucket").start()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                threading.Thread(target=scratch.remove_stale, daemon=True, name="stale").start()
            self._refuse_without_launcher()
            if self._grace_note:
                self.say(self._grace_note)
            self.binding = plain_binding(self.binding)
            opened, trouble = self._open_or_leave() if self.rank == 0 else (None, None)
            self.check_stop()
            from trainer.ranks.group import RankGroup

            self.group = RankGroup(self.config.peer_timeout_s, self.check_stop)
            self._living.enter_context(self.group.stay_alive())
            if self.group.several_nodes:
                threading.Thread(target=self._watch_for_a_crash, daemon=True, name="crashes").start()
            word = self.group.rank0_does("attempt", lambda: opened, self.check_stop)
            if trouble:
                raise trouble
            if isinstance(word, list):
                cause, message, code = word
                raise Leaving(ENDINGS[cause], message, code=code)
            name = AttemptName.parse(word)
            assert name
            self.attempt_name = name
            if self.group.several_nodes:
                self._meet_the_other_machines()
            if self.world_size > 1:
                self._alive.enter_context(self.group.before_gather("ready"))
            self.check_stop()
        except BaseException as error:
            self._end_with(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and not self.final_is_whole:
            error = RunError(
                "the `with SpotRun(...)` block ended, and the training is not done: call run.train(...) in it, and let "
                "through what that raises"
            )
        if error is not None:
            self._end_with(error)
        self.leave(FINISHED)

    def rank0_does(self, name: str, work: Callable[[], Any]) -> Any:
        """Let rank 0 do something that may take long (download, prepare, ...); every rank gets its JSON value."""
        return self.group.rank0_does(f"user/{name}", work, self.check_stop)

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """Train to the end, and export. Returns when that is done; `trainer.training.loop.Loop` has the options."""
        from trainer.training.loop import Loop

        Loop(self, model, optimizer, **options).train()

    def _refuse_without_launcher(self) -> None:
        if self.world_size == 1 and Nodes.from_env().several:
            raise RunError(
                "several machines, and each would train alone: start the script with `python -m trainer.launch SCRIPT`"
            )

    # -- what each rank listens for ------------------------------------------------------------------------------------

    def _watch_for_a_crash(self) -> None:
        """Leave with 1 where a rank on any machine ended through a fault of its own, whatever this rank waits for.

        A collective fails on the other machines before the crashed rank has left. If they left with 75 then, SkyPilot
        would start a bug again for ever.
        """
        with suppress(Exception):
            store = self.group.connection()
            while True:
                what = self.group.read_message(CRASHED, 1.0, store)
                if self._ending.is_set():
                    return
                if what is not None:
                    self._follow_a_crash(what)
                store.check([CRASHED])  # Raises where rank 0 is gone.

    def _watch_the_bucket(self) -> None:
        """Leave where a call into the bucket does not return: nothing interrupts it, and a new machine mounts anew."""
        call = await_overdue()
        if self.final_is_whole:
            self.leave(FINISHED)
        seconds = time.monotonic() - call.begun
        error = f"{call.what} in {call.where or self.paths.root} has not returned for {seconds:.0f} s: its mount hangs"
        print(f"Error: {error}. Nothing that was committed is lost.", file=sys.stderr, flush=True)
        if call.code == EXIT_FAILED:
            self._say_crashed(error)
        self.leave(MOUNT_HANGS, code=call.code, error=error)

    def _on_peer_gone(self) -> None:
        """The launcher's word that another rank left: give the main thread a moment, then leave without it."""
        self.peer_gone.set()
        time.sleep(PEER_GONE_PATIENCE_S if not self.stopping else self.grace_s)
        if not self.final_is_whole:
            if trouble := self.trouble():
                self._end_with(trouble)
            self._leave_with_the_others("another rank is gone")

    # -- the end -------------------------------------------------------------------------------------------------------

    def _follow_a_crash(self, what: str) -> NoReturn:
        if self.rank == 0:
            print(f"Error: {what} (the traceback is in that machine's output)", file=sys.stderr)
        self.leave(PEER_CRASHED, error=what)

    def _leave_with_the_others(self, error: str) -> NoReturn:
        """Leave because another rank is gone: what was agreed on if all were stopping anyway, else a preemption."""
        ending = self.stopping
        if not ending and self._across() and (word := self.group.read_message(STOPPED)):
            ending = ENDINGS[json.loads(word)[0]]
        self.leave(ending or PEER_GONE, error=error)

    def _end_with(self, error: BaseException) -> NoReturn:
        """Turn whatever ended the attempt into its exit code; says it once."""
        # A rank that left because of the same error is no lost peer: all ranks meet one mistake, one a little later.
        lost = self._may_be_peer_trouble(error) and self.group.lost_a_peer(self.peer_gone)
        if lost and not self.link.was_printed(one_line(error)):
            error = sys.modules["trainer.ranks.peers"].PeerGoneError(one_line(error))
        if self.world_size > 1 and self._is_peer_trouble(error):
            error = self.trouble() or error
        if not (self.world_size > 1 and self._is_peer_trouble(error)):
            self._ending.set()
        if isinstance(error, Leaving):
            if error.message and self.rank == 0:
                failed = error.code in (EXIT_FAILED, NO_PROGRESS.code)
                print(f"Error: {error.message}" if failed else error.message, file=sys.stderr if failed else sys.stdout)
            if error.code == EXIT_FAILED:
                self._say_crashed(error.message)
            if error.hold_s:
                self.write_end(error.ending, code=error.code, error=error.message or None, notice=error.notice)
                self.hold(error.hold_s)
            self.leave(error.ending, code=error.code, error=error.message or None, notice=error.notice)
        if isinstance(error, SystemExit):
            code = exit_status(error)
            if not (code or self.final_is_whole):  # With 0, SkyPilot would call the run done.
                error = RunError("sys.exit(0) before the training is done: this attempt ends with 1")
            else:
                self._end_as_the_script_says(code, error)
        if self.world_size > 1 and self._is_peer_trouble(error):
            if self._across():
                patience_s = 0.0 if self.stopping or self.group.read_message(STOPPED) else CRASH_PATIENCE_S
                what = self.group.read_message(CRASHED, patience_s)
                self._serve_on_s -= patience_s  # The others have waited as long meanwhile.
                if what is not None:
                    self._follow_a_crash(what)
            elif not hasattr(self, "group"):
                print(f"rank {self.rank}: {error}", file=sys.stderr)
            self._leave_with_the_others(f"another rank is gone ({one_line(error)})")
        code = exit_code(error)
        # Said before the others hear of it: the first machine to leave has SkyPilot kill the others.
        in_a_line, first = isinstance(error, TrainerError), self._first_to_say(one_line(error))
        if first and in_a_line:
            print(f"Error: {error}", file=sys.stderr, flush=True)
        elif first:
            traceback.print_exception(error)
        if code == EXIT_FAILED:
            self._say_crashed(one_line(error))
        if first and not in_a_line:
            print(f"Error: {one_line(error)}. {self._full_disk(error)}{self._last_word()}", file=sys.stderr, flush=True)
        self.leave(SUPERSEDED if code == SUPERSEDED.code else ERROR, code=code, error=one_line(error))

    def _end_as_the_script_says(self, code: int, error: SystemExit) -> NoReturn:
        if not isinstance(error.code, int) and error.code is not None and self._first_to_say(str(error.code)):
            print(error.code, file=sys.stderr, flush=True)
        if code and code not in EXIT_PRECEDENCE[1:]:
            self._say_crashed(f"exit {error.code}")
        self.leave(FINISHED if code == 0 else ERROR, code=code, error=str(error.code))

    def _first_to_say(self, what: str) -> bool:
        """Whether no other rank has said the same: a mistake that all of them meet is one mistake.

        Asked of the launcher's file first: rank 0 does not wait for the others where it fails, and its store goes with
        it. It does on several machines.
        """
        if not self.link.is_first_to_print(what):
            return False
        with suppress(Exception):  # No store any more: better twice than not at all.
            return self.group.is_first(f"said/{what}")
        return True

    def _say_crashed(self, what: str) -> None:
        """Tell the other machines that this is no preemption, before they see this rank go."""
        if self._across():
            self.group.post_message(CRASHED, f"rank {self.rank}: {what}")

    def _is_peer_trouble(self, error: BaseException) -> bool:
        module = sys.modules.get("trainer.ranks.peers")
        return module is not None and bool(module.is_peer_trouble(error))

    def _full_disk(self, error: BaseException) -> str:
        """Which local disk is full, where an error says no more than that one is."""
        if isinstance(error, OSError) and error.errno in scratch.FULL and not error.filename:
            where = scratch.full_place(self.paths.root)
            return f"{where} is full. " if where else ""
        return ""

    def _may_be_peer_trouble(self, error: BaseException) -> bool:
        """Whether it takes a look at the other ranks to tell."""
        if self.world_size == 1 or not hasattr(self, "group"):
            return False
        if isinstance(error, (Leaving, TrainerError)):
            return False
        module = sys.modules["trainer.ranks.peers"]
        return bool(module.may_be_peer_trouble(error)) and not module.is_peer_trouble(error)

    def _last_word(self) -> str:
        newest = None
        with suppress(Exception):  # The bucket may be what is wrong.
            newest = newest_committed(self.paths)
        return f"The last committed checkpoint is {newest[0]}." if newest else "Nothing had been committed."


def default_binding(config: RunConfig) -> dict[str, Any]:
    """What binds a run of a user's own script: the samples of each step, and how many steps there are."""
    return {
        "global_batch_size": config.global_batch_size,
        "seed": config.seed,
        "max_steps": config.max_steps,
    }


def _refuse_while_imported() -> None:
    """Refuse an attempt in a process that multiprocessing started, and that imports the script to find its functions.

    Raises:
        SystemExit: ends that process; a line says why.
    """
    process = sys.modules.get("multiprocessing.process")
    # As multiprocessing itself sees that a worker starts workers while it imports the script.
    if process and getattr(process.current_process(), "_inheriting", False):
        print(
            f"Error: {process.current_process().name} imports this script, as each worker of a data loader does that "
            'is started with "spawn" or "forkserver", and finds SpotRun outside of `if __name__ == "__main__":`. Put '
            "what the script does under that line: a worker takes no part in the attempt",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.exit(EXIT_FAILED)  # A server of workers would not print a message that is given here.


def exit_status(error: SystemExit) -> int:
    """What a process ends with: 1 after a message; never 0 for a number that the system would cut to 0."""
    if not isinstance(error.code, int):
        return EXIT_DONE if error.code is None else EXIT_FAILED
    return error.code & 0xFF or int(bool(error.code))
