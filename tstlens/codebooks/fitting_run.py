"""The loop behind :func:`tstlens.codebooks.fit`: seeded, resumable, padding left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import trange

from tstlens.codebooks.codebook import Codebook, Snap
from tstlens.codebooks.reviving import Usage
from tstlens.codebooks.starting import activations
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.training.diverging import LastGood
from tstlens.training.progress import load_progress, save_progress

_Term = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """The arguments of a fit; see :func:`tstlens.codebooks.fit`."""

    hooks: tuple[str, ...]
    n_codes: int
    k: int
    k_start: int
    k_epochs: int
    n_groups: int
    similarity: str
    normalize: bool
    gradient: str
    train_model: bool
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    codebook_lr: float
    reconstruction: float
    commitment: float
    begin_from: str
    revive: bool
    ema: float | None
    precision: str
    clip_norm: float | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "k_epochs"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("float32", "bfloat16"):
            raise ArgumentError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if self.k_start < self.k:
            raise ArgumentError(
                f"the number of codes falls from k_start to k: expected k_start >= {self.k}, got "
                f"{self.k_start}"
            )

    def k_of(self, epoch: int) -> int:
        """Codes active in an epoch: from ``k_start`` to ``k`` in equal ratios."""
        if epoch >= self.k_epochs or self.k_start == self.k:
            return self.k
        return max(self.k, round(self.k_start * (self.k / self.k_start) ** (epoch / self.k_epochs)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "hooks": list(self.hooks)}


class FitRun:
    """One fit: model, codebooks, optimisers and counts.

    Args:
        model: without codebooks; trained in place where the settings say so.
        data: the series.
        target: true values of a forecaster.
        books: hook point -> codebook, trained in place.
        settings: of the fit.
    """

    def __init__(
        self,
        model: HookedTST,
        data: TimeSeriesData,
        target: Tensor | None,
        books: dict[str, Codebook],
        settings: Settings,
    ) -> None:
        self.model, self.data, self.target = model, data, target
        self.books, self.settings = books, settings
        self.used = {
            name: Usage(book, settings.seed + number)
            for number, (name, book) in enumerate(books.items())
        }
        rows = {name: self._rows(name) for name in books}
        self.variance = {
            name: max(float(book.as_seen(rows[name]).var(0, unbiased=False).mean()), 1e-12)
            for name, book in books.items()
        }
        self.rows = {} if settings.train_model else rows
        self.averages = {
            name: _Average(book, settings.ema) for name, book in books.items() if settings.ema
        }
        # Adam moves every entry by about its learning rate: a share of the entries' spread.
        groups: list[dict[str, Any]] = [
            {
                "params": [book.table],
                "lr": settings.codebook_lr * (self.variance[name] ** 0.5) / settings.k,
            }
            for name, book in books.items()
            if not settings.ema
        ]
        if settings.train_model:
            trained = [p for p in model.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": settings.lr})
        self.optimizer = torch.optim.Adam(groups) if groups else None
        self.order = torch.Generator().manual_seed(settings.seed)
        self.history: list[dict[str, Any]] = []

    def train(
        self, folder: Path | None, made: dict[str, str], progress: bool
    ) -> list[dict[str, Any]]:
        """Run all epochs that are left; the history, one dict per epoch."""
        settings = self.settings
        if folder is not None:
            self._resume(load_progress(folder, settings.to_dict(), made))
        fitted: list[nn.Module] = [*self.books.values()]
        if settings.train_model:
            fitted.append(self.model)
        self.good = LastGood(
            nn.ModuleList(fitted), max(settings.lr * settings.train_model, settings.codebook_lr)
        )
        with self._modes():
            bar = trange(
                len(self.history),
                settings.epochs,
                initial=len(self.history),
                total=settings.epochs,
                desc="Codebooks",
                disable=not progress,
            )
            for epoch in bar:
                self.epoch = epoch + 1
                for book in self.books.values():
                    book.set_k(settings.k_of(epoch))
                for used in self.used.values():
                    used.begin()
                means = self._epoch_together() if settings.train_model else self._epoch_frozen()
                self.good.keep(f"after epoch {self.epoch}")
                last = epoch + 1 == settings.epochs
                entry = {
                    "epoch": epoch + 1,
                    "k": settings.k_of(epoch),
                    **means,
                    "dead": sum(used.dead for used in self.used.values()),
                    "perplexity": _mean([used.perplexity() for used in self.used.values()]),
                    "revived": self._revive() if settings.revive and not last else 0,
                }
                self.history.append(entry)
                bar.set_postfix(reconstruction=f"{means['reconstruction']:.3f}", dead=entry["dead"])
                if folder is not None:
                    save_progress(folder, settings.to_dict(), made, self._state())
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
                    self.good.check_loss(float(loss.detach()), f"in epoch {self.epoch}")
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
                self.good.check_loss(float(loss.detach()), f"in epoch {self.epoch}")
                squared += float(loss.detach()) * len(index)
                if not self.settings.ema and self.optimizer is not None:
                    self._clear()
                    (self.settings.reconstruction * loss).backward()
                self._step(only=name)
            errors.append(squared / len(rows))
        return {"task": None, "reconstruction": _mean(errors), "commitment": None}

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

    def _revive(self) -> int:
        return sum(used.revive(self.optimizer) for used in self.used.values())

    def _rows(self, hook: str) -> Tensor:
        rows = activations(self.model, self.data, hook)
        return rows.reshape(-1, self.books[hook].cfg.d_in)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Eval mode throughout: a batch norm keeps its statistics."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, was_training in training.items():
                module.training = was_training

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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
