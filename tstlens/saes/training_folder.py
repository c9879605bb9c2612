"""A training's folder on disk: the last checkpoint, whole or not there at all, and the result.

A checkpoint holds what sae-lens writes (weights, optimiser, schedules, input scale) and how far the
stream has got. It is written beside its place and renamed into it; ``latest.json`` names it and
holds the SHA-256 of its files.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer

from tstlens import storage
from tstlens.errors import CorruptFileError, StorageError

LATEST = "latest.json"
_STREAM = "stream.pt"
_DONE = "sae"
_OVER = "delete the folder to start over"


class TrainingFolder:
    """Where a training keeps its progress.

    Args:
        folder: made if missing.
        settings: what the training depends on; a folder of other settings is refused.
        made: fingerprint of the activations; a folder of others is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], made: dict[str, str]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.made = made

    def finished(self) -> SAE[Any] | None:
        """The SAE of a training that ended, or None."""
        latest = self._latest()
        if latest is None or latest["name"] != _DONE:
            return None
        self._check(latest)
        if "fingerprint" in latest:
            storage.check_same_run(self.folder, latest["fingerprint"], self.made)
        else:
            warnings.warn(
                f"checkpoint: {self.folder} holds an SAE from an older tstlens, which did not "
                "record on which activations it was trained; where that is in doubt, give another "
                "folder",
                stacklevel=4,
            )
        with storage.reading(self.folder, "holds no SAE that sae-lens can load", _OVER):
            return SAE.load_from_disk(self.folder / _DONE)

    def resume(self, trainer: SAETrainer[Any, Any], stream: Any) -> bool:
        """Put trainer and stream where the last checkpoint was; False where there is none.

        Raises:
            CorruptFileError: a file of the checkpoint is truncated or altered, by name.
            StorageError: the checkpoint belongs to a training with other settings.
        """
        latest = self._latest()
        if latest is None:
            return False
        self._check(latest)
        storage.check_same_run(self.folder, latest.get("fingerprint"), self.made)
        path = self.folder / latest["name"]
        with storage.reading(path, "holds no whole checkpoint", _OVER):
            trainer.sae.load_weights_from_checkpoint(path)
            trainer.load_trainer_state(path)
            state = storage.read_torch(path / _STREAM, "a stream's place", _OVER)
            torch.set_rng_state(state["random"])
            if hasattr(stream, "load_state_dict"):
                stream.load_state_dict(state["stream"])
        if not hasattr(stream, "load_state_dict"):
            for _ in range(state["batches"]):
                next(stream)
        return True

    def save(self, trainer: SAETrainer[Any, Any], stream: Any, batches: int) -> None:
        """Write a checkpoint and forget the one before."""
        name = f"step-{trainer.n_training_steps:08d}"
        position = stream.state_dict() if hasattr(stream, "state_dict") else {}
        state = {"stream": position, "batches": batches, "random": torch.get_rng_state()}

        def write(staging: Path) -> None:
            trainer.save_checkpoint(staging.name, base_path=staging.parent)
            storage.write_torch(staging / _STREAM, state)

        self._put(name, write)

    def finish(self, sae: SAE[Any]) -> None:
        """Keep the result in place of the checkpoints."""
        self._put(_DONE, sae.save_model)

    def _put(self, name: str, write: Callable[[Path], Any]) -> None:
        with storage.staged(self.folder / name, "a checkpoint", keep=False) as staging:
            write(staging)
        parts = sorted((self.folder / name).iterdir())
        record = {
            "name": name,
            "settings": self.settings,
            "fingerprint": self.made,
            "sha256": {part.name: storage.digest(part) for part in parts},
        }
        storage.write_text(self.folder / LATEST, storage.json_text(record, "settings", indent=1))
        for other in self.folder.glob("step-*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def _latest(self) -> dict[str, Any] | None:
        path = self.folder / LATEST
        if not path.exists():
            return None
        latest = storage.read_json(path, "a training's record", _OVER)
        with storage.reading(path, "is not a training's record", _OVER):
            settings = dict(latest["settings"])
            digests = dict(latest["sha256"])
            if latest["name"] != Path(latest["name"]).name or not digests:
                raise ValueError("it names no folder in here, or no files")
        if settings != self.settings:
            changed = sorted(
                key
                for key in {*settings, *self.settings}
                if settings.get(key) != self.settings.get(key)
            )
            raise StorageError(
                f"{self.folder} holds a training with other settings (different: "
                f"{', '.join(changed)}); choose another folder, or delete this one"
            )
        return latest

    def _check(self, latest: dict[str, Any]) -> None:
        for name, recorded in latest["sha256"].items():
            path = self.folder / latest["name"] / Path(name).name
            if not storage.regular(path):
                raise CorruptFileError(f"{path} is missing, truncated or altered; {_OVER}")
            storage.check_digest(path, recorded, LATEST, _OVER)
