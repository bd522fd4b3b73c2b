"""The evidence of a rehearsal: what its buckets' traces tell about checkpoints and resumes, leg by leg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from skyspot.rehearsal import appended, files, journal, naming, remedies
from skyspot.rehearsal.boundaries import Boundary, arrivals, boundaries, counted, sample, strikes, that_prunes
from skyspot.rehearsal.bucketfs.strike import Strike, points
from skyspot.rehearsal.bucketfs.trace import Call, read_from
from skyspot.rehearsal.lives import Follower, Life
from skyspot.rehearsal.remedies import Cause, Finding
from skyspot.rehearsal.replay import Attempt, Bucket, Written
from skyspot.rehearsal.resumes import FIRST, LOST_WORK, NOTHING_THERE, Resume
from skyspot.rehearsal.saves import Learnt, Save, study_replayed
from skyspot.rehearsal.verdict import Verdict

ENOUGH_SAVES = 4
"""With fewer saves in the undisturbed run, a strike waits for one save; otherwise for two, which prove more."""

LOST, READ_AND_DROPPED = "lost-work", "read-and-dropped"
"""Causes of LOST WORK. The second shows only in an attempt that runs to its end, so it may be true of others too."""


class Evidence:
    """Learns with every attempt. Empty without an undisturbed run."""

    def __init__(
        self, results: Sequence[str] = (), checkpoints: Sequence[str] = (), *, calls_seen: bool = True
    ) -> None:
        """Begin with nothing.

        Args:
            results: Globs of the files that are compared at the end.
            checkpoints: Globs of the checkpoints' files, if the user named them.
            calls_seen: True if each call is in the traces.
        """
        self._calls_seen = calls_seen
        self._results, self._checkpoints = tuple(results), tuple(checkpoints)
        self._reference: Written | None = None
        self._legs: dict[str, list[Attempt]] = {}
        # Each attempt is replayed as it comes, and not again with every later one.
        self._buckets: dict[str, Bucket] = {}
        self._later: list[Written] = []
        self._followers: dict[str, Follower] = {}
        self._learnt: Learnt | None = None

    def add(self, leg: str, attempt: Attempt) -> None:
        """Add the next attempt of a leg; the undisturbed run's first."""
        if self._reference is None:
            self._reference = Bucket().replay(attempt)
        else:
            self._legs.setdefault(leg, []).append(attempt)
            self._later.append(self._buckets.setdefault(leg, Bucket()).replay(attempt))
        self._learnt = None

    def latest(self, leg: str) -> Attempt:
        """The latest attempt of a leg."""
        return self._legs[leg][-1]

    def go_on(self, leg: str, other: str) -> None:
        """Have a leg begin with what another's first attempt left."""
        self._legs[leg] = self._legs[other][:1]
        self._buckets[leg] = Bucket()
        self._buckets[leg].replay(self._legs[leg][0])

    @property
    def learnt(self) -> Learnt | None:
        """What is known of the run's files; None before the undisturbed run."""
        if self._learnt is None and self._reference is not None:
            self._learnt = study_replayed(self._reference, self._later, self._results, self._checkpoints)
        return self._learnt

    def kinds(self) -> list[files.Kind]:
        """The kinds of files that the run writes; a file that its restarts go on from is a checkpoint."""
        learnt = self.learnt
        found = learnt.files.kinds if learnt else ()
        own = naming.parse(learnt.journal).kind if learnt and learnt.journal else None
        reason = "each start reads it and appends to it"
        return [replace(one, role=files.CHECKPOINT, why=reason) if one.pattern == own else one for one in found]

    def lives(self, leg: str) -> tuple[Life, ...]:
        """Judge the attempts of a leg, in their order."""
        learnt = self.learnt
        if learnt is None:
            return ()
        if learnt.journal:
            return journal.follow(learnt, self._legs.get(leg, []))
        follower = self._followers.get(leg)
        if follower is None or follower.learnt != learnt:  # What it has learnt meanwhile may tell more of earlier ones.
            follower = self._followers[leg] = Follower(learnt)
        for attempt in self._legs.get(leg, [])[len(follower.lives) :]:
            follower.add(attempt)
        return tuple(follower.lives)

    # -- where strikes fall ------------------------------------------------------------------------------------------

    @property
    def paths(self) -> str | None:
        """A regular expression of the checkpoint's paths; None if the undisturbed run saved nothing."""
        learnt = self.learnt
        if learnt and learnt.journal:
            return naming.exactly(learnt.journal)
        return counted(learnt.files) if learnt and learnt.saves else None

    def changes_until_saved(self) -> int:
        """How many changes of the checkpoint's files an undisturbed start makes until enough saves are complete."""
        learnt = self.learnt
        if learnt and learnt.journal:
            return appended.ENOUGH_WRITES
        done = [save for save in learnt.saves if save.complete is not None] if learnt else []
        if not done or self._reference is None or self.paths is None:
            return 0
        enough = self._when_it_is_there(done[1] if len(done) >= ENOUGH_SAVES else done[0])
        done_by_then = [call for call in self._reference.calls if call.number <= enough]
        return len(changes(done_by_then, self.paths, calls_seen=self._calls_seen))

    def _when_it_is_there(self, save: Save) -> int:
        """Number of the call after which a complete save of the undisturbed run lies in the bucket."""
        assert self._learnt
        assert self._reference
        assert save.complete is not None
        return max([save.complete, *(one.number for one in arrivals(self._reference.calls, self._learnt.saves, save))])

    def places(self, *, early: bool = False) -> list[Place]:
        """List every place within one save at which a strike can fall; empty if there is no save to strike.

        Args:
            early: False: the save deletes older ones, if the undisturbed run's saves do.
        """
        learnt = self.learnt
        if learnt is None or self._reference is None or self.paths is None:
            return []
        if learnt.journal:
            return [Place(*strikes) for strikes in journal.strikes(learnt, self._reference)]
        saves = [save for save in learnt.saves if save.complete is not None]
        if not saves:
            return []
        late = saves[min(2 if len(saves) >= ENOUGH_SAVES else 1, len(saves) - 1)]
        since = learnt.saves.index(late)
        prunes = None if early else that_prunes(learnt.files, self._reference.calls, learnt.saves, since)
        return self.places_of(prunes or late)

    def places_of(self, save: Save) -> list[Place]:
        """List every place within one save of the undisturbed run."""
        assert self.learnt
        assert self._reference
        files, calls = self.learnt.files, self._reference.calls
        places = boundaries(files, calls, self.learnt.saves, save)
        return [
            Place(at_first, later, place.description, second, place.temporary)
            for place, (at_first, later, second) in zip(places, strikes(files, calls, places), strict=True)
        ]

    def after_a_save(self, path: str) -> Place | None:
        """The place just after a save of this file that is neither the first nor the last; None: there is none."""
        saves = self.learnt.saves[1:-1] if self.learnt else ()
        usable = [one for one in saves if one.complete is not None and any(file.path == path for file in one.files)]
        places = self.places_of(usable[0]) if usable else []
        return places[-1] if places else None


