"""One training loop, for classifiers of series: resumable, honest about validation.

The epoch is chosen on a stratified part of the *training* split; the loop never sees a test
split. With a few dozen series every one counts: ``refit=True`` then starts over and trains on
all of them for the number of epochs that the validation part chose.

The same seed on the same machine and number of threads gives the same weights, bit for bit;
between machines floating point differs, and so may a borderline series.

One run of the training loop: the state that a step depends on, and the step.

``loop.train`` drives this; everything that changes from epoch to epoch lives here, so that a
checkpoint can hold all of it.

What a training run keeps on disk, so that an interrupted run can go on.

One file, replaced atomically: a run that dies while writing leaves the previous one whole.

Fits that diverge: an error, and the weights as they last were finite.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tstlens import storage
from tstlens.arguments import (
    Count,
    Positive,
    Seed,
    check_fields,
    checked,
    configured,
    needs_gradients,
)
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError, SeriesValueError
from tstlens.randomness import seeded
from tstlens.results import TableResult
from tstlens.shapes import Labels, Mask, Series
from tstlens.training.augment import Augment
from tstlens.training.evaluation import device_of, evaluate, labels_of
from tstlens.training.split import stratified_split


class LastGood:
    """What a fit trains in place, and its last finite weights.

    Args:
        module: what is trained.
        lr: learning rate, for the error.
    """

    def __init__(self, module: nn.Module, lr: float) -> None:
        self.module, self.lr = module, lr
        self.state: Mapping[str, Any] = copy.deepcopy(module.state_dict())

    def check_loss(self, loss: float, when: str) -> None:
        """Before a step is taken by it.

        Raises:
            ArgumentError: the loss is not finite; the last finite weights are put back.
        """
        if not math.isfinite(loss):
            self.refuse(f"the loss is no longer finite {when} (it was {loss})")

    def keep(self, when: str) -> None:
        """Look at the weights and remember them.

        Raises:
            ArgumentError: they are not finite; the last ones that were are put back.
        """
        if not all_finite(self.module):
            self.refuse(f"the weights are no longer finite {when}")
        self.state = copy.deepcopy(self.module.state_dict())

    def refuse(self, what: str) -> NoReturn:
        """Put the last finite weights back and raise :class:`ArgumentError`."""
        self.module.load_state_dict(self.state, strict=False)  # something may be spliced in
        self.module.eval()
        raise ArgumentError(
            f"lr: {what}; try a lower lr than {self.lr:g}. The last finite weights were put back"
        )


def all_finite(module: nn.Module) -> bool:
    """Whether every weight is finite."""
    return all(bool(weight.isfinite().all()) for weight in module.parameters())


FILE_NAME = "progress.pt"


def save_progress(
    folder: Path, settings: Mapping[str, Any], made: Mapping[str, str], state: Mapping[str, Any]
) -> None:
    """Write the settings, fingerprint and state of a run, or leave what was there untouched."""
    kept = {"settings": json.dumps(settings), "fingerprint": dict(made), "state": dict(state)}
    storage.write_torch(folder / FILE_NAME, kept)


def load_progress(
    folder: Path, settings: Mapping[str, Any], made: Mapping[str, str]
) -> dict[str, Any] | None:
    """The state of the run kept in a folder; None where there is none.

    Args:
        folder: where.
        settings: of the run that is to go on, as JSON values.
        made: its :func:`tstlens.storage.fingerprint`: of the model it begins with and the data.

    Raises:
        ArgumentError: the folder holds a run with other settings, of another model or of other
            data; the message names them. Or one from before that was recorded.
        CorruptFileError: the file is not whole.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    again = "delete it to start anew"
    kept = storage.read_torch(path, "the progress of a training run: the file is not whole", again)
    with storage.reading(path, "is not the whole progress of a training run", again):
        then, state = dict(json.loads(kept["settings"])), dict(kept["state"])
    now = json.loads(json.dumps(settings))
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        pairs = (f"{name}: {then.get(name)} then, {now.get(name)} now" for name in different)
        listed = "; ".join(pairs)
        raise ArgumentError(
            f"checkpoint: {path} holds a run with other settings ({listed}); "
            "use the same ones to go on, or another folder to start anew"
        )
    storage.check_same_run(path, kept.get("fingerprint"), made)
    return state


OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "radam": "RAdam", "nadam": "NAdam", "sgd": "SGD"}


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
            with self._reading():
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

    def _reading(self) -> AbstractContextManager[None]:
        folder = self.folder or Path()
        return storage.reading(folder, "holds no whole progress of this run", "start it over")

    def _restore_engine(self, state: dict[str, Any]) -> None:
        with self._reading():
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


@dataclasses.dataclass(frozen=True)
class TrainingResult(TableResult):
    """How a training run went; the weights are in the model that was passed.

    ``figure()`` draws loss, accuracy and learning rate over the epochs.

    Args:
        history: one dict per epoch: phase ("fit", or "refit" on every series), epoch (from 1),
            lr, train_loss (nats, on augmented series), train_accuracy, val_loss, val_accuracy
            (None without a validation part).
        best_epoch: the epoch whose weights, or in a refit whose number, was selected.
        settings: the arguments of the run, as plain JSON values.
        seconds: wall-clock time of this call; a resumed run counts from its resumption.
    """

    history: list[dict[str, Any]]
    best_epoch: int
    settings: dict[str, Any]
    seconds: float

    def _rows(self) -> list[dict[str, Any]]:
        return self.history

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How :func:`train` trains.

    Args:
        val_fraction: of the data to hold out, stratified; 0 for none. Not where ``val`` is given.
        epochs: passes over the series; with ``refit``, the most that may be chosen.
        batch_size: series per step.
        lr: learning rate, the peak of the schedule.
        weight_decay: as the optimiser defines it.
        optimizer: from ``torch.optim``.
        schedule: "cosine" to zero, "onecycle" (a rise over 30 % of the steps, then cosine) or
            "constant"; changes at every step.
        label_smoothing: probability spread evenly over the classes.
        clip_norm: largest norm of the gradient; None for no limit.
        seed: of the split, the shuffles, the augmentation and dropout. The model's own
            initialisation happened before. The global random state is put back afterwards.
        augment: variation of the training batches; None for none.
        select: "best_val" leaves the weights with the best validation accuracy (ties: the
            lower loss), "last" those of the last epoch.
        refit: after choosing the number of epochs, start over from the initial weights and
            train on every series for that number, the schedule fitted to it.
    """

    val_fraction: Annotated[float, Ge(0)] = 0.2
    epochs: Count = 100
    batch_size: Count = 32
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.01
    optimizer: Literal["adamw", "adam", "radam", "nadam", "sgd"] = "adamw"
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    label_smoothing: Annotated[float, Ge(0), Le(1)] = 0.0
    clip_norm: Positive | None = 1.0
    seed: Seed = 0
    augment: Augment | None = None
    select: Literal["best_val", "last"] = "best_val"
    refit: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@checked
@configured(TrainConfig)
@needs_gradients
@torch.enable_grad()
def train(
    model: nn.Module,
    data: TimeSeriesData,
    config: TrainConfig | None = None,
    *,
    val: TimeSeriesData | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> TrainingResult:
    """Train a classifier in place, on the device it is on.

    Args:
        model: ``model(series)`` gives logits [batch, class]; ``model(series, mask=mask)`` is
            called where the data have a mask.
        data: the training split. Never pass a test split, here or as ``val``.
        config: how; the defaults of :class:`TrainConfig` where None.
        val: series to choose the epoch with; by default a stratified part of ``data``.
        checkpoint: a folder to keep the run's progress in after every epoch. A run found there
            is continued, and ends with the same weights as one that was never interrupted; one of
            another model, other data or settings is refused.
        progress: whether to show a bar with loss and accuracy.
        **settings: fields of :class:`TrainConfig`, in place of those of ``config``.

    Returns:
        A TrainingResult.

    Raises:
        ArgumentError: a value that is not possible, model, data or settings other than the
            checkpoint's, or a loss that is no longer finite.
        StorageError: the checkpoint cannot be written, or another run is writing to it.
        SeriesValueError: NaN or infinity in the series.
        LabelError: a label outside the classes.
        CorruptFileError: a checkpoint that is not whole.

    Example:
        >>> from tstlens.data import load_dataset
        >>> from tstlens.training import ConvTST
        >>> data = load_dataset("ItalyPowerDemand", split="train")
        >>> model = ConvTST(n_channels=1, n_time=24, n_classes=2, conv_channels=(16, 16, 32))
        >>> result = train(model, data, epochs=2, progress=False)
        >>> len(result.history)
        2
    """
    config = config or TrainConfig()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("model: expected parameters to train, got none that take a gradient")
    settings = dataclasses.asdict(config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    settings["model"] = {"class": type(model).__name__, "n_parameters": n_parameters}
    settings["data"] = _fingerprint(data)
    settings["val"] = None if val is None else _fingerprint(val)
    _check(data, val, config)
    folder = None if checkpoint is None else Path(checkpoint)
    made = {}
    if folder is not None:
        parts = {"model": model.state_dict(), "data": _tensors(data), "val": _tensors(val)}
        made = storage.fingerprint(**parts)
    fit_part, val_part = data, val
    if val is None and config.val_fraction > 0:
        kept, held = stratified_split(labels_of(data), config.val_fraction, config.seed)
        fit_part, val_part = data[kept], data[held]

    started = time.monotonic()
    with storage.claimed(folder), seeded(config.seed):
        run = Run(model, settings, made, config.augment, folder, progress)
        if run.phase == "fit":
            run.go(fit_part, val_part, config.epochs)
            run.finish_fit(config.select)
        if config.refit:
            run.go(data, None, run.best_epoch)
    model.eval()
    return TrainingResult(run.history, run.best_epoch, settings, time.monotonic() - started)


def _check(data: TimeSeriesData, val: TimeSeriesData | None, config: TrainConfig) -> None:
    held_out, augment = val is not None or config.val_fraction > 0, config.augment
    if config.select == "best_val" and not held_out:
        raise ArgumentError(
            "select: 'best_val' needs series to choose with; give val or a val_fraction above 0, "
            "or select='last'"
        )
    if config.refit and (val is not None or not held_out):
        raise ArgumentError(
            "refit: expected a val_fraction above 0 and no val, since a refit trains on the "
            "series that were held out of data"
        )
    if augment is not None and augment.moves_time and data.mask is not None:
        raise ArgumentError(
            "augment: window, shift and mixup move samples, which the data's mask would not "
            "follow; use jitter and scale, or series of equal length"
        )
    if val is not None and val.class_names != data.class_names:
        raise LabelError(
            f"expected val with the classes of data in their order, {list(data.class_names)}, got "
            f"{list(val.class_names)}; give class_names= where val is made"
        )
    for part in (data,) if val is None else (data, val):
        if not bool(part.series.isfinite().all()):
            raise SeriesValueError("expected finite series, got NaN or infinity; fill them first")
        n_classes = len(part.class_names)
        labels = labels_of(part)
        if len(part) == 0 or int(labels.min()) < 0 or int(labels.max()) >= n_classes:
            raise LabelError(
                f"expected at least one label, all in 0..{n_classes - 1}, "
                f"got {sorted(set(labels.tolist()))[:20]}"
            )


def _tensors(data: TimeSeriesData | None) -> Any:
    return None if data is None else [data.series, data.labels, data.mask]


def _fingerprint(data: TimeSeriesData) -> dict[str, Any]:
    """Enough of the data to notice that a checkpoint was made from others."""
    content = data.series.cpu().contiguous().numpy().tobytes()
    content += labels_of(data).cpu().contiguous().numpy().tobytes()
    if data.mask is not None:
        content += data.mask.cpu().contiguous().numpy().tobytes()
    return {"shape": list(data.series.shape), "crc32": zlib.crc32(content)}
