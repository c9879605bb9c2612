"""What codebooks keep of a model: the task through the codes, beside other dictionaries.

Codes like each other, codes that tell two series apart, codes that a set of series shares.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.arguments import Count, Seed, checked
from tstlens.codebooks.book import IndexedBook
from tstlens.codebooks.codebook import Codebook
from tstlens.codebooks.fitting import activations, perplexity, start
from tstlens.data import TimeSeriesData
from tstlens.data.labels import class_index
from tstlens.errors import ArgumentError, HookError, LabelError
from tstlens.model import HookedTST
from tstlens.results import Result
from tstlens.saes.checks import check_data

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.codebooks.index import CodeIndex


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
class CodebookScores(Result):
    """The task through codebooks, beside the model without and beside other dictionaries.

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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per row and hook point; rows without dictionaries have one with an empty hook."""
        import pandas as pd

        table = []
        for row, measures in self.task.items():
            found = self.books.get(row, ())
            for entry in [vars(book) for book in found] or [{"hook": ""}]:
                table.append({"row": row, **measures, **entry})
        return pd.DataFrame(table)

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
    sae_steps: int = 1000,
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
    given = (data, target, batch_size)
    task = {"codebooks": task_measures(model, *given)}
    found = {"codebooks": _score_in_place(model, data, batch_size)}
    bare = _without(model)
    task["without codebooks"] = task_measures(bare, *given)
    if original is not None:
        untuned = _without(original)
        task["original"] = task_measures(untuned, *given)
        if train is not None:
            for hook, book in _untuned(untuned, train, books, seed).items():
                untuned.add_codebook(book, hook)
            row = "original, codebooks untuned"
            task[row] = task_measures(untuned, *given)
            found[row] = _score_in_place(untuned, data, batch_size)
    randomised = _without(model)
    for number, (hook, book) in enumerate(books.items()):
        randomised.add_codebook(_random_table(bare, data, hook, book, seed + number), hook)
    task["random tables"] = task_measures(randomised, *given)
    found["random tables"] = _score_in_place(randomised, data, batch_size)
    if train is not None and sae_steps:
        host = _without(model if original is None else original)
        saes = fitted_saes(host, train, books, sae_steps, seed)
        for sae in saes.values():
            host.add_sae(sae, use_error_term=False)
        task["SAEs"] = task_measures(host, *given)
        found["SAEs"] = _score_in_place(host, data, batch_size)
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


def _untuned(
    model: HookedTST, train: TimeSeriesData, books: Mapping[str, Codebook], seed: int
) -> dict[str, Codebook]:
    made = {}
    for hook, book in books.items():
        config = copy.deepcopy(book.cfg)
        made |= start(model, train, [hook], config, "kmeans", seed)
    return made


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


@torch.no_grad()
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
    for index in torch.arange(len(data)).split(batch_size):
        device = model.cfg.device
        mask = None if data.mask is None else data.mask[index].to(device)
        _, cache = model.run_with_cache(
            data.series[index].to(device), mask=mask, names_filter=names
        )
        given, acts, output = (cache[name] for name in names)
        kept = _kept(model, data, index, given)
        width = given.shape[-1]
        given, output = given[kept], output.reshape(*given.shape[:-1], width)[kept]
        acts = acts.reshape(*kept.shape, -1)[kept].flatten(0, -2)
        given, output = given.reshape(-1, width).double(), output.reshape(-1, width).double()
        squared += float((given - output).pow(2).sum())
        total, total_squared = total + given.sum(0), total_squared + given.pow(2).sum()
        on = (acts != 0).view(len(acts), n_groups, -1).sum(0)
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


def _kept(model: HookedTST, data: TimeSeriesData, index: Tensor, given: Tensor) -> Tensor:
    """bool [row, pos] (or [row] of pooled vectors), True where an activation counts."""
    kept = torch.ones(given.shape[: min(2, given.ndim - 1)], dtype=torch.bool, device=given.device)
    if data.mask is None or given.ndim < 3:
        return kept
    device = model.cfg.device
    state = model.embed_series(data.series[index].to(device), data.mask[index].to(device))[1]
    return kept if state.pos_mask is None else state.pos_mask


def _log2_choose(n: int, k: float) -> float:
    """log2 of n over k, for whole and broken k."""
    natural = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return natural / math.log(2)


Named = tuple[str, int, int | None, int]  # hook, group, head, code


def named_code(name: Named) -> str:
    """A code in words: "17 at blocks.0.hook_mlp_out"."""
    hook, group, head, code = name
    where = f" of head {head}" if head is not None else f" of group {group}" if group else ""
    return f"{code}{where} at {hook}"


@dataclass(frozen=True, eq=False)
class _Table(Result):
    """Numbers of codes, one column each."""

    codes: tuple[Named, ...]

    def _columns(self) -> dict[str, Any]:
        return {}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per code: hook, group, head, code, and the numbers."""
        import pandas as pd

        frame = pd.DataFrame(list(self.codes), columns=["hook", "group", "head", "code"])
        return frame.assign(**self._columns())

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True, eq=False)
class SimilarCodes(_Table):
    """Codes like one code, most alike first.

    Args:
        codes: (hook, group, head, code) of each.
        of: the same of the code itself.
        by: what they are sorted by.
        overlap: [code] Jaccard index of the places at which the two are active.
        lift: [code] how many times more often both are active at a place than if they were
            independent.
        cosine: [code] between the entries of their table; NaN where tables differ in hook point
            or group, so that entries cannot be compared.
    """

    of: Named
    by: str
    overlap: Float[np.ndarray, " code"]
    lift: Float[np.ndarray, " code"]
    cosine: Float[np.ndarray, " code"]

    def _columns(self) -> dict[str, Any]:
        return {"overlap": self.overlap, "lift": self.lift, "cosine": self.cosine}