@dataclass(frozen=True)
class Place:
    """One place within a save."""

    at_first: Strike
    """In a leg's first attempt: in its second or third save, so that a complete one lies there."""
    later: Strike
    """In an attempt that resumes: in its first save."""
    description: str
    """`before the rename of state.tmp to state.pt`."""
    second: Strike | None = None
    """In an attempt that resumes: in its second save; None: not known."""
    temporary: bool = False
    """True if its file gets its own name later, by a rename."""


def chosen(places: Sequence[Place], count: int, seed: int) -> list[Place]:
    """Choose places spread over a save; all, in their order, if there are no more than that."""
    if len(places) <= count:
        return list(places)
    marked = [Boundary(number, place.later.phase, place.description) for number, place in enumerate(places)]
    return [places[one.number] for one in sample(marked, count, seed)]


def changes(calls: Sequence[Call], paths: str, *, calls_seen: bool) -> list[Call]:
    """List the changes of a checkpoint's files.

    Without each call, those that end a file's writing: chance tells how many writes are seen.

    Args:
        calls: The calls of an attempt.
        paths: A regular expression of the checkpoint's paths.
        calls_seen: True if each call is seen.
    """
    return [call for call in points(calls, only=(paths,)) if calls_seen or call.name in ("close", "rename")]


