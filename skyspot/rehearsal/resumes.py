"""The verdict on each attempt's start, from what it read, the saves that it made, and what lay there when it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skyspot.rehearsal import rework
from skyspot.rehearsal.replay import Attempt, Reading, Version, Written
from skyspot.rehearsal.saves import Learnt, Save, State

RESUMED, LOST_WORK, NOTHING_THERE, NOT_SEEN, ALL_DONE, FIRST = (
    "resumed", "LOST WORK", "nothing to resume from", "not seen", "all done", "first",
)  # fmt: skip

_ONLY_ONE = "only one save was there to go on from"
_LOOKS_ALIKE = "a start from nothing would look the same"
_LATE, _TELLING_S = 3 / 4, 5.0
"""A first piece that comes after so much of the time which a run from nothing takes for those that lay there is late; a
machine's speed varies too much for less time than that."""


@dataclass(frozen=True)
class FileRead:
    """What an attempt read of one file that an earlier one had written, before it saved anything itself."""

    path: str
    read: int
    """Bytes, each counted once. The system reads ahead: of a small file that is all as soon as it is looked at."""
    size: int
    """Bytes."""
    whole: bool
    """All of it, up to some padding."""
    cut: bool
    """The file itself was not whole."""
    save: str
    """Label of the save that it belongs to; empty if it is no part of one."""
    seen: bool = True  # False: it was opened, and may have been mapped into memory.


@dataclass(frozen=True)
class Resume:
    """The verdict on one attempt's start."""

    outcome: str
    """
    resumed: it went on from `used`.
    LOST WORK: it did not, though a save was complete; or the only one had been destroyed by the next.
    nothing to resume from: no save was complete, and none had been destroyed.
    not seen: it was taken or left before it read or saved anything; no proof of anything.
    all done: the last save was there, and it had nothing left to do.
    first: the leg's first attempt.
    """
    why: str
    """One sentence, without its full stop."""
    used: Save | None
    """The save that it went on from."""
    newest: Save | None
    """The newest save that was complete when it began."""
    read: tuple[FileRead, ...]
    """The checkpoint's files that it read, in that order."""
    unread: tuple[str, ...]
    """Files of `used` that it did not read: an optimizer's, a generator's."""
    mixed: tuple[FileRead, ...]
    """What it read, if that was parts of several saves and none of them as a whole; otherwise empty."""
    more: int
    """Saves beyond the undisturbed run's last that it made; 0 if none, or if it is not sure."""
    dropped: Save | None = None
    """The save that it read, though its own saves are those of a run from nothing (LOST WORK). If its result differs
    from the undisturbed run's, it went on from it, and trained as many steps more as were asked for in all."""
    doubt: str = ""
    """Why `resumed` may be wrong: a start from nothing would look the same; empty if it would not."""
    skipped: int = 0
    """Saves of the undisturbed run that it passed over."""
    beside: str = ""
    """A file that it read too, and that was written after `used`; empty if there is none."""
    best: str = ""
    """A file of the best so far that it wrote at its first save, unlike the undisturbed run; empty if there is none."""
    passed_over: bool = False
    """True if it read nothing of `used`, and went on after it, as what looks only whether a file is there."""

    @property
    def as_from_nothing(self) -> bool:
        """True if a start from nothing would have made the same saves."""
        return self.doubt.endswith((_ONLY_ONE, _LOOKS_ALIKE))

    @property
    def proof(self) -> bool:
        """True if this start shows that the script resumes."""
        return self.outcome == RESUMED and not self.doubt and not self.mixed