@dataclass(frozen=True, eq=False)
class ChangedCodes(_Table):
    """Codes that differ between two series, most different first.

    Args:
        codes: (hook, group, head, code) of each.
        series: the two series.
        share: [code, 2] share of each series' observed positions at which the code is active.
        only: [code, 2] positions at which it is active in one series and, though observed, not in
            the other; what to look at where the two belong together position by position, as a
            clean and a corrupted series do.
        both: [code] positions at which it is active in both.
    """

    series: tuple[int, int]
    share: Float[np.ndarray, "code two"]
    only: Int[np.ndarray, "code two"]
    both: Int[np.ndarray, " code"]

    def _columns(self) -> dict[str, Any]:
        return {
            "share": self.share[:, 0],
            "share_other": self.share[:, 1],
            "difference": self.share[:, 1] - self.share[:, 0],
            "only": self.only[:, 0],
            "only_other": self.only[:, 1],
            "both": self.both,
        }


@dataclass(frozen=True, eq=False)
class CommonCodes(_Table):
    """Codes that are active in the series of a set, rarest elsewhere first.

    Args:
        codes: (hook, group, head, code) of each.
        asked: the set, in words.
        n_series: series in it.
        inside: [code] share of the set's series in which the code is active anywhere.
        outside: [code] share of all other series; NaN where there are none.
    """

    asked: str
    n_series: int
    inside: Float[np.ndarray, " code"]
    outside: Float[np.ndarray, " code"]

    def _columns(self) -> dict[str, Any]:
        return {"inside": self.inside, "outside": self.outside}


def similar_codes(
    books: Mapping[str, IndexedBook],
    hook: str,
    unit: int,
    *,
    by: Literal["overlap", "cosine"] = "overlap",
    n: int = 10,
) -> SimilarCodes:
    """Codes of all hook points that are active where one is, or that lie in its direction.

    Args:
        books: of the index.
        hook: hook point of the code.
        unit: the code.
        by: "overlap" (of places), or "cosine" (of entries, within its own table).
        n: so many.

    Raises:
        ArgumentError: n below 1, or another ``by``.
    """
    if by not in ("overlap", "cosine"):
        raise ArgumentError(f"expected by='overlap' or 'cosine', got {by!r}")
    if n < 1:
        raise ArgumentError(f"expected n of at least 1, got {n}")
    own = books[hook]
    active = np.zeros(len(own.observed), dtype=np.float32)
    active[own.slots(unit)[0]] = 1
    group, vector = own.named(unit)[0], own.row(unit)
    rows: list[tuple[float, float, float, Named]] = []
    for name, book in books.items():
        both = np.asarray(book.matrix().T @ active)
        here = active * book.observed
        n_places = max(int((book.observed & own.observed).sum()), 1)
        either = book.support + here.sum() - both
        expected = book.support * float(here.sum()) / n_places
        with np.errstate(divide="ignore", invalid="ignore"):
            overlap = np.where(either > 0, both / either, 0.0)
            lift = np.where(expected > 0, both / expected, np.nan)
        for other in range(book.n_units):
            if name == hook and other == unit:
                continue
            named = book.named(other)
            alike = float("nan")
            if name == hook and named[0] == group:
                alike = _cosine(vector, book.row(other))
            rows.append((float(overlap[other]), float(lift[other]), alike, (name, *named)))
    if by == "overlap":
        rows.sort(key=lambda row: -row[0])
    else:
        rows = sorted((row for row in rows if np.isfinite(row[2])), key=lambda row: -row[2])
    rows = rows[:n]
    return SimilarCodes(
        codes=tuple(row[3] for row in rows),
        of=(hook, *own.named(unit)),
        by=by,
        overlap=np.array([row[0] for row in rows]),
        lift=np.array([row[1] for row in rows]),
        cosine=np.array([row[2] for row in rows]),
    )


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size > 0 else float("nan")


