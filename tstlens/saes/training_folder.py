"""A training's folder on disk: the last checkpoint, whole or not there at all, and the result.

A checkpoint holds what sae-lens writes (weights, optimiser, schedules, input scale) and how far the
stream has got. It is written beside its place and renamed into it; ``latest.json`` names it and
holds the SHA-256 of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer

from tstlens.errors import CorruptFileError, StorageError

LATEST = "latest.json"
_STREAM = "stream.pt"
_DONE = "sae"


class TrainingFolder:
    """Where a training keeps its progress.

    Args:
        folder: made if missing.
        settings: what the training depends on; a folder of other settings is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"checkpoint: {folder} cannot be written: {error.strerror or error}; name a folder"
            ) from error

    def finished(self) -> SAE[Any] | None:
        """The SAE of a training that ended, or None."""
        latest = self._latest()
        if latest is None or latest["name"] != _DONE:
            return None
        self._check(latest)
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
        path = self.folder / latest["name"]
        trainer.sae.load_weights_from_checkpoint(path)
        trainer.load_trainer_state(path)
        state = torch.load(path / _STREAM, weights_only=True)
        torch.set_rng_state(state["random"])
        if hasattr(stream, "load_state_dict"):
            stream.load_state_dict(state["stream"])
        else:
            for _ in range(state["batches"]):
                next(stream)
        return True

    def save(self, trainer: SAETrainer[Any, Any], stream: Any, batches: int) -> None:
        """Write a checkpoint and forget the one before."""
        name = f"step-{trainer.n_training_steps:08d}"
        beside = self._beside(name)
        trainer.save_checkpoint(beside.name, base_path=self.folder)
        position = stream.state_dict() if hasattr(stream, "state_dict") else {}
        state = {"stream": position, "batches": batches, "random": torch.get_rng_state()}
        torch.save(state, beside / _STREAM)
        self._put(beside, name)

    def finish(self, sae: SAE[Any]) -> None:
        """Keep the result in place of the checkpoints."""
        beside = self._beside(_DONE)
        sae.save_model(beside)
        self._put(beside, _DONE)

    def _beside(self, name: str) -> Path:
        beside = self.folder / f".{name}.{os.getpid()}"
        shutil.rmtree(beside, ignore_errors=True)
        return beside

    def _put(self, beside: Path, name: str) -> None:
        digests = {part.name: _sha256(part) for part in sorted(beside.iterdir())}
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(beside, self.folder / name)
        record = {"name": name, "settings": self.settings, "sha256": digests}
        written = self.folder / f".{LATEST}.{os.getpid()}"
        written.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(written, self.folder / LATEST)
        for other in [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]:
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def _latest(self) -> dict[str, Any] | None:
        path = self.folder / LATEST
        if not path.is_file():
            return None
        try:
            latest = json.loads(path.read_text(encoding="utf-8"))
            settings = latest["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path} is not a training's record; delete it") from error
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
        for name, digest in latest["sha256"].items():
            path = self.folder / latest["name"] / name
            if not path.is_file() or _sha256(path) != digest:
                raise CorruptFileError(
                    f"{path} is missing, truncated or altered; delete {self.folder} to start over"
                )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
