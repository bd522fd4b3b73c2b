"""What a run trains on and with, chosen by rank 0: which prepared data, and which commit of a model of the Hub.

One rule holds for data that was prepared: the run goes on with it, and says so where its source has changed or is gone.
Only what a command line asks for in so many words (another --data, --allow-config-change data_key) is other data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.attempt.binding import first_binding
from trainer.attempt.history import RECORDS_S
from trainer.bucket.deadlines import read_manifest
from trainer.finetune import data
from trainer.finetune.model import ModelFiles, find_model, fingerprint
from trainer.finetune.sources import DataError
from trainer.finetune.tokens import DamagedError, copied, manifest_of
from trainer.layout.documents import LayoutError
from trainer.layout.manifest import Manifest

if TYPE_CHECKING:
    from trainer.finetune.config import TrainConfig
    from trainer.training.run import SpotRun

TRAIN = "train.bin"


@dataclass(frozen=True)
class Prepared:
    """A whole folder of prepared data."""

    folder: str
    manifest: Manifest

    @property
    def hash(self) -> str:
        """What it is the same data by."""
        return self.manifest.files[TRAIN].hash


class Inputs:
    """Rank 0: finds or prepares what the attempt needs, on this machine's disk, and binds the run to it."""

    def __init__(self, run: SpotRun, config: TrainConfig, held: ExitStack) -> None:
        """Choose nothing yet.

        Args:
            run: The attempt.
            config: What it asks for.
            held: Gets to hold the copy of the data on this machine.
        """
        self.run, self.config, self.held = run, config, held
        self.recorded: Mapping[str, Any] = {}
        """What bound the run first."""
        named = run.newest.facts.get("tokens") if run.newest else None
        self.named = named if isinstance(named, str) else None
        """The folder that the newest checkpoint was trained from."""
        self.local: Path | None = None
        self.model = ModelFiles(None)

    def choose(self) -> dict[str, Any]:
        """Which folder of prepared data and which commit of the model all ranks use; the data is copied here then."""
        self.recorded = self._recorded()
        kept = self._kept()
        is_other = bool(kept) and self._is_other_data(kept[0])
        self.model = self._find_model()
        prepared = self._prepared_anew([], None) if is_other else self._first_undamaged(kept)
        self._bind(prepared)
        return {"tokens": prepared.folder, "model_revision": self.model.revision}

    def _recorded(self) -> Mapping[str, Any]:
        run, attempt = self.run, self.run.attempt
        assert attempt
        first = run.ask(lambda: first_binding(run.paths, attempt, run.newest), RECORDS_S)
        return first or {}

    def _find_model(self) -> ModelFiles:
        """The model's files, of the commit that the run began with."""
        same_name = self.recorded.get("model") == self.config.model
        revision = self.recorded.get("model_revision") if same_name else None
        return find_model(self.config.model, revision, self.run.check_stop)

    def _bind(self, prepared: Prepared) -> None:
        run, facts = self.run, prepared.manifest.facts
        if "model" in self.config.allow_config_change:
            run.allowed |= {"model_files", "model_revision"}
        # Without a checkpoint no step was kept that was trained on other data.
        if not self.named or "data_key" in run.allowed:
            run.allowed |= {"data_key", "data_hash", "data_revision"}
        same_name = self.recorded.get("model") == self.config.model
        known = {
            "data_key": facts["key"],
            "data_hash": prepared.hash,
            "data_revision": facts.get("data_revision"),
            "model_revision": self.model.revision,
            # A folder that has changed in place is no other model: its weights are in the checkpoint.
            "model_files": (self.recorded.get("model_files") if same_name else None) or fingerprint(self.config.model),
        }
        run.bind(**{name: value for name, value in known.items() if value is not None})

    def _kept(self) -> list[Prepared]:
        """The whole folders of data that was prepared for this run, the one in use first."""
        paths, expected = self.run.paths, self.recorded.get("data_hash")

        def look() -> list[Prepared]:
            found = []
            if self.named and (manifest := data.whole_manifest(paths, self.named)):
                found.append(Prepared(self.named, manifest))
            if key := self.recorded.get("data_key"):
                others = [Prepared(*one) for one in data.whole_folders(paths, str(key)) if one[0] != self.named]
                found += [one for one in others if expected in (None, one.hash)]
            return found

        return self.run.ask(look, RECORDS_S)

    def _is_other_data(self, kept: Prepared) -> bool:
        """Whether this attempt shall train on other data than was prepared; says it where the source has changed.

        Raises:
            Leaving: other data is asked for, and not allowed.
        """
        run, config, facts = self.run, self.config, kept.manifest.facts
        try:
            key = data.data_key(config)
            same_files = data.data_key(config, str(facts["tokenizer"])) == facts["key"]
        except (DataError, OSError) as error:
            run.say(f"{error}. The run goes on with the data that was prepared for it.")
            return False
        if key == facts["key"]:
            return False
        if facts["seq_len"] != config.seq_len or "data_key" in config.allow_config_change:
            run.allowed.add("data_key")  # The length of a sample binds by itself.
            return True
        if same_files:
            run.say(
                f"--model was {facts['tokenizer']} when the data was prepared. The run goes on with the data that was "
                "prepared for it."
            )
            return False
        if facts["source"] == config.data:
            run.say(
                f"--data {config.data} has changed since this run began. The run goes on with the data that was "
                "prepared for it; --allow-config-change data_key takes the new data."
            )
            return False
        if self.named:
            run.bind(data_key=key)  # Refuses.
        return True

    def _first_undamaged(self, kept: list[Prepared]) -> Prepared:
        """Data that was prepared, copied to this machine; made again where all of it is damaged."""
        damage = []
        for prepared in kept:
            try:
                self._copy(prepared)
                return prepared
            except DamagedError as error:
                damage.append(str(error))
        if self.named and not kept:
            damage.append(f"{self.run.paths.tokens / self.named} is missing or not whole")
        return self._prepared_anew(damage, self._expected(kept), {prepared.folder for prepared in kept})

    def _expected(self, kept: list[Prepared]) -> str | None:
        """What data that is made again has to hash to; None where nothing tells, or nothing was trained on it."""
        if not self.named or "data_key" in self.config.allow_config_change:
            return None
        if known := self.recorded.get("data_hash"):
            return str(known)
        if kept:
            return kept[0].hash
        with suppress(LayoutError):
            return Prepared(self.named, self.run.ask(lambda: read_manifest(self.run.paths.tokens / self.named))).hash
        return None

    def _prepared_anew(self, damage: list[str], expected: str | None, avoid: Collection[str] = ()) -> Prepared:
        """Prepare the data from its source, and copy it to this machine.

        Raises:
            DataError: it cannot be prepared, or is not what the run was trained on so far.
        """
        run, config = self.run, self.config
        assert run.attempt
        attempt = run.attempt.name

        def work() -> str:
            return data.prepare(
                run.paths, attempt, config, run.check_stop, model=self.model, avoid=avoid, say=run.say,
                revision=self.recorded.get("data_revision"),
            )  # fmt: skip

        try:
            folder = str(run.ask(work, math.inf))
        except DataError as error:
            if damage and self.named:
                raise DataError(f"{damage[0]}, and it cannot be made again: {error}") from None
            raise
        prepared = Prepared(folder, run.ask(lambda: manifest_of(run.paths, folder, run.check_stop), math.inf))
        if expected and prepared.hash != expected:
            raise DataError(
                f"{damage[0]}, and --data {config.data} has changed since: it cannot be made again. Restore that "
                "folder, or go on with the data as it is now with --allow-config-change data_key"
            )
        if damage:
            same = "the same data" if expected else "whether it is the same data is not known"
            run.say(f"{damage[0]}. Made again from --data {config.data}: {same}.")
        self._copy(prepared)
        return prepared

    def _copy(self, prepared: Prepared) -> None:
        run = self.run

        def work() -> Path:
            return self.held.enter_context(copied(run.paths, prepared.folder, prepared.manifest, run.check_stop))

        self.local = run.ask(work, math.inf)
