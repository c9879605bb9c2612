"""The browser page of a model's codes, written atomically.

What the page of codes needs to know of an index, small enough for thousands of codes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csc_matrix, hstack

from tstlens.codebooks.book import IndexedBook, cut, mean_and_spread, width_of
from tstlens.codebooks.index import CodeIndex
from tstlens.codebooks.notes import CodeNotes
from tstlens.codebooks.search import CodeSearch, Rival, Score
from tstlens.errors import ArgumentError, StorageError
from tstlens.figures.browser.pages import HERE as SHARED
from tstlens.figures.browser.pages import (
    PADDING,
    activations_of,
    embedded,
    packed,
    page,
    properties_of,
    quantised,
    shown_series,
)
from tstlens.saes.reading.activity import Activity
from tstlens.saes.reading.result import FEWEST, Features, property_association, window_properties
from tstlens.storage import write_text

MOST_CHANNELS = 12  # of a prototype: those that differ most from the channel's mean
MOST_SEARCHES = 40  # classes that are searched for
MOST_PROTOTYPE = 4000  # windows that the mean is of
N_SIMILAR = 8


def payload(
    index: CodeIndex,
    notes: CodeNotes,
    searches: Mapping[str, CodeSearch] | None,
    n_windows: int,
    seed: int,
) -> dict[str, Any]:
    """Everything on the page as JSON values.

    Args:
        index: of the codes.
        notes: to start with.
        searches: name -> search; one per class where None.
        n_windows: windows per code.
        seed: of the sample of series, where not all fit, and of the searches.
    """
    data = index.data
    features = _as_features(index, seed)
    shown = shown_series(features, seed)
    values, low, step = quantised(data, shown)
    labels = None if data.labels is None else data.labels.cpu().numpy()
    names = list(data.class_names) if labels is not None else []
    units = [(book, unit) for book in index.books.values() for unit in range(book.n_units)]
    if searches is None:
        searches, refused = _by_class(index, seed)
    else:
        refused = {}
    return {
        "model": str(index.made.get("model") or ""),
        "dataset": data.name,
        "split": data.split,
        "hooks": [_hook(book) for book in index.books.values()],
        "codes": {
            "hook": packed(np.array([index.hooks.index(book.hook) for book, _ in units]), "uint16"),
            "names": [list(book.named(unit)) for book, unit in units],
        },
        "total": len(data),
        "positions": features.activity.n_observed,
        "series": [int(one) for one in shown],
        "labels": None if labels is None else [int(labels[one]) for one in shown],
        "classes": names,
        "counts": None if labels is None else np.bincount(labels, minlength=len(names)).tolist(),
        "channels": data.n_channels,
        "rows": index.n_channels,
        "time": data.n_time,
        "pos": index.n_pos,
        "spans": [list(span) for span in index.spans],
        "cells": [list(cell) for cell in index.cells],
        "raw": {"values": values, "low": low, "step": step, "padding": PADDING},
        "heat": activations_of(features, shown),
        "table": _table(index, units, features.activity, labels),
        "properties": properties_of(features),
        "confirmed": None if features.properties is None else _confirmed(features),
        "windowLength": None if features.properties is None else features.properties.window_length,
        "windows": _windows(index, units, shown, n_windows),
        "prototypes": _prototypes(index, units),
        "similar": _similar(features.activity, units),
        "searches": [_search(index, name, one) for name, one in searches.items()],
        "refused": refused,
        "notes": dict(notes.texts),
    }


def _hook(book: IndexedBook) -> dict[str, Any]:
    return {
        "name": book.hook,
        "codes": book.n_codes,
        "groups": book.n_groups,
        "k": book.k,
        "kind": book.kind,
        "used": int((book.support > 0).sum()),
        "units": book.n_units,
    }


def _as_features(index: CodeIndex, seed: int) -> Features:
    """All codes as the latents of one dictionary that are on or off."""
    matrix: Any = hstack([book.matrix() for book in index.books.values()], format="csc")
    observed = np.logical_or.reduce([book.observed for book in index.books.values()])
    sizes = len(index.data), index.n_channels, index.n_pos
    activity = Activity(csc_matrix(matrix), observed, *sizes)
    properties = None
    if len(index.data) >= FEWEST:
        of_windows = window_properties(index.data, activity, index.spans)
        properties = property_association(activity, of_windows, seed=seed)
    return Features(
        activity=activity,
        data=index.data,
        spans=index.spans,
        cells=index.cells,
        directions=np.zeros((activity.n_latents, 1)),
        classes=None,
        properties=properties,
        effects=None,
        monosemanticity=pd.DataFrame(),
        outputs=(),
        hook="",
    )


def _confirmed(features: Features) -> dict[str, Any]:
    found = features.properties
    if found is None:
        raise ArgumentError("expected properties")
    return {
        "best": packed(found.best, "uint16"),
        "heldout": packed(found.of_best("r_heldout"), "float32"),
        "yes": packed(found.confirmed, "uint8"),
    }


def _table(
    index: CodeIndex,
    units: list[tuple[IndexedBook, int]],
    activity: Activity,
    labels: np.ndarray | None,
) -> dict[str, Any]:
    support = np.concatenate([book.support for book in index.books.values()])
    per_series = activity.n_channels * activity.n_pos
    column = np.repeat(np.arange(len(units)), support)
    series = activity.values.indices // per_series
    pairs = np.unique(column.astype(np.int64) * activity.n_series + series)
    in_series = np.bincount(pairs // activity.n_series, minlength=len(units))
    places = np.repeat(
        [int(book.observed.sum()) for book in index.books.values()],
        [book.n_units for book in index.books.values()],
    )
    found = {
        "support": packed(support, "uint32"),
        "density": packed(support / np.maximum(places, 1), "float32"),
        "series": packed(in_series, "uint32"),
    }
    if labels is not None:
        n_classes = len(index.data.class_names)
        of = column * np.int64(n_classes) + labels[series]
        counts = np.bincount(of, minlength=len(units) * n_classes)
        one = (pairs // activity.n_series) * n_classes + labels[pairs % activity.n_series]
        by_series = np.bincount(one, minlength=len(units) * n_classes)
        found["places"] = packed(counts, "uint32")
        found["classSeries"] = packed(by_series, "uint32")
    return found


def _windows(
    index: CodeIndex, units: list[tuple[IndexedBook, int]], shown: np.ndarray, n: int
) -> dict[str, Any]:
    """The most similar windows among the shown series, one per row: slot and similarity."""
    per_series = index.n_channels * index.n_pos
    place = np.full(len(index.data), -1)
    place[shown] = np.arange(len(shown))
    starts, slots, likeness = [0], [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for book, unit in units:
        slot, similarity = book.slots(unit)
        order = np.lexsort((slot, -similarity))
        order = order[place[slot[order] // per_series] >= 0]
        _, first = np.unique(slot[order] // index.n_pos, return_index=True)
        kept = order[np.sort(first)[:n]]
        slots.append(place[slot[kept] // per_series] * per_series + slot[kept] % per_series)
        likeness.append(similarity[kept])
        starts.append(starts[-1] + len(kept))
    return {
        "start": packed(np.array(starts), "uint32"),
        "slot": packed(np.concatenate(slots), "uint32"),
        "activation": packed(np.concatenate(likeness), "float32"),
    }


def _prototypes(index: CodeIndex, units: list[tuple[IndexedBook, int]]) -> dict[str, Any]:
    """Mean and spread of each code's windows, of the channels that stand out most."""
    data = index.data
    own_channel = index.n_channels > 1
    raw = data.series.cpu().numpy().astype(np.float64)
    if data.mask is not None:
        raw = np.where(data.mask.cpu().numpy()[:, None], raw, np.nan)
    mean_of, spread_of = mean_and_spread(raw.transpose(0, 2, 1).reshape(-1, data.n_channels))
    if own_channel:
        mean_of, spread_of = np.array([np.nanmean(raw)]), np.array([np.nanstd(raw)])
    spread_of = np.where(spread_of > 0, spread_of, 1)
    count = min(MOST_CHANNELS, len(mean_of))
    which, means, spreads, used, width = [], [], [], [], 1
    for book, unit in units:
        found = _some_windows(index, book, unit)
        used.append(found[1])
        mean, spread = mean_and_spread(found[0])
        width = mean.shape[1]
        far = np.abs(np.nan_to_num(mean) - mean_of[:, None]).max(1) / spread_of
        kept = np.sort(np.argsort(-far, kind="stable")[:count])
        which.append(kept)
        means.append(mean[kept])
        spreads.append(spread[kept])
    return {
        "count": count,
        "width": width,
        "windows": packed(np.array(used), "uint32"),
        "which": packed(np.array(which), "uint16"),
        "mean": packed(np.array(means), "float32"),
        "spread": packed(np.array(spreads), "float32"),
        "overall": mean_of.tolist(),
        "before": _before(index),
    }


