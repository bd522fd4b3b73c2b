"""The inputs of an attempt, chosen by rank 0: prepared data, and the commit of a model of the Hub.

A run continues with the data that was prepared for it, and prints a line if the source has changed or disappeared. It
uses other data only on an explicit request: another --data, or --allow-config-change data_key.
"""

from __future__ import annotations

import dataclasses
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
from trainer.finetune.model import ModelFiles, find_model, fingerprint, seq_len_for
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
        """The hash that identifies the data."""
        return self.manifest.files[TRAIN].hash


class Inputs:
    """Finds or prepares the inputs on rank 0's disk, and binds the run to them."""

    def __init__(self, run: SpotRun, config: TrainConfig, stack: ExitStack) -> None:
        """Prepare to choose.

        Args:
            run: The attempt.
            config: The settings of the attempt.
            stack: Will own the copy of the data on this machine.
        """
        self.run, self.config, self.stack = run, config, stack
        self.recorded: Mapping[str, Any] = {}
        """The fields that the run was first bound to."""
        named = run.newest.facts.get("tokens") if run.newest else None
        self.named = named if isinstance(named, str) else None
        """The folder of prepared data that the newest checkpoint was trained on."""
        self.local: Path | None = None
        self.model = ModelFiles(None)

    def choose(self) -> dict[str, Any]:
        """Choose the prepared data and the commit of the model for all ranks; copies the data to this machine."""
        self.recorded = self._recorded()
        self.model = self._find_model()
        self._choose_seq_len()
        existing = self._existing()
        is_other = bool(existing) and self._is_other_data(existing[0])
        prepared = self._prepared_anew([], None) if is_other else self._first_undamaged(existing)
        self._bind(prepared)
        return {
            "tokens": prepared.folder,
            "model_revision": self.model.revision,
            "seq_len": self.config.tokens_per_sample,
        }

    def _recorded(self) -> Mapping[str, Any]:
        run, attempt = self.run, self.run.attempt
        assert attempt
        first = run.retry(lambda: first_binding(run.paths, attempt, run.newest), RECORDS_S)
        return first or {}

    def _find_model(self) -> ModelFiles:
        """The files of the model, at the commit that the run began with."""
        same_name = self.recorded.get("model") == self.config.model
        revision = self.recorded.get("model_revision") if same_name else None
        return find_model(self.config.model, revision, self.run.check_stop)

    def _choose_seq_len(self) -> None:
        """Settle a default --seq-len, now that the model is known.

        Raises:
            Leaving: the run was started with another one; the attempt is refused.
        """
        if self.config.seq_len is not None:
            return
        run, default = self.run, self.config.tokens_per_sample
        self.config = dataclasses.replace(self.config, seq_len=seq_len_for(self.config, self.model))
        if self.config.tokens_per_sample < default:
            run.print_line(
                f"--model {self.config.model} has {self.config.seq_len} positions: --seq-len is {self.config.seq_len}, "
                f"not the default of {default}."
            )
        run.binding["seq_len"] = self.config.seq_len  # Recorded with the rest (`_bind`).
        run.refuse_other_binding()

    def _bind(self, prepared: Prepared) -> None:
        run, facts = self.run, prepared.manifest.facts
        if "model" in self.config.allow_config_change:
            run.allowed |= {"model_files", "model_revision"}
        # Without a checkpoint, no saved step was trained on other data.
        if not self.named or "data_key" in run.allowed:
            run.allowed |= {"data_key", "data_hash", "data_revision"}
        same_name = self.recorded.get("model") == self.config.model
        known = {
            "data_key": facts["key"],
            "data_hash": prepared.hash,
            "data_revision": facts.get("data_revision"),
            "model_revision": self.model.revision,
            # A folder that changed in place is still the same model: the weights are in the checkpoint.
            "model_files": (self.recorded.get("model_files") if same_name else None) or fingerprint(self.config.model),
        }
        run.bind(**{name: value for name, value in known.items() if value is not None})

    def _existing(self) -> list[Prepared]:
        """All whole folders of data that was prepared for this run; the folder in use comes first."""
        paths, expected = self.run.paths, self.recorded.get("data_hash")

        def look() -> list[Prepared]:
            found: list[Prepared] = []
            if self.named and (manifest := data.whole_manifest(paths, self.named)):
                found.append(Prepared(self.named, manifest))
            if key := self.recorded.get("data_key"):
                others = [Prepared(*one) for one in data.whole_folders(paths, str(key)) if one[0] != self.named]
                found += [one for one in others if expected in (None, one.hash)]
            return found

        found: list[Prepared] = self.run.retry(look, RECORDS_S)
        return found

    def _is_other_data(self, existing: Prepared) -> bool:
        """True if this attempt should train on other data; prints a line if the source has changed.

        Raises:
            Leaving: other data is requested but not allowed.
        """
        run, config, facts = self.run, self.config, existing.manifest.facts
        try:
            source = data.local_source(config, run.check_stop)
        except (DataError, OSError) as error:
            run.print_line(f"{error}. The run continues with the data that was prepared for it.")
            return False
        key = data.data_key(config, source)
        if key == facts["key"]:
            return False
        if facts["seq_len"] != config.tokens_per_sample or "data_key" in config.allow_config_change:
            run.allowed.add("data_key")  # The length of a sample is bound separately.
            return True
        if data.data_key(config, source, str(facts["tokenizer"])) == facts["key"]:
            run.print_line(
                f"--model was {facts['tokenizer']} when the data was prepared. The run continues with the data that "
                "was prepared for it."
            )
            return False
        if facts["source"] == config.data:
            run.print_line(
                f"--data {config.data} has changed since this run began. The run continues with the data that was "
                "prepared for it; to use the new data, pass --allow-config-change data_key."
            )
            return False
        if self.named:
            run.bind(data_key=key)  # Raises Leaving.
        return True

    def _first_undamaged(self, existing: list[Prepared]) -> Prepared:
        """Copy prepared data to this machine; prepare it again if every folder is damaged."""
        damage = []
        for prepared in existing:
            try:
                self._copy(prepared)
                return prepared
            except DamagedError as error:
                damage.append(str(error))
        if self.named and not existing:
            damage.append(f"{self.run.paths.tokens / self.named} is missing or incomplete")
        return self._prepared_anew(damage, self._expected(existing), {prepared.folder for prepared in existing})

    def _expected(self, existing: list[Prepared]) -> str | None:
        """The hash that data prepared again must have; None if it is unknown or nothing was trained on the data."""
        if not self.named or "data_key" in self.config.allow_config_change:
            return None
        if known := self.recorded.get("data_hash"):
            return str(known)
        if existing:
            return existing[0].hash
        folder = self.run.paths.tokens / self.named
        with suppress(LayoutError):
            return Prepared(self.named, self.run.retry(lambda: read_manifest(folder))).hash
        return None

    def _prepared_anew(self, damage: list[str], expected: str | None, avoid: Collection[str] = ()) -> Prepared:
        """Prepare the data from its source and copy it to this machine.

        Raises:
            DataError: the data cannot be prepared, or differs from the data that the run was trained on.
        """
        run, config = self.run, self.config
        assert run.attempt
        attempt = run.attempt.name

        def work() -> str:
            return data.prepare(
                run.paths, attempt, config, run.check_stop, model=self.model, avoid=avoid, print_line=run.print_line,
                revision=self.recorded.get("data_revision"),
            )  # fmt: skip

        try:
            folder = str(run.retry(work, math.inf))
        except DataError as error:
            if damage and self.named:
                raise DataError(f"{damage[0]}, and the data cannot be prepared again: {error}") from None
            raise
        prepared = Prepared(folder, run.retry(lambda: manifest_of(run.paths, folder, run.check_stop), math.inf))
        if expected and prepared.hash != expected:
            raise DataError(
                f"{damage[0]}, and --data {config.data} has changed since, so the data cannot be prepared again. "
                "Restore that folder, or pass --allow-config-change data_key to use the data as it is now"
            )
        if damage:
            result = "the hash is the same" if expected else "the former hash is unknown"
            run.print_line(f"{damage[0]}. Prepared again from --data {config.data}; {result}.")
        self._copy(prepared)
        return prepared

    def _copy(self, prepared: Prepared) -> None:
        run = self.run

        def work() -> Path:
            return self.stack.enter_context(copied(run.paths, prepared.folder, prepared.manifest, run.check_stop))

        self.local = run.retry(work, math.inf)