class Changes:
    """Counts how often an attempt has changed the checkpoint's files so far, from its trace."""

    def __init__(self, trace: Path, paths: str, wanted: int, *, calls_seen: bool = True) -> None:
        """Begin with none.

        Args:
            trace: The attempt's trace.
            paths: A regular expression of the checkpoint's paths.
            wanted: How many changes are enough.
            calls_seen: True if each call is in the trace.
        """
        self._calls_seen = calls_seen
        self._trace, self._paths, self._left, self._read = trace, paths, wanted, 0

    def enough(self) -> bool:
        """True once there were enough."""
        if self._left > 0:
            calls, self._read = read_from(self._trace, self._read)
            self._left -= len(changes(calls, self._paths, calls_seen=self._calls_seen))
        return self._left <= 0


def lost_work(life: Life) -> bool:
    """True if an attempt did not resume, though it could have; one that read a checkpoint first is not sure yet."""
    return life.resume.outcome == LOST_WORK and life.resume.dropped is None


def resumed_from(life: Life) -> str | None:
    """Name what an attempt resumed from, for a table; None if that was not seen."""
    if life.resume.dropped is not None:
        return f"{life.resume.dropped.label}, read and started over"
    if life.resume.outcome == LOST_WORK:
        return "nothing: LOST WORK" if life.resume.used is None else f"{life.resume.used.label}: LOST WORK"
    if life.resume.outcome in (FIRST, NOTHING_THERE):
        return "nothing"
    return life.resume.used.label if life.resume.used else None


# -- the verdict -----------------------------------------------------------------------------------------------------


def judge(learnt: Learnt, lives: Sequence[Life], same: bool) -> Verdict | None:
    """Judge whether the attempts resumed; None if they did, at least once where a start from nothing would show.

    Args:
        learnt: What is known of the run's files.
        lives: The attempts of a leg.
        same: True if the leg's result is the undisturbed run's.
    """
    for life in lives:
        resume = life.resume
        if resume.outcome == LOST_WORK and (same or resume.dropped is None):
            kind = LOST if resume.dropped is None else READ_AND_DROPPED
            text = f"LOST WORK: in attempt {life.number}, {resume.why}"
            return Verdict(False, True, text, kind, remedy=_of_lost_work(resume).remedy)
    if not same:
        return None
    if lives and _went_on_from_parts(lives[-1]):
        parts = ", ".join(one.path for one in lives[-1].resume.read) or lives[-1].start.incomplete[-1].largest
        why = f"attempt {lives[-1].number} found an incomplete save ({parts}) and saved nothing after it"
        return Verdict(
            False, False, f"not checked: {why}, so its result does not show what comes of that; train longer"
        )
    # What is only counted shows in the attempt that ran to its end: the others may all have read it and dropped it.
    as_from_nothing = lives[-1].resume.as_from_nothing if lives else False
    if not as_from_nothing and any(life.resume.proof and not life.resume.mixed for life in lives):
        return None
    saves = learnt.saves and not learnt.only_at_the_end
    remedy = "" if saves else remedies.NEVER_SAVES.remedy
    return Verdict(False, False, f"not checked: {_no_proof(learnt, lives)}", remedy=remedy)


def _of_lost_work(resume: Resume) -> Finding:
    if resume.newest is None:
        return remedies.DESTROYED
    if any(one.cut for one in resume.read):
        return remedies.HALF_WRITTEN
    return remedies.NOT_USED if resume.used is None else remedies.OLDER_USED


def _went_on_from_parts(life: Life) -> bool:
    """True if an attempt may have gone on from an incomplete save, and no save of its own depended on that."""
    used = life.resume.used
    whole = used is not None and used.complete is not None
    return life.start.partly and not whole and not any(save.complete is not None for save in life.saves)


def _no_proof(learnt: Learnt, lives: Sequence[Life]) -> str:
    if not learnt.journal and (learnt.only_at_the_end or not learnt.saves):
        return "the task saves nothing before its end, so a preemption loses all of its work"
    doubts = [life.resume.doubt for life in lives if life.resume.doubt]
    if doubts:
        return doubts[0]
    if any(life.resume.outcome == NOTHING_THERE for life in lives):
        return "every strike came before its first checkpoint was complete; train longer, or save more often"
    return "no attempt began with a checkpoint that it could resume from"


