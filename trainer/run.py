"""SpotRun: one attempt at a run, from the rendezvous to the exit code. The public API for a training script.

    from trainer.run import SpotRun

    with SpotRun(config, binding={"model": "mlp"}) as run:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run.train(model, optimizer, samples=dataset, loss=loss_sum, max_steps=1000)

The `with` block is the attempt's whole life: when it ends, so does the process, with an exit code of the stop table
(layout.py). A SIGTERM is heard from its beginning on; one that comes earlier ends the process, and the launcher exits
with 75. This module imports torch only inside the block.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from trainer import attempt as attempts
from trainer import home, scratch
from trainer.config import LATER, unknown_field
from trainer.ending import (
    ALREADY_FINISHED,
    ENDINGS,
    ERROR,
    FINISHED,
    MOUNT_HANGS,
    NO_PROGRESS,
    PEER_CRASHED,
    PEER_GONE,
    REFUSED,
    STOP_REQUEST,
    STOPS,
    SUPERSEDED,
    Ending,
    Leaving,
)
from trainer.errors import RunError, TrainerError, one_line
from trainer.layout import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PRECEDENCE,
    EXIT_PREEMPTED,
    AttemptName,
    Manifest,
    RunPaths,
    newest_committed,
)
from trainer.nodes import Nodes
from trainer.notice import Notice, Notices
from trainer.patience import await_overdue, within
from trainer.rank import CRASHED, END_WRITTEN, STOPPED, Link, grace

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer.attempt import Attempt
    from trainer.config import RunConfig
    from trainer.records import Records
    from trainer.together import Together

PEER_GONE_PATIENCE_S = 2.0
CRASH_PATIENCE_S = 5.0
LEAVE_LAST_S = 6.0
END_EVENT_S = 5.0
SEE_ATTEMPT_S = 90.0
LOOK_AT_STORE_S = 0.5
LOOK_AT_BUCKET_S = 5.0


class SpotRun:
    """One attempt at a run.

    Attributes:
        rank, world_size: This process' place among the processes of the attempt.
        grace_s: Seconds from SIGTERM to SIGKILL: the launcher's, or the config's where that is less.
        paths: The run's folder.
        attempt: Rank 0's record of the attempt; None on other ranks.
    """

    def __init__(self, config: RunConfig, binding: Mapping[str, Any] | None = None) -> None:
        """Describe the run.

        Args:
            config: How to run it.
            binding: What may not change between attempts, by name; compared with the newest whole checkpoint's.
        """
        _refuse_while_imported()
        home.stand_in()
        self.grace_s, self._grace_note = grace(config.grace_s)
        self.config = dataclasses.replace(config, grace_s=self.grace_s)
        self.binding: dict[str, Any] = dict(binding if binding is not None else default_binding(config))
        self.paths = RunPaths(config.checkpoint_dir)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.launched_at = float(os.environ.get("SKYSPOT_LAUNCHED_AT", time.monotonic()))
        self.allowed = set(config.allow_config_change)
        """The fields that may differ from the run's first attempt."""
        self.is_same: Callable[[str, Mapping[str, Any]], bool] = lambda name, first: False
        """Whether a field that differs from what bound first is the same thing under another name."""
        self.attempt: Attempt | None = None
        self.run_id: str | None = None
        """Rank 0: which run this is; other runs' checkpoints do not count."""
        self.newest: Manifest | None = None
        """Rank 0: the newest checkpoint's, as it was when the attempt began."""
        self.attempt_name: AttemptName
        self.records: Records | None = None
        self.together: Together
        self.link = Link.from_env()
        self.notices = Notices(self.grace_s)
        self.peer_gone = threading.Event()
        self.stopping: Ending | None = None
        """What all ranks have agreed to stop for; from then on a peer's leaving is expected."""
        self.trouble: Callable[[], BaseException | None] = lambda: None
        """What all ranks are about to leave for; where another has left for it already, it is no lost peer."""
        self.final_is_whole = False
        self.steps_done = 0
        self.committed_step: int | None = None
        self.skipped = 0
        """Steps of the run whose update was dropped because it was not finite."""
        self._leaving = threading.Lock()
        self._ending = threading.Event()
        """This rank has a reason of its own to leave, and is about to say it."""
        self._serve_on_s = LEAVE_LAST_S
        """How long rank 0 serves the store for the others once it leaves."""
        self._alive, self._living = ExitStack(), ExitStack()
        self._look_at_store = self._look_at_bucket = 0.0

    # -- the attempt's life ------------------------------------------------------------------------------------------

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
            self.binding = attempts.plain_binding(self.binding)
            opened, trouble = self._open_or_leave() if self.rank == 0 else (None, None)
            self.between()
            from trainer.together import Together

            self.together = Together(self.config.peer_timeout_s, self.between)
            self._living.enter_context(self.together.live())
            if self.together.several_nodes:
                threading.Thread(target=self._watch_for_a_crash, daemon=True, name="crashes").start()
            word = self.together.rank0_does("attempt", lambda: opened, self.between)
            if trouble:
                raise trouble
            if isinstance(word, list):
                cause, message, code = word
                raise Leaving(ENDINGS[cause], message, code=code)
            name = AttemptName.parse(word)
            assert name
            self.attempt_name = name
            if self.together.several_nodes:
                self._meet_the_other_machines()
            if self.world_size > 1:
                self._alive.enter_context(self.together.coming_to("ready"))
            self.between()
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

    def between(self) -> None:
        """Look for a stop between two pieces of work outside of the training loop; nothing is saved there.

        Raises:
            Leaving: a notice was heard, here or on another machine; a newer attempt has begun; a stop was asked for.
        """
        if not self.final_is_whole:
            notice = self.notices.first()
            if notice:
                self._stop_all(STOPS[notice.kind], f"{notice.kind} before the first step", notice)
            self._look_at_the_others()
            if self.attempt:
                self._look_at_the_bucket(self.attempt)
        if self.peer_gone.is_set():
            raise Leaving(PEER_GONE, "another rank is gone")

    def _look_at_the_others(self) -> None:
        """Has another machine been told to stop?"""
        if self._across() and time.monotonic() >= self._look_at_store:
            self._look_at_store = time.monotonic() + LOOK_AT_STORE_S
            if word := self.together.heard(STOPPED):
                cause, hold_s = json.loads(word)
                message = "another machine was told to stop before the first step"
                raise Leaving(ENDINGS[cause], message, hold_s=hold_s)

    def _look_at_the_bucket(self, attempt: Attempt) -> None:
        """Rank 0: what `Records` looks for as soon as training has begun."""
        if self.records is None and time.monotonic() >= self._look_at_bucket:
            self._look_at_bucket = time.monotonic() + LOOK_AT_BUCKET_S
            newer, stop_requested = None, False
            with suppress(OSError), within("looking for other attempts"):
                newer = attempts.newer_attempt(attempt)
                stop_requested = attempts.stop_requested(attempt)
            if newer:
                self._stop_all(SUPERSEDED, attempts.superseded(newer))
            if stop_requested:
                self._stop_all(STOP_REQUEST, "a stop was asked for before the first step")

    def _stop_all(self, ending: Ending, message: str, notice: Notice | None = None) -> NoReturn:
        """Leave, and let the other machines do so for the same reason."""
        hold_s = ending.hold_s(notice.deadline) if notice else 0.0
        if self._across():
            self.together.say(STOPPED, json.dumps([ending.cause, hold_s]))
        raise Leaving(ending, message, notice=notice, hold_s=hold_s)

    def _across(self) -> bool:
        """Whether there are other machines, and this rank has its seat among theirs."""
        return hasattr(self, "together") and self.together.several_nodes

    def await_all_ready(self) -> None:
        """Wait for the other ranks before the first collective, however long they load; each gives signs of life."""
        self.together.gather("ready", True, self.between)
        self._alive.close()

    def rank0_does(self, name: str, work: Callable[[], Any]) -> Any:
        """Let rank 0 do something that may take long (download, prepare, ...); every rank gets its JSON value."""
        return self.together.rank0_does(f"user/{name}", work, self.between)

    def bind(self, **values: Any) -> None:
        """Add to what binds the run, once it is known (the data's key, say).

        Raises:
            Leaving: the run was begun with another value; the attempt is refused.
        """
        self.binding.update(attempts.plain_binding(values))
        if self.rank == 0:
            assert self.attempt
            attempt = self.attempt
            self.ask(lambda: attempts.record(attempt, "bound", binding=self.binding))
            self._refuse_other_binding(self.newest)

    def refuse_unknown_names(self) -> None:
        """Refuse a field that may change and that there is not, once all that binds the run is known.

        Raises:
            Leaving: the attempt is refused.
        """
        then = self.newest.facts.get("binding") if self.newest else None
        known = {item.name for item in dataclasses.fields(self.config)} | self.binding.keys() | LATER
        known |= then.keys() if isinstance(then, Mapping) else set()
        if trouble := unknown_field(self.config.allow_config_change, known):
            raise Leaving(REFUSED, trouble)

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        """Train to the end; see `trainer.loop.Loop` for the options. Returns when the run is finished and exported."""
        from trainer.loop import Loop

        Loop(self, model, optimizer, **options).run()

    def hold(self, seconds: float) -> None:
        """Wait to be killed: the machine is going, and an early exit would only start a new attempt on it."""
        self.say("holding until this machine is taken")
        self.notices.signalled.wait(seconds)

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.rank == 0:
            from trainer.show import say

            say(text)

    def leave(
        self,
        ending: Ending,
        *,
        code: int | None = None,
        error: str | None = None,
        notice: Notice | None = None,
        committed_s: float | None = None,
    ) -> NoReturn:
        """End this process; rank 0 writes the end event first. Never returns.

        Args:
            ending: Why.
            code: The exit code; None: the ending's.
            error: What to record of an error.
            notice: What announced the end.
            committed_s: How long after the notice the last step was committed.
        """
        code = ending.code if code is None else code
        with self._leaving:  # Held until the process is gone: whoever comes second waits here.
            self.write_end(ending, code=code, error=error, notice=notice, committed_s=committed_s)
            with suppress(Exception):
                across = self._across()
                if self.rank:
                    if across and self.stopping:
                        # The first machine to leave has SkyPilot kill the others: not before all is written.
                        self.together.heard(END_WRITTEN, LEAVE_LAST_S)
                    self.together.say_left()
                elif code == EXIT_DONE or self.stopping or across:
                    self.together.await_others_left(self._serve_on_s)
            scratch.remove_all()
            self.link.say_exit(code)
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            # Not sys.exit: it would join threads that may hang in a write to a dead mount.
            os._exit(code)

    def write_end(
        self,
        ending: Ending,
        *,
        code: int | None = None,
        error: str | None = None,
        notice: Notice | None = None,
        committed_s: float | None = None,
    ) -> None:
        """Write the attempt's end event, once, within a few seconds; arguments as of `leave`."""
        attempt, self.attempt = self.attempt, None
        if attempt is None:
            return
        fields = {
            "code": ending.code if code is None else code,
            "cause": ending.cause,
            "step": self.steps_done,
            "committed_step": self.committed_step,
            **({"skipped": self.skipped} if self.skipped else {}),
            "error": error[-4000:] if error else None,
            "notice": {"kind": notice.kind, "id": notice.id, "seconds_left": notice.seconds_left} if notice else None,
            "committed_s": None if committed_s is None else round(committed_s, 4),
        }

        def write() -> None:
            with suppress(OSError):
                if self.records:
                    self.records.flush(END_EVENT_S / 2)
                attempts.record(attempt, "end", **fields)
                self.link.say_ended()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(END_EVENT_S)
        with suppress(Exception):
            self.together.say(END_WRITTEN, "")

    # -- the start ---------------------------------------------------------------------------------------------------

    def _refuse_without_launcher(self) -> None:
        if self.world_size == 1 and Nodes.from_env().several:
            raise RunError(
                "several machines, and each would train alone: start the script with `python -m trainer.launch SCRIPT`"
            )

    def _open_or_leave(self) -> tuple[str | list[Any], BaseException | None]:
        """Rank 0's word to the others, and what it then raises itself.

        The word is the attempt's name, or [cause, message, exit code] of leaving at once.
        """
        try:
            self._open_attempt()
            assert self.attempt
            return str(self.attempt.name), None
        except Leaving as leaving:
            if self.world_size == 1:
                raise
            return [leaving.ending.cause, leaving.message, leaving.code], leaving
        except Exception as error:
            if not Nodes.from_env().several:
                raise
            code = exit_code(error)
            ending = PEER_CRASHED if code == EXIT_FAILED else ERROR
            return [ending.cause, f"rank 0: {one_line(error)}", code], error

    def _open_attempt(self) -> None:
        """Rank 0: write `start`, then look whether there is anything to do, before model or data are touched."""
        attempts.check_bucket(self.paths)
        known = attempts.persist(self.paths, lambda: attempts.identity(self.paths, self.binding), self.between)
        self.run_id = known or attempts.new_run_id(self.binding)
        found = attempts.newest_readable(self.paths, self.run_id, self.between, self.config.on_nan != "ignore")
        self.newest = found[1] if found else None
        newest_step = self.newest.step if self.newest else 0
        launch = attempts.launch_id()
        facts = {
            "config": self.config.to_json(),
            "binding": self.binding,
            "processes": self.world_size,
            "newest_step": newest_step,
        }
        opened = AttemptName.parse(os.environ.get("SKYSPOT_ATTEMPT", ""))
        if opened and self.ask(self.paths.attempt(opened).is_dir):
            self.attempt = self.ask(lambda: attempts.adopt(self.paths, opened, launch, **facts))
        else:
            self.attempt = attempts.open_attempt(self.paths, launch=launch, between=self.between, **facts)
        self.link.say_attempt(self.paths.root, self.attempt.name)
        self._refuse_other_binding(self.newest)
        from trainer.verify import problem

        def finished() -> bool:
            return attempts.is_finished(self.paths, self.run_id, self.binding, problem)

        if self.ask(finished, math.inf):  # Reads all of it; each read has a limit of its own.
            self.final_is_whole = True
            raise Leaving(ALREADY_FINISHED, f"already finished: {self.paths.final} is whole")
        attempt = self.attempt
        if self.ask(lambda: attempts.stop_requested(attempt)):
            asked = self.paths.stop(self.attempt.launch)
            raise Leaving(STOP_REQUEST, f"not started: {asked} asks this launch to stop")
        stuck = self.ask(lambda: attempts.no_progress(attempt, newest_step), attempts.RECORDS_S)
        if stuck:
            raise Leaving(NO_PROGRESS, stuck)
        self._hear_the_cloud(self.attempt.name, self.attempt.machine)

    def ask(self, work: Callable[[], Any], limit_s: float | None = None) -> Any:
        """Do something in the bucket between the attempt's start and its first step; see `attempt.persist`.

        Args:
            work: What to do; may be done several times.
            limit_s: How long one try may take; infinite where each of its calls has a limit of its own.
        """
        return attempts.persist(self.paths, work, self.between, begun=True, limit_s=limit_s)

    def _hear_the_cloud(self, name: AttemptName, machine: str) -> None:
        """Ask the cloud's metadata service from now on: one rank on each machine, as each has notices of its own."""
        ignored = self.ask(lambda: attempts.ignored_notices(self.paths, name, machine), attempts.RECORDS_S)
        self.notices.ignored = frozenset(ignored)
        self.notices.poll_metadata()

    def _meet_the_other_machines(self) -> None:
        """Each machine looks at its own mount and its own notices, and is recorded.

        Raises:
            AttemptError: the bucket is not mounted here; the attempt ends with 1 on all machines.
        """
        machine = ""
        with self.together.coming_to("machine"):
            if self.together.local_rank == 0:
                machine = attempts.machine_token()
                if self.rank:
                    attempts.check_bucket(self.paths)
                    self._await_the_attempt_in_the_bucket()
                    self._hear_the_cloud(self.attempt_name, machine)
            tokens = self.together.gather("machine", machine, self.between)
        if attempt := self.attempt:
            found = [token for token in tokens if token]
            self.ask(lambda: attempts.record(attempt, "machines", machines=found))

    def _await_the_attempt_in_the_bucket(self) -> None:
        """Two mounts of one bucket show each other's new files a little later; two buckets never do."""
        folder, end = self.paths.attempt(self.attempt_name), time.monotonic() + SEE_ATTEMPT_S
        while not self.ask(folder.is_dir):
            self.between()
            if time.monotonic() > end:
                raise RunError(
                    f"{folder}: the first machine wrote it, and this one does not see it for {SEE_ATTEMPT_S:g} s. "
                    "What is mounted here is not the same bucket or folder; nothing was written"
                )
            time.sleep(0.2)

    def _refuse_other_binding(self, newest: Manifest | None) -> None:
        assert self.attempt
        attempt = self.attempt

        def problem() -> str | None:
            return attempts.binding_problem(self.paths, attempt, self.binding, self.allowed, newest, self.is_same)

        trouble = self.ask(problem, attempts.RECORDS_S)
        if trouble:
            raise Leaving(REFUSED, trouble)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _watch_for_a_crash(self) -> None:
        """Leave with 1 where a rank on any machine ended through a fault of its own, whatever this rank waits for.

        A collective fails on the other machines before the crashed rank has left. If they left with 75 then, SkyPilot
        would start a bug again for ever.
        """
        with suppress(Exception):
            store = self.together.connection()
            while True:
                what = self.together.heard(CRASHED, 1.0, store)
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

    def _follow_a_crash(self, what: str) -> NoReturn:
        if self.rank == 0:
            print(f"Error: {what} (the traceback is in that machine's output)", file=sys.stderr)
        self.leave(PEER_CRASHED, error=what)

    def _on_peer_gone(self) -> None:
        """The launcher's word that another rank left: give the main thread a moment, then leave without it."""
        self.peer_gone.set()
        time.sleep(PEER_GONE_PATIENCE_S if not self.stopping else self.grace_s)
        if not self.final_is_whole:
            if trouble := self.trouble():
                self._end_with(trouble)
            self._leave_with_the_others("another rank is gone")

    def _leave_with_the_others(self, error: str) -> NoReturn:
        """Leave because another rank is gone: what was agreed on if all were stopping anyway, else a preemption."""
        ending = self.stopping
        if not ending and self._across() and (word := self.together.heard(STOPPED)):
            ending = ENDINGS[json.loads(word)[0]]
        self.leave(ending or PEER_GONE, error=error)

    def _end_with(self, error: BaseException) -> NoReturn:
        """Turn whatever ended the attempt into its exit code; says it once."""
        # A rank that left because of the same error is no lost peer: all ranks meet one mistake, one a little later.
        lost = self._may_be_peer_trouble(error) and self.together.lost_a_peer(self.peer_gone)
        if lost and not self.link.has_been_said(one_line(error)):
            error = sys.modules["trainer.together"].PeerGoneError(one_line(error))
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
                patience_s = 0.0 if self.stopping or self.together.heard(STOPPED) else CRASH_PATIENCE_S
                what = self.together.heard(CRASHED, patience_s)
                self._serve_on_s -= patience_s  # The others have waited as long meanwhile.
                if what is not None:
                    self._follow_a_crash(what)
            elif not hasattr(self, "together"):
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
        if not self.link.is_first_to_say(what):
            return False
        with suppress(Exception):  # No store any more: better twice than not at all.
            return self.together.is_first(f"said/{what}")
        return True

    def _say_crashed(self, what: str) -> None:
        """Tell the other machines that this is no preemption, before they see this rank go."""
        if self._across():
            self.together.say(CRASHED, f"rank {self.rank}: {what}")

    def _is_peer_trouble(self, error: BaseException) -> bool:
        module = sys.modules.get("trainer.together")
        return module is not None and bool(module.is_peer_trouble(error))

    def _full_disk(self, error: BaseException) -> str:
        """Which local disk is full, where an error says no more than that one is."""
        if isinstance(error, OSError) and error.errno in scratch.FULL and not error.filename:
            where = scratch.full_place(self.paths.root)
            return f"{where} is full. " if where else ""
        return ""

    def _may_be_peer_trouble(self, error: BaseException) -> bool:
        """Whether it takes a look at the other ranks to tell."""
        if self.world_size == 1 or not hasattr(self, "together"):
            return False
        if isinstance(error, (Leaving, TrainerError)):
            return False
        module = sys.modules["trainer.together"]
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


def exit_code(error: BaseException) -> int:
    """With what an attempt ends that an error ended."""
    if isinstance(error, TrainerError):
        return error.code
    return EXIT_PREEMPTED if isinstance(error, OSError) and error.errno in attempts.MOUNT_GONE else EXIT_FAILED


def exit_status(error: SystemExit) -> int:
    """What a process ends with: 1 after a message; never 0 for a number that the system would cut to 0."""
    if not isinstance(error.code, int):
        return EXIT_DONE if error.code is None else EXIT_FAILED
    return error.code & 0xFF or int(bool(error.code))
