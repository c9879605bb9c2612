"""One training loop, for classifiers of series: resumable, honest about validation.

The epoch is chosen on a stratified part of the *training* split; the loop never sees a test
split. With a few dozen series every one counts: ``refit=True`` then starts over and trains on
all of them for the number of epochs that the validation part chose.

The same seed on the same machine and number of threads gives the same weights, bit for bit;
between machines floating point differs, and so may a borderline series.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tstlens import storage
from tstlens.arguments import checked, needs_gradients
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError, SeriesValueError, UnknownNameError
from tstlens.randomness import seeded
from tstlens.training.augment import Augment
from tstlens.training.evaluation import labels_of
from tstlens.training.run import OPTIMIZERS, SCHEDULES, Run
from tstlens.training.split import stratified_split

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a training run went; the weights are in the model that was passed.

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

    def to_dataframe(self) -> pandas.DataFrame:
        """The history, one row per epoch."""
        import pandas

        return pandas.DataFrame(self.history)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return dataclasses.asdict(self)


@checked
@needs_gradients
@torch.enable_grad()
def train(
    model: nn.Module,
    data: TimeSeriesData,
    *,
    val: TimeSeriesData | None = None,
    val_fraction: float = 0.2,
    epochs: int = 100,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    label_smoothing: float = 0.0,
    clip_norm: float | None = 1.0,
    seed: int = 0,
    augment: Augment | None = None,
    select: str = "best_val",
    refit: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a classifier in place, on the device it is on.

    Args:
        model: ``model(series)`` gives logits [batch, class]; ``model(series, mask=mask)`` is
            called where the data have a mask.
        data: the training split. Never pass a test split, here or as ``val``.
        val: series to choose the epoch with; by default a stratified part of ``data``.
        val_fraction: of ``data`` to hold out if ``val`` is None; 0 for none.
        epochs: passes over the series; with ``refit``, the most that may be chosen.
        batch_size: series per step.
        lr: learning rate, the peak of the schedule.
        weight_decay: as the optimiser defines it.
        optimizer: "adamw", "adam", "radam", "nadam" or "sgd", from ``torch.optim``.
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
        checkpoint: a folder to keep the run's progress in after every epoch. A run found there
            is continued, and ends with the same weights as one that was never interrupted; one of
            another model, other data or settings is refused.
        progress: whether to show a bar with loss and accuracy.

    Returns:
        A TrainingResult.

    Raises:
        ArgumentError: a value that is not possible, model, data or settings other than the
            checkpoint's, or a loss that is no longer finite.
        StorageError: the checkpoint cannot be written, or another run is writing to it.
        UnknownNameError: an optimiser, schedule or selection that does not exist.
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
    settings = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "data", "val", "augment", "checkpoint", "progress")
    }
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("model: expected parameters to train, got none that take a gradient")
    settings["augment"] = None if augment is None else dataclasses.asdict(augment)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    settings["model"] = {"class": type(model).__name__, "n_parameters": n_parameters}
    settings["data"] = _fingerprint(data)
    settings["val"] = None if val is None else _fingerprint(val)
    _check(data, val, settings, augment)
    folder = None if checkpoint is None else Path(checkpoint)
    made = {}
    if folder is not None:
        parts = {"model": model.state_dict(), "data": _tensors(data), "val": _tensors(val)}
        made = storage.fingerprint(**parts)
    fit_part, val_part = data, val
    if val is None and val_fraction > 0:
        kept, held = stratified_split(labels_of(data), val_fraction, seed)
        fit_part, val_part = data[kept], data[held]

    started = time.monotonic()
    with storage.claimed(folder), seeded(seed):
        run = Run(model, settings, made, augment, folder, progress)
        if run.phase == "fit":
            run.go(fit_part, val_part, epochs)
            run.finish_fit(select)
        if refit:
            run.go(data, None, run.best_epoch)
    model.eval()
    return TrainingResult(run.history, run.best_epoch, settings, time.monotonic() - started)


def _check(
    data: TimeSeriesData,
    val: TimeSeriesData | None,
    settings: dict[str, Any],
    augment: Augment | None,
) -> None:
    for name, known in (
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("select", ("best_val", "last")),
    ):
        if settings[name] not in known:
            raise UnknownNameError(settings[name], known, f"this names the {name} of train()")
    for name in ("epochs", "batch_size"):
        if settings[name] < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {settings[name]}")
    for name in ("weight_decay", "val_fraction"):
        if settings[name] < 0:
            raise ArgumentError(f"{name}: expected 0 or more, got {settings[name]}")
    if not 0 <= settings["label_smoothing"] <= 1:
        raise ArgumentError(f"label_smoothing: expected 0 to 1, got {settings['label_smoothing']}")
    held_out = val is not None or settings["val_fraction"] > 0
    if settings["select"] == "best_val" and not held_out:
        raise ArgumentError(
            "select: 'best_val' needs series to choose with; give val or a val_fraction above 0, "
            "or select='last'"
        )
    if settings["refit"] and (val is not None or not held_out):
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