def cause(learnt: Learnt, lives: Sequence[Life], logs: Cause | None = None) -> Cause | None:
    """Name the likeliest cause of a wrong result, from what the attempts read and wrote; None if nothing tells.

    Args:
        learnt: What is known of the run's files.
        lives: The attempts of a leg.
        logs: What its logs tell.
    """
    for before, life in zip((None, *lives), lives, strict=False):
        if found := _cause_of_one(learnt, life.resume):
            return remedies.not_in_time(found, before is not None and before.cut_off)
    at_notice = next((two.resume.used for one, two in pairwise(lives) if _is_at_notice(one, two)), None)
    if at_notice:
        saved = f"{at_notice.largest} ({at_notice.label}), which was saved at SIGTERM or a notice"
        text = f"{logs.text}, after a resume from {saved}" if logs else f"a resume from {saved}"
        return Cause(text, remedies.AT_NOTICE)
    other = next((found for life in lives if (found := _else(life.resume))), None)
    if other and (logs is None or logs.finding is remedies.NO_CAUSE):
        return other
    if logs:
        used = next((life.resume.used for life in lives if life.resume.used), None)
        return Cause(f"{logs.text}, after a resume from {used.largest}", logs.finding) if used else logs
    if learnt.irregular:
        text = "its saves come at irregular steps, as on a new best: what came after the last one is done again"
        return Cause(text, remedies.IRREGULAR)
    return None


def cause_of_failure(learnt: Learnt, lives: Sequence[Life]) -> Cause | None:
    """Name why the last attempt failed, from what it read: a half-written file, or parts of two saves."""
    resume = lives[-1].resume if lives else None
    found = _cause_of_one(learnt, resume) if resume and (resume.mixed or any(one.cut for one in resume.read)) else None
    return remedies.not_in_time(found, len(lives) > 1 and lives[-2].cut_off) if found else None


def _else(resume: Resume) -> Cause | None:
    """Name what an attempt passed over, or read of another time than its checkpoint."""
    used = resume.used
    if used is None:
        return None
    name = f"{used.largest} ({used.label})"
    if resume.passed_over:
        return Cause(f"it read nothing of {name}, and went on after it", remedies.NOT_USED)
    if resume.skipped:
        saves = f"{resume.skipped} save{'s' if resume.skipped > 1 else ''}"
        return Cause(f"it trains fewer steps than asked: {saves} fewer than the undisturbed run", remedies.FEWER_STEPS)
    if resume.best:
        text = f"{resume.best} was written at the first save after {name}, unlike in the undisturbed run"
        return Cause(text, remedies.BEST_LOST)
    if resume.beside:
        return Cause(f"{resume.beside}, which it read too, was written after {name}", remedies.MIXED)
    return None


def _is_at_notice(one: Life, two: Life) -> bool:
    """True if an attempt resumed from what the one before it had saved at its notice or signal."""
    return one.at_notice is not None and two.resume.used == one.at_notice


def _cause_of_one(learnt: Learnt, resume: Resume) -> Cause | None:
    """Name what was wrong with one attempt's start."""
    if resume.mixed:
        files = " and ".join(f"{one.path} of {one.save}" for one in resume.mixed)
        return Cause(f"a mixed pair of files of two saves: {files}", remedies.MIXED)
    cut = [one.path for one in resume.read if one.cut]
    if cut:
        return Cause(f"{cut[0]} was half written, and was read all the same", remedies.HALF_WRITTEN)
    if resume.dropped is not None or resume.more:
        return Cause(_more(learnt, resume.more, resume.dropped), remedies.MORE_STEPS)
    if resume.used is not None and resume.used.missing:
        were = "was" if len(resume.used.missing) == 1 else "were"
        missing = f"{_names(resume.used.missing)} of {resume.used.label} {were} missing, and it went on without"
        return Cause(missing, remedies.NOT_READ)
    if resume.unread:
        were = "was" if len(resume.unread) == 1 else "were"
        return Cause(f"{_names(resume.unread)} {were} not read", remedies.NOT_READ)
    return None


def _more(learnt: Learnt, more: int, dropped: Save | None) -> str:
    if dropped is not None and learnt.journal:
        return f"it trains more steps than asked: after reading {learnt.journal} it appended as much as a whole run"
    if dropped is not None:
        return (
            f"it trains more steps than asked: after reading {dropped.largest} it made as many saves as a whole run "
            f"({len(learnt.saves)}); `N more` instead of `N in all`"
        )
    return f"it trains more steps than asked: {more} save{'s' if more > 1 else ''} beyond the undisturbed run's last"


def _names(paths: Sequence[str]) -> str:
    return " and ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")
