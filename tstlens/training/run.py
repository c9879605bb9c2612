"""One run of the training loop: the state that a step depends on, and the step.

``loop.train`` drives this; everything that changes from epoch to epoch lives here, so that a
checkpoint can hold all of it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.shapes import Labels, Mask, Series
from tstlens.training.augment import Augment
from tstlens.training.diverging import LastGood
from tstlens.training.evaluation import device_of, evaluate, labels_of
from tstlens.training.progress import load_progress, save_progress

OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "radam": "RAdam", "nadam": "NAdam", "sgd": "SGD"}
SCHEDULES = ("constant", "cosine", "onecycle")


class Run:
    """The state of one run: all of it is in ``state()``, which is what a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Any],
        made: dict[str, str],
        augment: Augment | None,
        folder: Path | None,
        progress: bool,
    ) -> None:
        self.model, self.settings, self.augment = model, settings, augment
        self.made, self.folder, self.progress = made, folder, progress
        self.device = device_of(model) or torch.device("cpu")
        self.phase, self.epoch, self.best_epoch = "fit", 0, 0
        self.history: list[dict[str, Any]] = []
        self.initial = copy.deepcopy(model.state_dict())
        self.best: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(settings["seed"])
        self.restored = None if folder is None else load_progress(folder, settings, made)
        if self.restored is not None:
            for name in ("phase", "epoch", "best_epoch", "history", "initial", "best"):
                setattr(self, name, self.restored[name])
            model.load_state_dict(self.restored["model"])

    def go(self, data: TimeSeriesData, val: TimeSeriesData | None, epochs: int) -> None:
        """Train the present phase to its end, from wherever it stands."""
        batches = _Batches.of(data, self.device)
        steps = math.ceil(len(data) / self.settings["batch_size"])
        self.optimizer = _optimizer(self.model, self.settings)
        self.schedule = _schedule(self.optimizer, self.settings, epochs * steps)
        if self.restored is not None:
            self._restore_engine(self.restored)
            self.restored = None
        good = LastGood(self.model, self.settings["lr"])
        bar = tqdm(
            total=epochs * steps,
            initial=self.epoch * steps,
            desc="training" if self.phase == "fit" else "refitting",
            unit="step",
            disable=not self.progress,
        )
        with bar:
            while self.epoch < epochs:
                rate = self.optimizer.param_groups[0]["lr"]
                loss, accuracy = self._epoch(batches, bar, good)
                self.epoch += 1
                row = {"phase": self.phase, "epoch": self.epoch, "lr": rate}
                row |= {"train_loss": loss, "train_accuracy": accuracy}
                row |= {"val_loss": None, "val_accuracy": None}
                if val is not None:
                    try:
                        checked = evaluate(self.model, val)
                    except ArgumentError:  # of the shapes that were trained on, but not finite
                        good.refuse(f"logits are no longer finite after epoch {self.epoch}")
                    row |= {"val_loss": checked.cross_entropy, "val_accuracy": checked.accuracy}
                good.keep(f"after epoch {self.epoch}")
                self._record(row)
                shown = {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.3f}"}
                if row["val_accuracy"] is not None:
                    shown["val_accuracy"] = f"{row['val_accuracy']:.3f}"
                bar.set_postfix(shown, refresh=False)
                if self.folder is not None:
                    save_progress(self.folder, self.settings, self.made, self.state())

    def finish_fit(self, select: str) -> None:
        """Choose the epoch; then either keep its weights or make ready to start over."""
        if select == "last":
            self.best_epoch = self.epoch
        if self.settings["refit"]:
            self.model.load_state_dict(self.initial)
            self.phase, self.epoch = "refit", 0
            self.generator.manual_seed(self.settings["seed"])
            torch.manual_seed(self.settings["seed"])
        elif select == "best_val":
            self.model.load_state_dict(self.best)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        state = {
            name: getattr(self, name)
            for name in ("phase", "epoch", "best_epoch", "history", "initial", "best")
        }
        state |= {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore_engine(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def _epoch(self, batches: _Batches, bar: Any, good: LastGood) -> tuple[float, float]:
        self.model.train()
        size, n = self.settings["batch_size"], len(batches.labels)
        total, correct = 0.0, 0
        order = torch.randperm(n, generator=self.generator).to(self.device)
        for start in range(0, n, size):
            index = order[start : start + size]
            series, targets = batches.series[index], batches.targets[index]
            if self.augment is not None:
                series, targets = self.augment(series, targets, batches.spread, self.generator)
            if batches.mask is None:
                logits = self.model(series)
            else:
                logits = self.model(series, mask=batches.mask[index])
            if not torch.is_tensor(logits) or logits.shape != targets.shape:
                came = list(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
                raise ArgumentError(
                    f"model: expected logits {list(targets.shape)}, one per class name of the "
                    f"data, got {came}"
                )
            loss = F.cross_entropy(
                logits, targets, label_smoothing=self.settings["label_smoothing"]
            )
            good.check_loss(loss.item(), f"in epoch {self.epoch + 1}")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.settings["clip_norm"] is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["clip_norm"])
            self.optimizer.step()
            self.schedule.step()
            total += loss.item() * len(index)
            correct += int((logits.argmax(dim=1) == targets.argmax(dim=1)).sum())
            bar.update(1)
        return total / n, correct / n

    def _record(self, row: dict[str, Any]) -> None:
        """Add an epoch to the history and keep its weights if it is the best so far."""
        before = [past for past in self.history if past["phase"] == row["phase"]]
        self.history.append(row)
        if row["val_loss"] is None or self.settings["select"] != "best_val":
            return
        rank = (row["val_accuracy"], -row["val_loss"])
        if all((past["val_accuracy"], -past["val_loss"]) < rank for past in before):
            self.best_epoch = self.epoch
            self.best = copy.deepcopy(self.model.state_dict())


@dataclasses.dataclass(frozen=True)
class _Batches:
    """What batches are cut from, on the model's device."""

    series: Series
    labels: Labels
    targets: Float[Tensor, "batch class"]
    mask: Mask | None
    spread: Float[Tensor, " channel"]

    @classmethod
    def of(cls, data: TimeSeriesData, device: torch.device) -> _Batches:
        series, labels = data.series.to(device), labels_of(data).to(device)
        mask = None if data.mask is None else data.mask.to(device)
        seen = torch.ones_like(series[:, 0], dtype=torch.bool) if mask is None else mask
        samples = series.transpose(1, 2)[seen]  # [observed samples, channel]
        targets = F.one_hot(labels, len(data.class_names)).to(series.dtype)
        return cls(series, labels, targets, mask, samples.std(dim=0))


def _optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    kind = getattr(torch.optim, OPTIMIZERS[settings["optimizer"]])
    extra = {"momentum": 0.9} if settings["optimizer"] == "sgd" else {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(trained, lr=settings["lr"], weight_decay=settings["weight_decay"], **extra)


def _schedule(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedules = torch.optim.lr_scheduler
    if settings["schedule"] == "cosine":
        return schedules.CosineAnnealingLR(optimizer, T_max=steps)
    if settings["schedule"] == "onecycle":
        return schedules.OneCycleLR(
            optimizer, max_lr=settings["lr"], total_steps=steps + 1, cycle_momentum=False
        )
    return schedules.ConstantLR(optimizer, factor=1.0)
