"""What codebooks keep of a model: the task through the codes, beside other dictionaries."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import Amount, Count, Seed, checked
from tstlens.codebooks.codebook import Codebook
from tstlens.codebooks.fitting import activations, perplexity, start
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HookedTST
from tstlens.results import TableResult
from tstlens.run import Runs
from tstlens.saes.checks import check_data


@dataclass(frozen=True)
class BookScore:
    """One dictionary at one hook point, in place with the others of its row.

    Args:
        hook: the hook point.
        explained_variance: 1 - squared error / squared distance from the mean, of the activation as
            it arrives there.
        n_codes: codes (latents) in all groups.
        dead: those that no position uses.
        perplexity: 2 to the entropy of code use, mean over groups; the number of codes is its most.
        bits: most bits per position: the choice of k of n_codes in every group; for an SAE the
            choice of its latents, without the numbers that they carry.
        entropy_bits: k times the entropy of code use, summed over groups: what an entropy coder
            that takes codes one by one would need, on average.
    """

    hook: str
    explained_variance: float
    n_codes: int
    dead: int
    perplexity: float
    bits: float
    entropy_bits: float


@dataclass(frozen=True)
class CodebookScores(TableResult):
    """The task through codebooks, beside the model without and beside other dictionaries.

    ``to_dataframe()`` has one row per row and hook point; rows without dictionaries have one with
    an empty hook.

    Args:
        task: row -> the task's measures. ``"codebooks"`` is the model with its codebooks,
            ``"without codebooks"`` the same weights without; ``"original"`` the model before it
            was tuned, ``"original, codebooks untuned"`` that with k-means tables of the same
            sizes, ``"random tables"`` the tuned weights with random tables of the same sizes,
            ``"SAEs"`` the original with TopK SAEs of as many latents and as many active.
        books: the same rows -> scores per hook point, where there are dictionaries.
        data: name and split.
        n_series: series scored.
        made: seeds, the training split of the comparisons.
    """

    task: dict[str, dict[str, float]]
    books: dict[str, tuple[BookScore, ...]]
    data: str
    n_series: int
    made: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        each = "; ".join(
            f"{row}: {', '.join(f'{name} {value:.3f}' for name, value in measures.items())}"
            for row, measures in self.task.items()
        )
        return f"CodebookScores({self.n_series} series of {self.data}; {each})"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"row": row, **measures, **entry}
            for row, measures in self.task.items()
            for entry in [vars(book) for book in self.books.get(row, ())] or [{"hook": ""}]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "task": self.task,
            "books": {row: [vars(book) for book in found] for row, found in self.books.items()},
            "data": self.data,
            "n_series": self.n_series,
            "made": self.made,
        }


@checked
def score(
    model: HookedTST,
    data: TimeSeriesData,
    *,
    target: Tensor | None = None,
    original: HookedTST | None = None,
    train: TimeSeriesData | None = None,
    sae_steps: Amount = 1000,
    seed: Seed = 0,
    batch_size: Count = 256,
) -> CodebookScores:
    """Score the codebooks on a model.

    It answers: what does the model still do when these activations are a few codes, at how many
    bits, and would any table do? Read the random tables first: where they do as well, the task
    does not need these activations, and codes found there explain little. An SAE's active latents
    also carry a number each, so at the same count it says more per position.

    Args:
        model: with its codebooks on.
        data: series that the codebooks were not fitted on, with labels for a classifier.
        target: true values [batch, channel, horizon] for a forecaster.
        original: the model before it was tuned, for rows of its own.
        train: the training split; with it the untuned tables and the SAEs are fitted. Without it
            those rows are left out.
        sae_steps: training steps of each SAE; 0 leaves that row out.
        seed: of the random tables, k-means and the SAEs.
        batch_size: series per forward pass.

    Raises:
        HookError: no codebook is on the model.
        ArgumentError: neither labels nor target.

    Example:
        >>> from tstlens import HookedTST, codebooks, load_dataset
        >>> model = HookedTST.from_pretrained("italy-power-demand")
        >>> train, test = (load_dataset("ItalyPowerDemand", split=s) for s in ("train", "test"))
        >>> config = codebooks.CodebookConfig(n_codes=16)
        >>> for book in codebooks.start(model, train, ["blocks.0.hook_mlp_out"], config).values():
        ...     model.add_codebook(book)
        >>> list(codebooks.score(model, test).task)
        ['codebooks', 'without codebooks', 'random tables']
    """
    from tstlens.saes.scoring import task_measures

    for split in (data, train):
        if split is not None:
            check_data(split)
    books = model.acts_to_codebooks
    if not books:
        raise HookError("no codebook is on the model: model.add_codebook(codebook, hook=...)")
    if data.labels is None and target is None:
        raise ArgumentError("expected data with labels, or target= for a forecaster, got neither")
    task: dict[str, dict[str, float]] = {}
    found: dict[str, tuple[BookScore, ...]] = {}

    def measured(row: str, scored: HookedTST) -> None:
        task[row] = task_measures(scored, data, target, batch_size)
        if scored.acts_to_saes:
            found[row] = _score_in_place(scored, data, batch_size)

    measured("codebooks", model)
    bare = _without(model)
    measured("without codebooks", bare)
    if original is not None:
        untuned = _without(original)
        measured("original", untuned)
        if train is not None:
            others: dict[str, Codebook] = {}
            for hook, book in books.items():
                others |= start(untuned, train, [hook], copy.deepcopy(book.cfg), "kmeans", seed)
            with untuned.codebooks(others):
                measured("original, codebooks untuned", untuned)
    randomised = _without(model)
    for number, (hook, book) in enumerate(books.items()):
        randomised.add_codebook(_random_table(bare, data, hook, book, seed + number), hook)
    measured("random tables", randomised)
    if train is not None and sae_steps:
        host = _without(model if original is None else original)
        for sae in fitted_saes(host, train, books, sae_steps, seed).values():
            host.add_sae(sae, use_error_term=False)
        measured("SAEs", host)
    return CodebookScores(
        task=task,
        books=found,
        data=" ".join(part for part in (data.name, data.split) if part),
        n_series=len(data),
        made={
            "model": model.cfg.model_name,
            "seed": seed,
            "fitted_on": None if train is None else f"{train.name} {train.split}".strip(),
            "sae_steps": sae_steps if train is not None else 0,
        },
    )


def _without(model: HookedTST) -> HookedTST:
    """A copy without anything spliced in and without hooks."""
    bare = copy.deepcopy(model)
    bare.reset_saes()
    bare.reset_hooks()
    return bare.eval()


def _random_table(
    bare: HookedTST, data: TimeSeriesData, hook: str, book: Codebook, seed: int
) -> Codebook:
    """Normal entries with the mean and spread of each of the activation's dimensions."""
    made = copy.deepcopy(book)
    rows = activations(bare, data, hook).reshape(-1, book.cfg.d_in)
    seen = book.as_seen(rows)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(book.table.shape, generator=generator).to(book.table)
    with torch.no_grad():
        made.table.copy_((seen.mean(0)[:, None] + seen.std(0)[:, None] * noise) / book.k)
    return made


