"""Fitting codebooks: to the activations of a frozen model, or together with the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tstlens import storage
from tstlens.arguments import checked, needs_gradients
from tstlens.codebooks.codebook import Codebook
from tstlens.codebooks.config import CodebookConfig, GradientMode, Similarity
from tstlens.codebooks.fitting_run import FitRun, Settings
from tstlens.codebooks.starting import Start, start
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HookedTST

if TYPE_CHECKING:
    import pandas as pd


class FittedCodebooks(dict[str, Codebook]):
    """Hook point -> codebook, with how the fit went.

    Args:
        books: the codebooks.
        history: one dict per epoch: epoch, k, task (mean loss, None for a frozen model),
            reconstruction and commitment (mean squared error over the activation's variance), dead
            (codes that no position used), perplexity (mean over groups and hook points), revived.
        settings: the arguments of the fit, as plain JSON values.
    """

    @checked
    def __init__(
        self, books: dict[str, Codebook], history: list[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        super().__init__(books)
        self.history, self.settings = history, settings

    def to_dataframe(self) -> pd.DataFrame:
        """The history, one row per epoch."""
        import pandas as pd

        return pd.DataFrame(self.history)


@checked
@needs_gradients
@torch.enable_grad()
def fit(
    model: HookedTST,
    data: TimeSeriesData,
    hooks: Iterable[str],
    *,
    n_codes: int = 256,
    k: int = 1,
    n_groups: int = 0,
    similarity: Similarity = "cosine",
    normalize: bool = False,
    gradient: GradientMode = "both",
    train_model: bool = False,
    target: Tensor | None = None,
    epochs: int = 20,
    batch_size: int = 32,
    accumulate: int = 1,
    lr: float = 3e-4,
    codebook_lr: float = 3e-3,
    reconstruction: float = 1.0,
    commitment: float = 0.25,
    begin_from: Start = "kmeans",
    k_start: int | None = None,
    k_epochs: int | None = None,
    revive: bool = True,
    ema: float | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    clip_norm: float | None = 1.0,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> FittedCodebooks:
    """Fit one codebook per hook point, and leave them on the model.

    With ``train_model=False`` the model is frozen, every codebook is fitted to the activations of
    the model as it was (not to what other codebooks make of them), and the model loses whatever
    the codes miss. With ``train_model=True`` model and codebooks learn together, on the task's
    loss through the codes plus the two terms below, so that the model comes to say what it needs
    in codes; it is then another model than before, and what is found in it is found in that one.

    Args:
        model: changed in place; no codebooks may be on it.
        data: series of the training split, labels for a classifier. Padded positions take no part.
        hooks: hook points, see :meth:`HookedTST.add_codebook`.
        n_codes: entries per table.
        k: codes active at once, summed.
        n_groups: tables per hook point; 0 is one per head at q, k, v and z, else one.
        similarity: see :class:`CodebookConfig`.
        normalize: see :class:`CodebookConfig`.
        gradient: what trains the tables: ``"task"``, ``"reconstruction"`` or ``"both"``.
        train_model: learn together (end to end), or fit the tables of a frozen model.
        target: true values [batch, channel, horizon] for a forecaster, with ``train_model``.
        epochs: passes over the series.
        batch_size: series per step.
        accumulate: equal parts that a step's series run in, for less memory; the step is the same.
        lr: learning rate of the model.
        codebook_lr: of the tables, in units of the activation's standard deviation.
        reconstruction: weight of the squared error that trains the tables, relative to the
            activation's variance at the start.
        commitment: weight of the squared error that draws activations to their codes.
        begin_from: ``"kmeans"``, ``"sample"`` or ``"normal"``, see :func:`start`.
        k_start: codes active in the first epoch, falling (geometrically) to ``k``.
        k_epochs: epochs until ``k`` is reached; half of them where None.
        revive: replace codes that an epoch did not use by activations, but for the last epoch.
        ema: decay of a moving average of what each code stood for, which then makes the tables
            (and no gradient does: ``gradient`` must be ``"reconstruction"``).
        precision: of the model's forward pass; codebooks always run in full precision.
        clip_norm: largest norm of the model's gradient; None for no limit.
        seed: of the order, the start and the revivals.
        folder: keeps progress after every epoch; a fit found there is continued, one of another
            model, other data or settings is refused.
        progress: show a bar.

    Returns:
        Hook point -> codebook, with ``history``. They are on the model too:
        ``model.save_pretrained(folder)`` keeps both, and :func:`load` reads them.

    Raises:
        HookError: codebooks are on the model already.
        ArgumentError: options that exclude each other, neither labels nor target, or a folder with
            another fit.
        StorageError: the folder cannot be written, or another fit is writing to it.
        UnknownHookError: the model has no such hook point.

    Source: Tamkin, Taufeeque, Goodman 2023 (arXiv 2310.17230); moving averages: van den Oord et
    al. 2017 (arXiv 1711.00937).

    Example:
        >>> from tstlens import HookedTST, codebooks, load_dataset
        >>> model = HookedTST.from_pretrained("italy-power-demand")
        >>> books = codebooks.fit(model, load_dataset("ItalyPowerDemand", split="train"),
        ...     ["blocks.0.hook_mlp_out"], n_codes=16, epochs=2, progress=False)
        >>> list(books), list(model.acts_to_codebooks)
        (['blocks.0.hook_mlp_out'], ['blocks.0.hook_mlp_out'])
    """
    if isinstance(hooks, str):
        raise ArgumentError(f"expected several hook points, got one; give hooks=[{hooks!r}]")
    names = list(hooks)
    if not names or len(set(names)) != len(names):
        raise ArgumentError(f"expected one or more different hook points, got {names}")
    if model.acts_to_codebooks:
        raise HookError(
            f"codebooks are on the model already, at {', '.join(model.acts_to_codebooks)}; "
            "model.reset_codebooks() first"
        )
    if not train_model and gradient == "task":
        raise ArgumentError(
            "a frozen model's tables learn from the reconstruction; gradient='task' is for "
            "train_model=True"
        )
    if ema is not None and (gradient != "reconstruction" or not 0 < ema < 1):
        raise ArgumentError(
            "with ema= (0 to 1) the tables follow the activations, so give "
            f"gradient='reconstruction'; got ema={ema}, gradient={gradient!r}"
        )
    if train_model and data.labels is None and target is None:
        raise ArgumentError("expected data with labels, or target= for a forecaster, got neither")
    if train_model and target is None:
        data = data.for_model(model)
    if target is not None and (not train_model or len(target) != len(data)):
        raise ArgumentError(
            f"target= holds the true values of the {len(data)} series, for train_model=True; got "
            f"{len(target)} with train_model={train_model}"
        )
    for name, weight in (("reconstruction", reconstruction), ("commitment", commitment)):
        if weight < 0:
            raise ArgumentError(f"expected {name} of 0 or more, got {weight}")
    k_start = k if k_start is None else k_start
    settings = Settings(
        hooks=tuple(names),
        k=k,
        k_start=k_start,
        gradient=gradient,
        train_model=train_model,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        codebook_lr=codebook_lr,
        reconstruction=reconstruction,
        commitment=commitment,
        k_epochs=k_epochs or max(1, epochs // 2),
        revive=revive,
        ema=ema,
        precision=precision,
        clip_norm=clip_norm,
        seed=seed,
        n_codes=n_codes,
        n_groups=n_groups,
        similarity=similarity,
        normalize=normalize,
        begin_from=begin_from,
    )
    config = CodebookConfig(
        n_codes=n_codes,
        k=k_start,
        n_groups=n_groups,
        similarity=similarity,
        normalize=normalize,
        gradient=gradient,
        seed=seed,
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        device=str(model.cfg.device),
    )
    place, made = None if folder is None else Path(folder), {}
    if place is not None:
        given = [data.series, data.labels, data.mask, target]
        made = storage.fingerprint(model=model.state_dict(), data=given)
    with storage.claimed(place):
        books = start(model, data, names, config, begin_from, seed)
        run = FitRun(model, data, target, books, settings)
        history = run.train(place, made, progress)
    for name, book in books.items():
        metadata = book.cfg.metadata
        metadata.model_name = model.cfg.model_name
        metadata.dataset_path = " ".join(part for part in (data.name, data.split) if part)
        metadata.tstlens_fit = settings.to_dict()
        model.add_codebook(book, name)
    return FittedCodebooks(books, history, settings.to_dict())
