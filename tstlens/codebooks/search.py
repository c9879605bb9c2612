"""Which codes are active where something holds: picked on one split, reported on another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool

from tstlens.codebooks.search_counts import Side
from tstlens.codebooks.search_result import CodeSearch, FoundCode
from tstlens.codebooks.search_rivals import best_rivals
from tstlens.codebooks.search_windows import SearchWindows, evaluated
from tstlens.data.labels import class_index
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

if TYPE_CHECKING:
    from tstlens.codebooks.index import CodeIndex

FEWEST_PERMUTATIONS = 100


def search_codes(
    index: CodeIndex,
    predicate: Callable[[Any], Any] | None,
    *,
    label: int | str | None = None,
    mask: Any = None,
    test: CodeIndex | Literal["split"] | None = None,
    test_mask: Any = None,
    hooks: str | Sequence[str] | None = None,
    unit: Literal["position", "series"] = "position",
    min_recall: float = 0.02,
    min_support: int = 10,
    n: int = 10,
    n_permutations: int = 200,
    min_samples: int = 8,
    seed: int = 0,
) -> CodeSearch:
    """Rank codes by how precisely they mark a class, a regime or a property of the window.

    Codes are ranked on the index's own series and reported on others: those of ``index.test``, or
    else a random half of the series that the ranking did not see. Beside each stands the neuron
    that is most precise at (at least) the same recall, with a threshold set on the same series, and
    the SAE latent likewise; both are picked among many, as the code is, and reported on the same
    other series. The null deals what is searched for out to the series at random, whole series at a
    time, and takes the best of all codes each time: ``null`` is the precision that the best of them
    reaches at a code's recall (95th percentile), and ``p`` allows for having looked at all codes
    (not for several searches).

    What can mislead: a precise code with a low recall marks a part of what was asked for; a high
    base rate makes every code precise; later layers have mixed in the rest of the series, so a code
    may be active *because* of samples outside its window; and what marks a class need not drive the
    output: see :func:`~tstlens.codebooks.effects`.

    Args:
        index: of the split to pick on.
        predicate: gets an object ``window`` (:class:`SearchWindows`: level, slope, curvature, peak,
            trough, range, variance, low, middle, high, frequency, distance(motif) …) of all windows
            at once and gives bool, one per window; a function that cannot work on arrays is called
            window by window, more slowly.
        label: a class (index or name), instead of a predicate.
        mask: bool [series, pos] or [series, channel, pos], instead of a predicate.
        test: index of the split to report on; None for ``index.test``, and halves of the series
            where there is none; ``"split"`` for halves in any case.
        test_mask: the mask of the test split.
        hooks: codes of which hook points; None for all.
        unit: count positions, or series (a code counts as active in a series where it is active at
            any position, a neuron with its largest activation, and the predicate holds where it
            holds at any position).
        min_recall: of a code on the split to pick on.
        min_support: places at which a code is active there.
        n: codes to report.
        n_permutations: of the null.
        min_samples: windows narrower than so many samples are widened before they are measured.
        seed: of halves and permutations.

    Raises:
        ArgumentError: not one of predicate, label and mask; nothing, or everything, fits.
        LabelError: no such class, or data without labels.
        SeriesShapeError: a mask of another shape.

    Source: Tamkin, Taufeeque, Goodman 2023 (precision and recall of codes beside neurons); Westfall
    and Young 1993 (the maximum over candidates as null).

    Example:
        >>> index.search(lambda window: window.slope > 1.0).to_dataframe()  # doctest: +SKIP
    """
    if sum(given is not None for given in (predicate, label, mask)) != 1:
        raise ArgumentError("expected one of a predicate, label= and mask=, got none or several")
    _check(unit, min_recall, min_support, n, n_permutations)
    names = list(index.books) if hooks is None else [hooks] if isinstance(hooks, str) else hooks
    books = {name: index.book(name) for name in names}
    other = index.test if test is None else None if test == "split" else test
    other = None if isinstance(other, str) else other
    if mask is not None and other is not None and test_mask is None:
        raise ArgumentError(
            "the index has a test split, so give its mask too: test_mask=, or test='split' to "
            "report on a half of these series"
        )
    asked = (predicate, label, min_samples)
    holds, vectorised = _held(index, mask, *asked)
    generator = np.random.default_rng(seed)
    if other is None:
        train_series, test_series = _halves(index, generator)
        report, report_holds = index, holds
    else:
        _check_test(index, other, names)
        report, report_holds = other, _held(other, test_mask, *asked)[0]
        train_series, test_series = np.arange(len(index.data)), np.arange(len(other.data))
    train = Side(index, books, holds, train_series, unit)
    report_books = {name: report.book(name) for name in names}
    tested = Side(report, report_books, report_holds, test_series, unit)
    found = _ranked(train, min_recall, min_support)
    chosen = [(hook, code) for _, hook, code in found[:n]]
    recalls = [train.score(hook, code).recall for hook, code in chosen]
    shuffled, of = train.shuffled(n_permutations, generator), train.number
    active, right = (np.concatenate([one[i] for one in train.counts.values()]) for i in (1, 0))
    precision, recall, p = shuffled.against(active, right, min_support)
    null = [np.where(recall >= one - 1e-9, precision, 0).max(0) for one in recalls]
    rivals = {}
    for kind, signs in (("neurons", (1, -1)), ("saes", (1,))):
        values = getattr(index, kind), getattr(report, kind)
        rivals[kind] = best_rivals(
            values[0], signs, train.places(), recalls, values[1], tested.places()
        )
    codes = []
    for at, (hook, code) in enumerate(chosen):
        group, head, number = books[hook].named(code)
        codes.append(
            FoundCode(
                hook=hook,
                code=number,
                group=group,
                head=head,
                train=train.score(hook, code),
                test=tested.score(hook, code),
                p=float(p[of(hook, code)]),
                null=float(np.quantile(null[at], 0.95)),
                neuron=rivals["neurons"][at],
                latent=rivals["saes"][at],
                several_groups=books[hook].n_groups > 1,
                shared=books[hook].shared,
            )
        )
    return CodeSearch(
        codes=tuple(codes),
        asked=_said(index, predicate, label),
        unit=unit,
        base_rate=tested.base_rate,
        train_base_rate=train.base_rate,
        null=np.array(null).reshape(len(null), n_permutations),
        n_candidates=len(found),
        made={
            **index.made,
            "test": "the other half of the series" if other is None else report.made,
            "n_train": len(train_series),
            "n_test": len(test_series),
            "min_recall": min_recall,
            "min_support": min_support,
            "n_permutations": n_permutations,
            "seed": seed,
            "at_once": vectorised,
        },
    )


def _check(unit: str, min_recall: float, min_support: int, n: int, n_permutations: int) -> None:
    if unit not in ("position", "series"):
        raise ArgumentError(f"expected unit='position' or 'series', got {unit!r}")
    if not 0 <= min_recall <= 1:
        raise ArgumentError(f"expected min_recall in 0..1, got {min_recall}")
    if min_support < 1 or n < 1:
        raise ArgumentError(f"expected min_support and n of at least 1, got {min_support} and {n}")
    if n_permutations < FEWEST_PERMUTATIONS:
        raise ArgumentError(
            f"expected n_permutations of at least {FEWEST_PERMUTATIONS}, got {n_permutations}"
        )


def _check_test(index: CodeIndex, other: CodeIndex, names: Sequence[str]) -> None:
    for name in names:
        if name not in other.books or not np.array_equal(
            index.books[name].table, other.books[name].table
        ):
            raise ArgumentError(
                f"the test index has no codebook at {name}, or another one; build both with the "
                "same model: CodeIndex.build(model, train, test=test)"
            )
    if (index.n_pos, index.n_channels) != (other.n_pos, other.n_channels):
        raise ArgumentError(
            f"expected a test index with {index.n_pos} positions, got {other.n_pos}"
        )


def _held(
    index: CodeIndex,
    mask: Any,
    predicate: Callable[[Any], Any] | None,
    label: int | str | None,
    min_samples: int,
) -> tuple[Bool[np.ndarray, " slot"], bool]:
    """Where the predicate holds, and whether it was asked about all windows at once."""
    shape = len(index.data), index.n_channels, index.n_pos
    if label is not None:
        if index.data.labels is None:
            raise LabelError("label= was given, but the series of the index have no labels")
        wanted = class_index(label, index.data.class_names)
        held = index.data.labels.numpy() == wanted
        return np.broadcast_to(held[:, None, None], shape).ravel(), True
    if mask is not None:
        array = mask.cpu().numpy() if hasattr(mask, "cpu") else np.asarray(mask)
        if array.dtype != bool or array.shape not in (shape, (shape[0], shape[2])):
            raise SeriesShapeError(
                f"expected mask as bool [series={shape[0]}, pos={shape[2]}] (or with "
                f"channel={shape[1]} in the middle), got {array.dtype} {list(array.shape)}"
            )
        array = array if array.ndim == 3 else array[:, None]
        return np.broadcast_to(array, shape).ravel(), True
    if not callable(predicate):
        raise ArgumentError(f"expected a function of window, got {predicate!r}")
    windows = SearchWindows(index.data, index.spans, index.n_channels, index.columns, min_samples)
    return evaluated(predicate, windows)


def _halves(index: CodeIndex, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the series, each class shared out evenly."""
    n = len(index.data)
    if n < 4:
        raise ArgumentError(
            f"expected at least 4 series to pick codes on one half and report on the other, got "
            f"{n}; or build the index with test="
        )
    order = generator.permutation(n)
    if index.data.labels is not None:
        order = order[np.argsort(index.data.labels.numpy()[order], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def _said(index: CodeIndex, predicate: Callable[[Any], Any] | None, label: Any) -> str:
    if label is not None:
        names = index.data.class_names
        wanted = class_index(label, names)
        plain = names[wanted] == str(wanted)
        return f"class {names[wanted]}" + ("" if plain else f" (label {wanted})")
    if predicate is None:
        return "the mask"
    name = getattr(predicate, "__name__", "predicate")
    return "the predicate" if name == "<lambda>" else name


def _ranked(side: Side, min_recall: float, min_support: int) -> list[tuple[float, str, int]]:
    """(precision, hook, unit), best first."""
    found = []
    for hook, counts in side.counts.items():
        right, active, there = counts
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = right / active, right / there
        good = np.flatnonzero((active >= min_support) & (recall >= min_recall) & (right > 0))
        found += [(float(precision[u]), float(recall[u]), hook, int(u)) for u in good]
    order = list(side.counts)
    found.sort(key=lambda one: (-one[0], -one[1], order.index(one[2]), one[3]))
    return [(precision, hook, unit) for precision, _, hook, unit in found]