def changed_codes(index: CodeIndex, series: int, other: int) -> ChangedCodes:
    """Codes that two series do not have alike, by the difference of their shares of positions.

    What can mislead: shares say nothing of order; ``only`` and ``both`` compare position by
    position, which means something where the two series are aligned.

    Args:
        index: the index.
        series: index of a series in the data.
        other: of another.

    Raises:
        ArgumentError: no such series, or the same twice.
    """
    for one in (series, other):
        _check_series(index, one)
    if series == other:
        raise ArgumentError(f"expected two series, got {series} twice")
    per_series = index.n_channels * index.n_pos
    names: list[Named] = []
    shares, only, both = [], [], []
    for hook, book in index.books.items():
        matrix = book.matrix().tocsr()
        dense, seen = [], []
        for one in (series, other):
            at = slice(one * per_series, (one + 1) * per_series)
            dense.append(matrix[at].toarray() > 0)
            seen.append(book.observed[at])
        kept = dense[0].any(0) | dense[1].any(0)
        for unit in np.flatnonzero(kept):
            first, second = dense[0][:, unit], dense[1][:, unit]
            names.append((hook, *book.named(int(unit))))
            shares.append(
                [d.sum() / max(s.sum(), 1) for d, s in zip((first, second), seen, strict=True)]
            )
            only.append([(first & ~second & seen[1]).sum(), (second & ~first & seen[0]).sum()])
            both.append((first & second).sum())
    share = np.array(shares, dtype=float).reshape(-1, 2)
    order = np.argsort(-np.abs(share[:, 1] - share[:, 0]), kind="stable")
    return ChangedCodes(
        codes=tuple(names[i] for i in order),
        series=(int(series), int(other)),
        share=share[order],
        only=np.array(only, dtype=np.int64).reshape(-1, 2)[order],
        both=np.array(both, dtype=np.int64)[order],
    )


def common_codes(
    index: CodeIndex,
    series: Sequence[int] | None,
    *,
    label: int | str | None = None,
    at_least: float = 1.0,
) -> CommonCodes:
    """Codes that are active in all (or most) series of a set, with how often elsewhere.

    Args:
        index: the index.
        series: indices of the set, or ``label=``.
        label: the set of one class.
        at_least: share of the set's series in which a code has to be active.

    Raises:
        ArgumentError: not one of series and label, an empty set, or a share outside of 0..1.
        LabelError: no such class, or data without labels.
    """
    if (series is None) == (label is None):
        raise ArgumentError("expected either series or label=")
    if not 0 < at_least <= 1:
        raise ArgumentError(f"expected at_least in 0..1, got {at_least}")
    member = np.zeros(len(index.data), dtype=bool)
    if label is not None:
        if index.data.labels is None:
            raise LabelError("label= was given, but the series of the index have no labels")
        wanted = class_index(label, index.data.class_names)
        member = index.data.labels.numpy() == wanted
        asked = f"class {index.data.class_names[wanted]}"
    else:
        for one in series or ():
            _check_series(index, one)
            member[one] = True
        asked = f"{int(member.sum())} series"
    if not member.any():
        raise ArgumentError(f"expected at least one series in the set, got none ({asked})")
    per_series = index.n_channels * index.n_pos
    found: list[tuple[float, float, Named]] = []
    for hook, book in index.books.items():
        unit = np.repeat(np.arange(book.n_units), book.support)
        pairs = np.unique(unit * np.int64(len(member)) + book.slot // per_series)
        unit, of = np.divmod(pairs, len(member))
        inside = np.bincount(unit[member[of]], minlength=book.n_units) / member.sum()
        rest = int((~member).sum())
        outside = np.bincount(unit[~member[of]], minlength=book.n_units) / max(rest, 1)
        for one in np.flatnonzero(inside >= at_least - 1e-9):
            elsewhere = float(outside[one]) if rest else float("nan")
            found.append((float(inside[one]), elsewhere, (hook, *book.named(int(one)))))
    found.sort(key=lambda one: (one[1], -one[0]))
    return CommonCodes(
        codes=tuple(one[2] for one in found),
        asked=asked,
        n_series=int(member.sum()),
        inside=np.array([one[0] for one in found]),
        outside=np.array([one[1] for one in found]),
    )


def _check_series(index: CodeIndex, series: Any) -> None:
    n = len(index.data)
    if isinstance(series, bool) or not isinstance(series, int | np.integer) or not 0 <= series < n:
        raise ArgumentError(f"expected a series in 0..{n - 1}, got {series!r}")