def _before(index: CodeIndex) -> int:
    """Samples of a cut window that lie before the span."""
    first, last = index.spans[len(index.spans) // 2]
    return (width_of(index.spans) - (last - first)) // 2


def _some_windows(index: CodeIndex, book: IndexedBook, unit: int) -> tuple[np.ndarray, int]:
    """Windows of a code, evenly drawn where there are very many."""
    slots, _ = book.slots(unit)
    many = MOST_PROTOTYPE
    if len(slots) > many:
        slots = slots[np.linspace(0, len(slots) - 1, many).astype(int)]
    row, pos = np.divmod(slots.astype(np.int64), index.n_pos)
    series, channel = np.divmod(row, index.n_channels)
    own = channel if index.n_channels > 1 else None
    return cut(index.data, series, own, pos, index.spans)[0], len(slots)


def _similar(activity: Activity, units: list[tuple[IndexedBook, int]]) -> dict[str, Any]:
    """The codes with the largest overlap of places, and the cosine where tables are the same."""
    matrix = activity.values
    support = np.diff(matrix.indptr)
    count = min(N_SIMILAR, len(units) - 1)
    which = np.zeros((len(units), count), dtype=np.int64)
    overlap = np.zeros((len(units), count))
    cosine = np.full((len(units), count), np.nan)
    for first in range(0, len(units), 256):
        both = (matrix[:, first : first + 256].T @ matrix).toarray()
        either = support[first : first + 256, None] + support[None] - both
        share = np.where(either > 0, both / np.maximum(either, 1), 0)
        share[np.arange(len(share)), first + np.arange(len(share))] = -1
        top = np.argsort(-share, axis=1, kind="stable")[:, :count]
        which[first : first + 256] = top
        overlap[first : first + 256] = np.take_along_axis(share, top, 1)
    for at, (book, unit) in enumerate(units):
        for rank, other in enumerate(which[at]):
            other_book, other_unit = units[other]
            same = other_book is book and book.named(unit)[0] == book.named(other_unit)[0]
            if same:
                a, b = book.row(unit), book.row(other_unit)
                size = float(np.linalg.norm(a) * np.linalg.norm(b))
                cosine[at, rank] = float(a @ b) / size if size > 0 else np.nan
    return {
        "count": count,
        "which": packed(which, "uint32"),
        "overlap": packed(overlap, "float32"),
        "cosine": packed(cosine, "float32"),
    }


def _by_class(index: CodeIndex, seed: int) -> tuple[dict[str, CodeSearch], dict[str, str]]:
    """One search per class, and why some could not be made."""
    found: dict[str, CodeSearch] = {}
    refused: dict[str, str] = {}
    if index.data.labels is None:
        return found, refused
    for label, name in enumerate(index.data.class_names[:MOST_SEARCHES]):
        try:
            found[f"class {name}"] = index.search(label=label, seed=seed)
        except ArgumentError as error:
            refused[f"class {name}"] = str(error)
    return found, refused


def _search(index: CodeIndex, name: str, search: CodeSearch) -> dict[str, Any]:
    first, offsets = 0, {}
    for book in index.books.values():
        offsets[book.hook] = first
        first += book.n_units
    rows = []
    for one in search.codes:
        book = index.books[one.hook]
        unit = offsets[one.hook] + book.unit(one.code, one.group, one.head)
        rows.append(
            {
                "unit": unit,
                "test": _score(one.test),
                "train": _score(one.train),
                "p": one.p,
                "null": one.null,
                "neuron": _rival(one.neuron),
                "latent": _rival(one.latent),
            }
        )
    test: Any = search.made.get("test") or ""
    said = test if isinstance(test, str) else f"{test['data']} {test['split']}".strip()
    return {
        "name": name,
        "base": search.base_rate,
        "unit": search.unit,
        "candidates": search.n_candidates,
        "on": f"{search.made.get('n_test')} series ({said})",
        "permutations": int(search.made.get("n_permutations", 0)),
        "rows": rows,
    }


def _score(score: Score) -> list[float | int | None]:
    values = (score.precision, score.recall)
    return [None if v != v else round(v, 5) for v in values] + [score.support]


def _rival(rival: Rival | None) -> dict[str, Any] | None:
    if rival is None:
        return None
    return {"name": f"{rival.place} [{rival.index}]", "test": _score(rival.test)}


HERE = Path(__file__).parent
SCRIPTS = (
    SHARED / "data.js",
    SHARED / "charts.js",
    SHARED / "rows.js",
    HERE / "notes.js",
    HERE / "codes.js",
    HERE / "code.js",
)
STYLES = (SHARED / "page.css", HERE / "codes.css")


@page.register
def write_codes(
    index: CodeIndex,
    path: str | Path,
    *,
    notes: CodeNotes | str | Path | None = None,
    searches: Mapping[str, CodeSearch] | None = None,
    title: str | None = None,
    n_windows: int = 9,
    seed: int = 0,
) -> Path:
    """Write a page on which every code can be looked up, sorted, searched, seen and noted on.

    The page holds a table of all codes and the searches; a click opens a code: its prototype, its
    windows on the raw series, the classes it is active in, the searches that found it, a map of
    where it is active, the properties that it follows, the codes like it and a note. Everything is
    inside the file; it asks for nothing from anywhere. Of large data sets a sample of the series is
    shown, as the page says; its numbers are those of all.

    Args:
        index: what :meth:`tstlens.codebooks.CodeIndex.build` returned.
        path: the file to write; its folder is made if missing.
        notes: notes on codes, or a file of them that the page or :class:`CodeNotes` wrote.
        searches: name -> search, to show; one per class where None.
        title: heading of the page; the model and the data where None.
        n_windows: windows per code.
        seed: of the sample of series, and of the searches per class.

    Returns:
        The path.

    Raises:
        StorageError: the place is a folder, or cannot be written; no notes there.
        ArgumentError: n_windows below 1.
    """
    if isinstance(n_windows, bool) or not isinstance(n_windows, int) or n_windows < 1:
        raise ArgumentError(f"expected n_windows of at least 1, got {n_windows!r}")
    path = Path(path)
    if path.is_dir():
        raise StorageError(f"expected a file to write at {path}, found a folder; name a file in it")
    given = notes if isinstance(notes, CodeNotes) else CodeNotes()
    if isinstance(notes, str | Path):
        given = CodeNotes.load(notes)
    content = payload(index, given, searches, n_windows, seed)
    model = index.made.get("model")
    about = title or (f"Codes of {model}" if model else "Codes")
    return write_text(path, render(content, about))


def render(content: dict, title: str) -> str:
    """The page as text."""
    parts = {
        "title": html.escape(title),
        "style": "\n".join(one.read_text(encoding="utf-8") for one in STYLES),
        "data": embedded({**content, "title": title}),
        "script": "\n".join(one.read_text(encoding="utf-8") for one in SCRIPTS),
    }
    text = (HERE / "codes.html").read_text(encoding="utf-8")
    for name in ("title", "style", "script", "data"):  # data last: it may hold any text
        text = text.replace(f"[[{name}]]", parts[name])
    return text