def fitted_saes(
    model: HookedTST,
    train: TimeSeriesData,
    books: Mapping[str, Codebook],
    steps: int,
    seed: int,
    *,
    heads: Mapping[str, int] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """A TopK SAE per hook point: as many latents as codes, as many active as codes.

    Heads that share a codebook's table count as so many tables: their SAE reads them joined.

    Args:
        model: to read activations off, without anything at these hook points.
        train: series.
        books: hook point -> codebook.
        steps: training steps.
        seed: of the weights and the order of activations.
        heads: hook point -> the one head that the codebook there replaces.
        progress: show a bar per SAE.
    """
    from tstlens import saes
    from tstlens.saes.stream import ActivationRows, Heads

    found = {}
    for hook, book in books.items():
        head: Heads = heads[hook] if heads and hook in heads else "joined"
        rows, _ = ActivationRows(model, train, [hook], head=head)(torch.arange(1))
        n_tables = book.n_groups * (rows[hook].shape[1] // book.cfg.d_in)
        n_latents = book.n_codes * n_tables
        found[hook] = saes.train(
            model,
            train,
            hook=hook,
            sae="topk",
            d_sae=n_latents,
            k=min(book.k * n_tables, n_latents),
            steps=steps,
            seed=seed,
            head=head,
            progress=progress,
        )
    return found


def _score_in_place(
    model: HookedTST, data: TimeSeriesData, batch_size: int
) -> tuple[BookScore, ...]:
    """Every dictionary on the model, as it meets the activations that the others leave."""
    return tuple(
        _score_one(model, data, hook, dictionary, batch_size)
        for hook, dictionary in model.acts_to_saes.items()
    )


def _score_one(
    model: HookedTST, data: TimeSeriesData, hook: str, dictionary: Any, batch_size: int
) -> BookScore:
    n_groups = getattr(dictionary, "n_groups", 1)
    counts, squared, rows, active = None, 0.0, 0, 0
    total, total_squared = 0.0, 0.0
    names = [f"{hook}.hook_sae_{name}" for name in ("input", "acts_post", "output")]
    for one in Runs(model, data, hooks=names, batch_size=batch_size).passes():
        given, acts, output = (one.acts[name] for name in names)
        width, places = given.shape[-1], given.shape[: min(2, given.ndim - 1)]
        output, acts = output.reshape(given.shape), acts.reshape(*places, -1)  # heads joined
        kept = one.observed(hook) if given.ndim > 2 else None
        if kept is None:
            kept = torch.ones(places, dtype=torch.bool, device=given.device)
        given, output = (part[kept].reshape(-1, width).double() for part in (given, output))
        squared += float((given - output).pow(2).sum())
        total, total_squared = total + given.sum(0), total_squared + given.pow(2).sum()
        on = (acts[kept].unflatten(-1, (n_groups, -1)) != 0).sum(0)
        counts = on if counts is None else counts + on
        rows, active = rows + len(given), active + int(on.sum())
    if counts is None or not rows:
        raise ArgumentError("the data have no observed position to score")
    spread = float(total_squared - (torch.as_tensor(total).pow(2) / rows).sum())
    k = active / rows / n_groups
    used = perplexity(counts)
    return BookScore(
        hook=hook,
        explained_variance=1 - squared / spread if spread else float("nan"),
        n_codes=counts.numel(),
        dead=int((counts == 0).sum()),
        perplexity=float(used.mean()),
        bits=n_groups * _log2_choose(counts.shape[1], k),
        entropy_bits=float(k * used.log2().sum()),
    )


def _log2_choose(n: int, k: float) -> float:
    """log2 of n over k, for whole and broken k."""
    natural = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return natural / math.log(2)