@dataclass(frozen=True)
class Judge:
    """Judges one attempt after a leg's first, from what is known of it."""

    learnt: Learnt
    start: State
    made: Sequence[Save]
    """All saves of earlier attempts."""
    fresh: Sequence[Save]
    """Its own, numbered as if it had started from nothing."""
    written: Written
    attempt: Attempt
    extra: int
    """How many saves more the attempts before it may have made."""
    resumes: int
    """How many of these have resumed."""

    def judge(self) -> Resume:
        """The verdict on its start."""
        read = self._read()
        used, cut = self._used(read)
        newest = self.start.newest
        if newest is None:
            return self._without_a_save(read, used)
        if not self.attempt.reads_seen:
            over = newest.numbers and self._starts_over(newest)
            why = f"it {self._as_if_from_nothing()} though {self._name(newest)} was complete" if over else ""
            return self._say(LOST_WORK if over else NOT_SEEN, why, used=None, read=[])
        if used is None:
            return self._nothing_used(read, cut, newest)
        if self._starts_over(used):
            why = f"it read {self._name(used, read)} but {self._as_if_from_nothing()}"
            return self._say(LOST_WORK, why, used=None, read=read, dropped=used)
        if self.made.index(used) < self.made.index(newest):
            why = f"it went on from {self._name(used, read)} though {self._name(newest)} was complete"
            return self._say(LOST_WORK, why, used=used, read=read)
        return self._resumed(used, read)

    # Verdicts

    def _resumed(self, used: Save, read: list[Reading]) -> Resume:
        why = f"it read {self._name(used, read)}"
        cut = [one.path for one in read if self._is_cut(one.version) and self._save_of(one) is used]
        if cut:
            why += f", of which {', '.join(cut)} was cut"
        return self._say(RESUMED, why, used=used, read=read)

    def _without_a_save(self, read: list[Reading], used: Save | None) -> Resume:
        if used is not None and not self._starts_over(used):
            return self._resumed(used, read)
        destroyed = self.start.destroyed
        if destroyed is None or not self.attempt.reads_seen:
            return self._say(NOTHING_THERE, "no checkpoint was complete", used=None, read=read)
        if not self.fresh and not self.attempt.finished and not read:
            return self._say(NOT_SEEN, "it was taken before it read or saved anything", used=None, read=read)
        over = ", ".join(self.start.open_files) or (self.start.incomplete[-1].largest if self.start.incomplete else "")
        how = f"was destroyed while {over} was written" if over else "had been deleted"
        why = f"{self._name(destroyed)} was complete, but {how}, and no other checkpoint was left"
        return self._say(LOST_WORK, why, used=None, read=read)

    def _nothing_used(self, read: list[Reading], cut: list[Reading], newest: Save) -> Resume:
        if not self.fresh:
            if newest.index >= len(self.learnt.saves) and self.attempt.finished:
                return self._say(ALL_DONE, f"{self._name(newest)} was the last", used=None, read=read)
            what = f"it read {', '.join(one.path for one in cut)}, which was cut, and" if cut else "it read and"
            return self._say(NOT_SEEN, f"{what} saved nothing", used=None, read=read)
        if cut:
            paths = ", ".join(one.path for one in cut)
            why = f"it read {paths}, which was cut, and not {self._name(newest)}, which was complete"
            return self._say(LOST_WORK, why, used=None, read=read)
        if self._goes_on():
            why = f"it left {self._name(newest)} as it was and went on with {self.fresh[0].label}"
            return self._say(RESUMED, why, used=newest, read=read)
        part = f"it read only {', '.join(one.path for one in read)}" if read else "it read no checkpoint"
        why = f"{part} though {self._name(newest)} was complete"
        return self._say(LOST_WORK, why, used=None, read=read)

    def _say(
        self, outcome: str, why: str, *, used: Save | None, read: list[Reading], dropped: Save | None = None
    ) -> Resume:
        looked_at = {self.learnt.files.home(one.version) for one in read}
        of = dropped or used
        wanted = of.files if of and read else ()
        unread = tuple(file.path for file in wanted if file.path not in looked_at and file.size > 0)
        facts = tuple(self._fact(one) for one in read)
        more = rework.more(self.learnt, self.fresh, used, self.extra + 1) if self.attempt.finished else 0
        resumes = self.resumes + 1 if self.attempt.finished else 0
        skipped = rework.skipped(self.learnt, self.fresh, used, resumes) if used and read else 0
        mixed = self._mixed(read, facts)
        if mixed and outcome == RESUMED:
            why = f"it read {' and '.join(f'{one.path} of {one.save}' for one in mixed)}"
        passed_over = used is not None and not any(self._save_of(one) is used for one in read)
        doubt = self._doubt(used, passed_over=passed_over) if used and outcome == RESUMED else ""
        return Resume(
            outcome, why, used, self.start.newest, facts, unread, mixed, more, dropped, doubt, skipped,
            passed_over=passed_over,
        )  # fmt: skip

    def _fact(self, one: Reading) -> FileRead:
        version = one.version
        save = self._save_of(one)
        cut = version.number in self.written.cut
        return FileRead(one.path, one.size, version.size, one.whole, cut, save.label if save else "", one.seen)

    def _mixed(self, read: list[Reading], facts: tuple[FileRead, ...]) -> tuple[FileRead, ...]:
        saves = {save.begun_s: save for one in read if (save := self._save_of(one))}
        whole = any(save in self.start.complete for save in saves.values())
        paths = {one.path for one in facts}
        return facts if len(saves) > 1 and not whole and len(paths) == len(facts) and not self._numbered else ()

    @property
    def _numbered(self) -> bool:
        return bool(self.learnt.files.family and self.learnt.files.family.places)

    def _name(self, save: Save, read: Sequence[Reading] = ()) -> str:
        """A save's name, by the largest of its files, or of those that were read."""
        paths = {one.path: one.version.size for one in read if self._save_of(one) is save}
        return f"{max(paths, key=lambda path: paths[path]) if paths else save.largest} ({save.label})"

    # Evidence

    def _read(self) -> list[Reading]:
        """What it read of the checkpoint's files before it began to save."""
        family, files = self.learnt.files.family, self.learnt.files
        if family is None:
            return []
        first = min((save.begun for save in self.fresh), default=None)
        return [
            one
            for one in self.written.readings
            if files.kind_of(one.version) in family.kinds
            and (first is None or one.first < first)
            and not self._is_copied(one)
        ]

    def _save_of(self, one: Reading) -> Save | None:
        number = self.learnt.files.original(one.version).number
        return next((save for save in self.made if any(file.version == number for file in save.files)), None)

    def _is_cut(self, version: Version) -> bool:
        """True if a file was surely not whole: it was open, and shorter than the undisturbed run's."""
        kind = self.learnt.files.kind_of(version)
        sizes = [file.size for save in self.learnt.saves for file in save.files if file.kind == kind]
        return version.number in self.written.cut and version.size < min(sizes, default=0)

    def _is_copied(self, one: Reading) -> bool:
        """True if it was read only to be copied at the first save, not to go on from."""
        original = self.learnt.files.original
        copies = [new for new in self.written.versions if new is not one.version and original(new) is one.version]
        if not copies or one.opened > one.first:
            return False
        between = self.written.calls[one.first : copies[0].begun]
        return all(call.path == one.path for call in between)

    def _used(self, read: list[Reading]) -> tuple[Save | None, list[Reading]]:
        """(the save that it seems to have gone on from, the cut files that it read).

        Of several, the newest that it read as much of as of any: a script that verifies all of them, or falls back
        from the newest, is not called wrong for it. The saves that it makes then tell more.
        """
        cut = [one for one in read if self._is_cut(one.version)]
        amounts: dict[int, int] = {}
        for one in read:
            save = self._save_of(one)
            if save is None or one in cut or self._is_pointer(one, save):
                continue
            amounts[self.made.index(save)] = amounts.get(self.made.index(save), 0) + 1
        candidates = [self.made[order] for order in amounts]
        if not candidates:
            return None, cut
        most = max(amounts[self.made.index(save)] for save in candidates)
        best = [save for save in candidates if amounts[self.made.index(save)] == most]
        return self._as_its_saves_tell(max(best, key=self.made.index), candidates, read), cut

    @staticmethod
    def _is_pointer(one: Reading, save: Save) -> bool:
        """True if a file only names its save: a small one, beside one that holds far more."""
        largest = max(file.size for file in save.files)
        return one.version.size <= 4096 and one.version.size * 10 <= largest

    def _as_its_saves_tell(self, newest: Save, candidates: list[Save], read: list[Reading]) -> Save:
        """Of the saves that it read, the one that its first own save follows on."""
        own = next((save for save in self.fresh if save.numbers), None)
        if own is None or not newest.numbers or own.numbers > newest.numbers:
            return newest
        last_opened = max(read, key=lambda one: one.opened)
        whole = newest in self.start.complete
        if own.numbers == newest.numbers and whole and (self._save_of(last_opened) is newest or self._saves_at_once()):
            return newest  # Some scripts save the step again that they resumed from.
        older = [save for save in candidates if save.numbers and save.numbers < own.numbers]
        return max(older, key=self.made.index) if older else newest

    def _goes_on(self) -> bool:
        """True if it saved nothing that was saved before, and something that an undisturbed run saves later."""
        known = {save.numbers for save in self.learnt.saves if save.numbers}
        done = {save.numbers for save in self.made if save.complete is not None}
        own = {save.numbers for save in self.fresh}
        return done <= known and own <= known and not own & done

    def _saves_at_once(self) -> bool:
        """True if the undisturbed run saves before its first step."""
        return not any(self._first_numbers)

    def _starts_over(self, used: Save) -> bool:
        """True if its saves are those of a run from nothing, although it read one."""
        reference = self.learnt.saves
        own, told = self._numbered_save(), rework.is_numbered(self.learnt, self.fresh)
        if own is not None and used.numbers and reference and reference[0].numbers:
            # What is saved by the clock has other numbers each time: near the start is at the start.
            passed, done = (sum(save.numbers <= one.numbers for save in reference) for one in (own, used))
            return own.numbers < used.numbers and (own.numbers <= reference[0].numbers or 2 * passed < done)
        if (used.numbers and told) or not self.attempt.finished:
            return False
        # Counted: a resume from the k-th of n saves makes n - k, and one more if it saves again what it read.
        return (
            self._made == len(reference) and used.index > 1 + self.extra and not self._logs_tell_that_it_resumed(used)
        )

    def _doubt(self, used: Save, *, passed_over: bool) -> str:
        """Why a start that resumed proves nothing: it may have been one from nothing, or had no work left."""
        count = len(self.learnt.saves)
        if self.attempt.finished and not self._made and used.index >= count and not self.learnt.irregular:
            return f"it resumed from {self._name(used)}, its last, and had next to nothing left to do; train longer"
        if passed_over and self.attempt.finished and self._comes_late():
            return f"it went on with {self.fresh[0].label} as late as a run from nothing; {_LOOKS_ALIKE}"
        if not self.attempt.finished or self._logs_tell_that_it_resumed(used):
            return ""
        why = _ONLY_ONE if used.index <= 1 + self.extra else _LOOKS_ALIKE
        own = self._numbered_save()
        if own is not None:
            return f"it {self._as_if_from_nothing()}; {_ONLY_ONE}" if own.numbers == self._first_numbers else ""
        # Saves that come by the clock are not as many each time: it counts which of both they are nearer to.
        ahead = min(used.index, count) - self.extra
        return f"it {self._as_if_from_nothing()}; {why}" if 2 * (count - self._made) < max(1, ahead) else ""

    def _comes_late(self) -> bool:
        """True if its first save came when one from nothing makes it, as if it had done all again and written less."""
        own = self.fresh[0]
        same = next((save for save in self.learnt.saves if save.numbers == own.numbers), None)
        if same is None or self.attempt.began_s is None:
            return False
        first_s, same_s = (save.begun_s - self.learnt.began_s for save in (self.learnt.saves[0], same))
        spent_s = own.begun_s - self.attempt.began_s - first_s
        return same_s - first_s >= _TELLING_S and spent_s >= _LATE * (same_s - first_s)

    @property
    def _made(self) -> int:
        """How many complete saves it made."""
        return len([save for save in self.fresh if save.complete is not None])

    @property
    def _first_numbers(self) -> tuple[int, ...]:
        """The numbers of the undisturbed run's first save."""
        return self.learnt.saves[0].numbers if self.learnt.saves else ()

    def _numbered_save(self) -> Save | None:
        """Its first save with a number, if numbers tell how far the run is."""
        own = next((save for save in self.fresh if save.numbers), None)
        return own if rework.is_numbered(self.learnt, self.fresh) else None

    def _logs_tell_that_it_resumed(self, used: Save) -> bool:
        """True if it logged clearly less than the undisturbed run, as an attempt does that has less to do."""
        if not self.learnt.logged:
            return False
        share = self.learnt.files.logged(self.attempt.calls) / self.learnt.logged
        expected = 1 - used.index / max(1, len(self.learnt.saves))
        return share < (1 + 3 * expected) / 4  # A log by the clock varies: nearer to what is expected than half-way.

    def _as_if_from_nothing(self) -> str:
        own, count = self._numbered_save(), len(self.learnt.saves)
        if own is not None:
            again = " again" if any(save.numbers == own.numbers for save in self.made) else ""
            return f"wrote {own.label}{again} as its first save"
        many = "as many as the undisturbed run" if self._made == count else f"where the undisturbed run made {count}"
        return f"made {self._made} saves, {many}"
