"""Fitting codebooks: to the activations of a frozen model, or together with the model.

A table begins with real activations or the centroids of them; the loop is seeded and resumable and
leaves padding out; codes that no position uses get new entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor, nn
from tqdm.auto import trange

from tstlens import storage
from tstlens.arguments import (
    Amount,
    Count,
    Positive,
    Seed,
    Share,
    check_fields,
    checked,
    configured,
    needs_gradients,
)
from tstlens.codebooks.codebook import Codebook, CodebookConfig, GradientMode, Similarity, Snap
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HookedTST
from tstlens.randomness import seeded
from tstlens.results import Result
from tstlens.run import evaluating
from tstlens.saes.stream import ActivationRows
from tstlens.training.loop import LastGood, load_progress, save_progress

if TYPE_CHECKING:
    import pandas as pd


class Usage:
    """Counts of a codebook's codes, and recent activations to replace dead codes by.

    Args:
        book: the codebook.
        seed: of which activations are taken.
    """

    def __init__(self, book: Codebook, seed: int) -> None:
        self.book = book
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = torch.zeros(book.n_groups, book.n_codes, dtype=torch.long)
        self._recent: list[Tensor] = []

    @torch.no_grad()
    def see(self, snap: Snap, keep: Tensor | None) -> None:
        """Count a run's codes, one per position and group, and remember what they stood for."""
        self.counts += self.book.usage(snap.acts, keep).view_as(self.counts).cpu()
        given = snap.given.detach()
        given = given.flatten(0, -3) if keep is None else given[keep]
        self._recent = [*self._recent, given]
        while sum(map(len, self._recent[1:])) >= 4 * self.book.n_codes:
            self._recent.pop(0)

    @property
    def dead(self) -> int:
        """Codes that no position used since the last :meth:`begin`."""
        return int((self.counts == 0).sum())

    def perplexity(self) -> float:
        """2 to the entropy of code use, mean over groups: how many codes are used as if evenly."""
        return float(perplexity(self.counts).mean())

    def begin(self) -> None:
        """Count from zero again."""
        self.counts.zero_()

    @torch.no_grad()
    def revive(self, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Replace every dead code by a recent activation, drawn at random.

        Args:
            optimizer: whose running moments of the replaced entries start anew.

        Returns:
            How many were replaced.
        """
        if not self._recent:
            return 0
        recent, revived = torch.cat(self._recent), 0
        table = self.book.table
        for group, counts in enumerate(self.counts):
            dead = (counts == 0).nonzero()[:, 0]
            if not len(dead):
                continue
            drawn = torch.randperm(len(recent), generator=self.generator)[: len(dead)]
            dead = dead[: len(drawn)].to(table.device)
            table[group, dead] = (recent[drawn.to(recent.device), group] / self.book.k).to(table)
            if optimizer is not None:
                _forget(optimizer, table, group, dead)
            revived += len(dead)
        return revived

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "generator": self.generator.get_state(),
            "counts": self.counts,
            "recent": self._recent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.generator.set_state(state["generator"])
        self.counts, self._recent = state["counts"], list(state["recent"])


def perplexity(counts: Tensor) -> Tensor:
    """2 to the entropy (bits) of each row of counts."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return 2 ** -(share * share.clamp(min=1e-300).log2()).sum(-1)


def _forget(optimizer: torch.optim.Optimizer, table: Tensor, group: int, codes: Tensor) -> None:
    for kept in optimizer.state.get(table, {}).values():
        if isinstance(kept, Tensor) and kept.shape == table.shape:
            kept[group, codes] = 0


Start = Literal["kmeans", "sample", "normal"]
Weight = Annotated[float, Ge(0)]

MOST_ROWS = 50_000  # activations that k-means reads


@checked
def start(
    model: HookedTST,
    data: TimeSeriesData,
    hooks: Iterable[str],
    config: CodebookConfig,
    how: Start = "kmeans",
    seed: Seed = 0,
    batch_size: Count = 256,
) -> dict[str, Codebook]:
    """Codebooks for several hook points, their tables made of the model's activations.

    Nothing is trained, and nothing stays on the model: put them in with ``model.codebooks(...)``.

    Args:
        model: its activations as it is, with what is spliced in.
        data: series, with their mask; padded positions are left out.
        hooks: the hook points.
        config: of every codebook; ``d_in=0`` and ``n_groups=0`` ask the hook point.
        how: ``"kmeans"`` takes centroids, ``"sample"`` activations drawn without replacement,
            ``"normal"`` numbers drawn at random; group by group.
        seed: of the draw and of k-means.
        batch_size: series per forward pass.

    Returns:
        Hook point -> codebook.

    Raises:
        ArgumentError: fewer activations than codes.
        UnknownHookError: the model has no such hook point.

    Example:
        >>> from tstlens import HookedTST, codebooks, load_dataset
        >>> model = HookedTST.from_pretrained("italy-power-demand")
        >>> data = load_dataset("ItalyPowerDemand", split="train")
        >>> config = codebooks.CodebookConfig(n_codes=16, k=1)
        >>> list(codebooks.start(model, data, ["blocks.0.hook_mlp_out"], config))
        ['blocks.0.hook_mlp_out']
    """
    with model.codebooks():  # what is put in here comes out again
        books = model.add_codebooks(config, hooks)
    if how == "normal":
        return books
    for name, book in books.items():
        rows = activations(model, data, name, batch_size).view(-1, book.cfg.d_in)
        if how == "sample":
            book.sample(rows, seed)
        else:
            _centroids(book, rows, seed)
    return books


def activations(model: HookedTST, data: TimeSeriesData, hook: str, batch_size: int = 256) -> Tensor:
    """The observed activations of a hook point, [row, width], heads joined."""
    rows = ActivationRows(model, data, [hook])
    batches = torch.arange(len(rows)).split(batch_size)
    return torch.cat([rows(index)[0][hook] for index in batches])


@torch.no_grad()
@seeded(0)
def _centroids(book: Codebook, rows: Tensor, seed: int) -> None:
    """k-means in every group; with cosine similarity, of directions."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    book.sample(rows, seed)  # codes that no cluster takes keep an activation
    if len(rows) > MOST_ROWS:
        generator = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(len(rows), generator=generator)[:MOST_ROWS].to(rows.device)]
    given = book.as_seen(rows)
    for group in range(book.n_groups):
        part = given[:, group].double().cpu().numpy()
        points: Any = part
        if book.cfg.similarity == "cosine":
            points = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than codes
            options: dict[str, Any] = {"n_init": 1, "batch_size": 4096, "max_iter": 50}
            means = MiniBatchKMeans(book.n_codes, random_state=seed, **options).fit(points)
        of_row = means.predict(points)
        counts = np.bincount(of_row, minlength=book.n_codes)
        sums = np.zeros((book.n_codes, part.shape[1]))
        np.add.at(sums, of_row, part)
        taken = torch.as_tensor(counts > 0)
        centroids = torch.as_tensor(sums / np.maximum(counts, 1)[:, None])
        table = book.table[group]
        table[taken.to(table.device)] = centroids[taken].to(table) / book.k


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How codebooks are fitted; see :func:`fit`.

    Args:
        n_codes: entries per table.
        k: codes active at once, summed.
        n_groups: tables per hook point; 0 is one per head at q, k, v and z, else one.
        similarity: what the ``k`` codes are the largest of; see :class:`CodebookConfig`.
        normalize: snap activations less their mean over their standard deviation; see there.
        restore: with ``normalize``, put mean and scale back; see there.
        gradient: what trains the tables: ``"task"``, ``"reconstruction"`` or ``"both"``.
        train_model: learn together (end to end), or fit the tables of a frozen model.
        epochs: passes over the series.
        batch_size: series per step.
        accumulate: equal parts that a step's series run in, for less memory; the step is the same.
        lr: learning rate of the model.
        codebook_lr: of the tables, in units of the activation's standard deviation.
        weight_decay: of the tables: every step takes this share of ``codebook_lr`` off each entry,
            those of codes that are not used too, as AdamW does; 0 for none.
        reconstruction: weight of the squared error that trains the tables, relative to the
            activation's variance at the start.
        commitment: weight of the squared error that draws activations to their codes.
        begin_from: the first entries: ``"kmeans"`` or a ``"sample"`` of the activations, or random
            ``"normal"`` numbers; see :func:`start`.
        k_start: codes active in the first epoch, falling (geometrically) to ``k``.
        k_epochs: epochs until ``k`` is reached; half of them by default.
        revive: replace codes that an epoch did not use by activations, but for the last epoch.
        ema: decay of a moving average of what each code stood for, which then makes the tables
            (and no gradient does: ``gradient`` must be ``"reconstruction"``).
        precision: of the model's forward pass; codebooks always run in full precision.
        clip_norm: largest norm of the model's gradient; None for no limit.
        seed: of the order, the start and the revivals.

    Raises:
        ArgumentError: options that exclude each other.
    """

    n_codes: Count = 256
    k: Count = 1
    n_groups: Amount = 0
    similarity: Similarity = "cosine"
    normalize: bool = False
    restore: bool = True
    gradient: GradientMode = "both"
    train_model: bool = False
    epochs: Count = 20
    batch_size: Count = 32
    accumulate: Count = 1
    lr: Positive = 3e-4
    codebook_lr: Positive = 3e-3
    weight_decay: Weight = 0.0
    reconstruction: Weight = 1.0
    commitment: Weight = 0.25
    begin_from: Start = "kmeans"
    k_start: Count | None = None
    k_epochs: Count | None = None
    revive: bool = True
    ema: Share | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    clip_norm: Positive | None = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.k_start or self.k) < self.k:
            raise ArgumentError(
                f"the number of codes falls from k_start to k: expected k_start >= {self.k}, got "
                f"{self.k_start}"
            )
        if not self.train_model and self.gradient == "task":
            raise ArgumentError(
                "a frozen model's tables learn from the reconstruction; gradient='task' is for "
                "train_model=True"
            )
        if self.ema is not None and self.gradient != "reconstruction":
            raise ArgumentError(
                "with ema= the tables follow the activations, so give "
                f"gradient='reconstruction'; got ema={self.ema}, gradient={self.gradient!r}"
            )
        if self.ema is not None and self.weight_decay:
            raise ArgumentError("with ema= the tables have no step to decay in: weight_decay=0")

    def k_of(self, epoch: int) -> int:
        """Codes active in an epoch: from ``k_start`` to ``k`` in equal ratios."""
        first, over = self.k_start or self.k, self.k_epochs or max(1, self.epochs // 2)
        return max(self.k, round(first * (self.k / first) ** min(epoch / over, 1)))

    def book(self, model: HookedTST) -> CodebookConfig:
        """The configuration of every codebook."""
        ours = {one.name for one in fields(self)} & {one.name for one in fields(CodebookConfig)}
        shared: dict[str, Any] = {name: getattr(self, name) for name in ours} | {"k": self.k_of(0)}
        dtype, device = str(model.cfg.dtype).removeprefix("torch."), str(model.cfg.device)
        return CodebookConfig(**shared, dtype=dtype, device=device)

    def to_dict(self, hooks: Iterable[str]) -> dict[str, Any]:
        """Plain JSON values, with what None stands for."""
        kept = {k: v for k, v in asdict(self).items() if _SINCE.get(k, ...) != v}
        over = self.k_epochs or max(1, self.epochs // 2)
        return {**kept, "k_start": self.k_start or self.k, "k_epochs": over, "hooks": list(hooks)}


# Not recorded while they are what an older tstlens did, so that its fits can be gone on with.
_SINCE = {"weight_decay": 0.0, "restore": True}


class FitRun:
    """One fit: model, codebooks, optimisers and counts.

    Args:
        model: without codebooks; trained in place where the settings say so.
        data: the series.
        target: true values of a forecaster.
        books: hook point -> codebook, trained in place.
        settings: how.
    """

    def __init__(
        self,
        model: HookedTST,
        data: TimeSeriesData,
        target: Tensor | None,
        books: dict[str, Codebook],
        settings: FitConfig,
    ) -> None:
        self.model, self.data, self.target = model, data, target
        self.books, self.settings = books, settings
        self.used = {
            name: Usage(book, settings.seed + number)
            for number, (name, book) in enumerate(books.items())
        }
        rows = {
            name: activations(model, data, name).reshape(-1, book.cfg.d_in)
            for name, book in books.items()
        }
        self.variance = {
            name: max(float(book.as_seen(rows[name]).var(0, unbiased=False).mean()), 1e-12)
            for name, book in books.items()
        }
        self.rows = {} if settings.train_model else rows
        self.averages = {
            name: _Average(book, settings.ema) for name, book in books.items() if settings.ema
        }
        # Adam moves every entry by about its learning rate: a share of the entries' spread.
        groups: list[dict[str, Any]] = []
        for name, book in ({} if settings.ema else books).items():
            size = self.variance[name] ** 0.5 / settings.k
            decay = settings.weight_decay / size  # AdamW takes off lr * decay of an entry
            lr = settings.codebook_lr * size
            groups.append({"params": [book.table], "lr": lr, "weight_decay": decay})
        if settings.train_model:
            trained = [p for p in model.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": settings.lr})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0) if groups else None
        self.order = torch.Generator().manual_seed(settings.seed)
        self.history: list[dict[str, Any]] = []

    def train(
        self, folder: Path | None, made: dict[str, str], progress: bool
    ) -> list[dict[str, Any]]:
        """Run all epochs that are left; the history, one dict per epoch."""
        settings, record = self.settings, self.settings.to_dict(self.books)
        if folder is not None:
            state = load_progress(folder, record, made)
            with storage.reading(folder, "holds no whole progress of this fit", "start it over"):
                self._resume(state)
        trained = [self.model] if settings.train_model else []
        fitted = nn.ModuleList([*self.books.values(), *trained])
        self.good = LastGood(fitted, max(settings.lr * settings.train_model, settings.codebook_lr))
        epochs, done = settings.epochs, len(self.history)
        with evaluating(self.model):  # a batch norm keeps its statistics
            options: dict[str, Any] = {"initial": done, "total": epochs, "disable": not progress}
            bar = trange(done, epochs, desc="Codebooks", **options)
            for epoch in bar:
                self.when = f"in epoch {epoch + 1}"
                for name, book in self.books.items():
                    book.set_k(settings.k_of(epoch))
                    self.used[name].begin()
                means = self._epoch_together() if settings.train_model else self._epoch_frozen()
                self.good.keep(f"after epoch {epoch + 1}")
                used = self.used.values()
                revive = settings.revive and epoch + 1 < epochs
                entry = {
                    "epoch": epoch + 1,
                    "k": settings.k_of(epoch),
                    **means,
                    "dead": sum(one.dead for one in used),
                    "perplexity": fmean(one.perplexity() for one in used),
                    "revived": sum(one.revive(self.optimizer) for one in used) if revive else 0,
                }
                self.history.append(entry)
                bar.set_postfix(reconstruction=f"{means['reconstruction']:.3f}", dead=entry["dead"])
                if folder is not None:
                    save_progress(folder, record, made, self._state())
        return self.history

    def _epoch_together(self) -> dict[str, Any]:
        """One pass over the series, codebooks in the model."""
        settings, sums = self.settings, {"task": 0.0, "reconstruction": 0.0, "commitment": 0.0}
        n_series = len(self.data)
        with self.model.codebooks(self.books), self.model.watch_codes() as seen:
            for index in torch.randperm(n_series, generator=self.order).split(settings.batch_size):
                self._clear()
                parts = index.tensor_split(min(settings.accumulate, len(index)))
                weights = self._observed(parts)
                for part, weight in zip(parts, weights, strict=True):
                    task = self._task_loss(part)
                    terms = self._terms(seen)
                    share = len(part) / len(index)
                    loss = share * task + weight * (
                        settings.reconstruction * terms["reconstruction"]
                        + settings.commitment * terms["commitment"]
                    )
                    self.good.check_loss(float(loss.detach()), self.when)
                    loss.backward()
                    of_all = len(part) / n_series
                    sums["task"] += float(task.detach()) * of_all
                    for name in ("reconstruction", "commitment"):
                        sums[name] += float(terms[name].detach()) * of_all
                if settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(
                        self.optimizer.param_groups[-1]["params"],  # type: ignore[union-attr]
                        settings.clip_norm,
                    )
                self._step()
        return sums

    def _task_loss(self, index: Tensor) -> Tensor:
        model, device = self.model, self.model.cfg.device
        mask = None if self.data.mask is None else self.data.mask[index].to(device)
        target: Any = self.data.labels if self.target is None else self.target
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=self.settings.precision != "float32"
        ):
            return model(
                self.data.series[index].to(device),
                return_type="loss",
                mask=mask,
                target=target[index].to(device),
            )

    def _terms(self, seen: dict[str, Any]) -> dict[str, Tensor]:
        """The two terms, summed over hook points, each relative to the activation's variance."""
        sums: dict[str, Any] = {"reconstruction": 0.0, "commitment": 0.0}
        for name, book in self.books.items():
            snap, keep = seen[name].snap, seen[name].keep
            self._look(name, snap, keep)
            for term, value in book.losses(snap, keep).items():
                sums[term] = sums[term] + value / self.variance[name]
        return sums

    def _epoch_frozen(self) -> dict[str, Any]:
        """One pass over every hook point's activations, codebook by codebook."""
        errors = []
        for name, book in self.books.items():
            rows, squared = self.rows[name], 0.0
            per_step = max(1, round(self.settings.batch_size * len(rows) / len(self.data)))
            for index in torch.randperm(len(rows), generator=self.order).split(per_step):
                snap = book.trace(rows[index.to(rows.device)])
                self._look(name, snap, None)
                loss = book.losses(snap)["reconstruction"] / self.variance[name]
                self.good.check_loss(float(loss.detach()), self.when)
                squared += float(loss.detach()) * len(index)
                if not self.settings.ema and self.optimizer is not None:
                    self._clear()
                    (self.settings.reconstruction * loss).backward()
                self._step(only=name)
            errors.append(squared / len(rows))
        return {"task": None, "reconstruction": fmean(errors), "commitment": None}

    def _look(self, name: str, snap: Snap, keep: Tensor | None) -> None:
        self.used[name].see(snap, keep)
        if name in self.averages:
            self.averages[name].see(snap, keep)

    def _clear(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        for book in self.books.values():
            book.table.grad = None  # of tables that follow a moving average too

    def _step(self, only: str | None = None) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        for name, average in self.averages.items():
            if only in (None, name):
                average.apply()

    def _observed(self, parts: Any) -> list[float]:
        """Each part's share of the batch's observed positions, its weight in a mean over all."""
        if self.data.mask is None:
            counts = [float(len(part)) for part in parts]
        else:
            counts = []
            for part in parts:
                device = self.model.cfg.device
                with torch.no_grad():
                    _, state = self.model.embed_series(
                        self.data.series[part].to(device), self.data.mask[part].to(device)
                    )
                kept = state.pos_mask
                counts.append(float(len(part) if kept is None else kept.sum()))
        return [count / sum(counts) for count in counts]

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "tables": {name: book.table.detach() for name, book in self.books.items()},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "used": {name: used.state_dict() for name, used in self.used.items()},
            "order": self.order.get_state(),
            "history": self.history,
        }

    @torch.no_grad()
    def _resume(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.history = state["history"]
        for name, book in self.books.items():
            book.cfg.k = self.history[-1]["k"] if self.history else book.cfg.k
            book.table.copy_(state["tables"][name])
            self.used[name].load_state_dict(state["used"][name])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])


class _Average:
    """A moving average of what each code stood for, which becomes its table entry.

    What one of several codes stands for is the activation less the other codes.
    """

    def __init__(self, book: Codebook, decay: float | None) -> None:
        self.book, self.decay = book, decay or 0.0
        self.weight = torch.ones(book.table.shape[:2], device=book.table.device)
        self.sum = book.table.detach().clone()
        self._seen = (torch.zeros_like(self.weight), torch.zeros_like(self.sum))

    @torch.no_grad()
    def see(self, snap: Snap, keep: Tensor | None) -> None:
        """Add up a run's activations, per code."""
        book = self.book
        given = snap.given.detach()
        acts = snap.acts.detach().unflatten(-1, (book.n_groups, book.n_codes))
        if keep is not None:
            given, acts = given[keep], acts[keep]
        given, acts = given.flatten(0, -3), acts.flatten(0, -3)  # [row, group, ...]
        summed = torch.einsum("rgc,gcd->rgd", acts, book.table)
        weight = acts.sum(0)
        own = torch.einsum("rgc,rgd->gcd", acts, given - summed) + weight[..., None] * book.table
        self._seen = (self._seen[0] + weight, self._seen[1] + own)

    @torch.no_grad()
    def apply(self) -> None:
        """Move the table, once per step; entries that were not used stay."""
        weight, total = self._seen
        used = weight > 0
        keep = torch.where(used, self.decay, 1.0)
        # After a revival or a change of k the table is no longer the average: start from it.
        moved = (self.sum / self.weight[..., None] - self.book.table).abs().amax(-1) > 1e-6
        self.sum = torch.where(moved[..., None], self.weight[..., None] * self.book.table, self.sum)
        self.weight = keep * self.weight + (1 - keep) * weight
        self.sum = keep[..., None] * self.sum + (1 - keep[..., None]) * total
        self.book.table.copy_(
            torch.where(used[..., None], self.sum / self.weight[..., None], self.book.table)
        )
        self._seen = (torch.zeros_like(weight), torch.zeros_like(total))

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"weight": self.weight, "sum": self.sum}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`."""
        self.weight, self.sum = state["weight"], state["sum"]


class FittedCodebooks(dict[str, Codebook], Result):
    """Hook point -> codebook, with how the fit went; ``figure()`` draws that over the epochs.

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
@configured(FitConfig)
@needs_gradients
@torch.enable_grad()
def fit(
    model: HookedTST,
    data: TimeSeriesData,
    hooks: Iterable[str],
    config: FitConfig | None = None,
    *,
    target: Tensor | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
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
        config: how; the defaults of :class:`FitConfig` where None.
        target: true values [batch, channel, horizon] for a forecaster, with ``train_model``.
        folder: keeps progress after every epoch; a fit found there is continued, one of another
            model, other data or settings is refused.
        progress: show a bar.
        **settings: fields of :class:`FitConfig`, in place of those of ``config``: ``n_codes=64``.

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
    names = list(hooks)
    if not names or len(set(names)) != len(names):
        raise ArgumentError(f"expected one or more different hook points, got {names}")
    if model.acts_to_codebooks:
        raise HookError(
            f"codebooks are on the model already, at {', '.join(model.acts_to_codebooks)}; "
            "model.reset_codebooks() first"
        )
    config = config or FitConfig()
    if config.train_model and data.labels is None and target is None:
        raise ArgumentError("expected data with labels, or target= for a forecaster, got neither")
    if config.train_model and target is None:
        data = data.for_model(model)
    if target is not None and (not config.train_model or len(target) != len(data)):
        raise ArgumentError(
            f"target= holds the true values of the {len(data)} series, for train_model=True; got "
            f"{len(target)} with train_model={config.train_model}"
        )
    place, made = None if folder is None else Path(folder), {}
    if place is not None:
        given = [data.series, data.labels, data.mask, target]
        made = storage.fingerprint(model=model.state_dict(), data=given)
    record = config.to_dict(names)
    with storage.claimed(place):
        books = start(model, data, names, config.book(model), config.begin_from, config.seed)
        history = FitRun(model, data, target, books, config).train(place, made, progress)
    for name, book in books.items():
        metadata = book.cfg.metadata
        metadata.model_name = model.cfg.model_name
        metadata.dataset_path = " ".join(part for part in (data.name, data.split) if part)
        metadata.tstlens_fit = record
        metadata.processing = list(model.processing)
        model.add_codebook(book, name)
    return FittedCodebooks(books, history, record)
