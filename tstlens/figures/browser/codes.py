"""The browser page of a model's codes: that of latents, with prototypes and searches beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import hstack

from tstlens.arguments import Count, Seed, checked
from tstlens.codebooks.book import IndexedBook, cosines, cut, mean_and_spread, width_of
from tstlens.codebooks.index import CodeIndex
from tstlens.codebooks.notes import CodeNotes
from tstlens.codebooks.search import CodeSearch, Rival, Score
from tstlens.errors import ArgumentError
from tstlens.figures.browser import page
from tstlens.figures.browser.pages import about, most_alike, packed, payload, table_of, write
from tstlens.saes.reading.activity import Activity
from tstlens.saes.reading.result import Features
from tstlens.storage import check_file

MOST_CHANNELS = 12  # of a prototype: those that differ most from the channel's mean
MOST_SEARCHES = 40  # classes that are searched for
MOST_PROTOTYPE = 4000  # windows that the mean is of
N_SIMILAR = 8


@page.register
@checked
def write_codes(
    index: CodeIndex,
    path: str | Path,
    *,
    notes: CodeNotes | str | Path | None = None,
    searches: Mapping[str, CodeSearch] | None = None,
    title: str | None = None,
    n_windows: Count = 9,
    seed: Seed = 0,
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
    """
    check_file(Path(path))
    features, books = index.features(seed=seed), list(index.books.values())
    refused: dict[str, str] = {}
    if searches is None:
        searches, refused = _by_class(index, seed)
    used = f"{sum(int((book.support > 0).sum()) for book in books)} of {index.n_units} codes used"
    points = f"{used} at {len(books)} hook point{'s' if len(books) > 1 else ''}"
    at_once = f"{books[0].k} active at a time{' in each group' if books[0].n_groups > 1 else ''}"
    content = {
        **payload(features, n_windows, seed, _ranked(books)),
        "noun": "code",
        "about": about(index.data, points, at_once),
        "hooks": [_hook(book) for book in books],
        "codes": {
            "hook": packed(np.repeat(np.arange(len(books)), [b.n_units for b in books]), "uint16"),
            "names": [name[1:] for book in books for name in book.names()],
        },
        **_tables(index, features),
        "prototypes": _prototypes(index),
        "similar": _similar(features.activity, books),
        "effects": None,
        "searches": [_search(index, name, one) for name, one in searches.items()],
        "refused": refused,
    }
    model = index.made.get("model")
    return write(content, path, notes, title or (f"Codes of {model}" if model else "Codes"))


def _hook(book: IndexedBook) -> dict[str, Any]:
    return {
        "name": book.hook,
        "codes": book.n_codes,
        "groups": book.n_groups,
        "kind": book.kind,
        "units": book.n_units,
        "positions": book.n_observed,
    }


def _ranked(books: list[IndexedBook]) -> IndexedBook:
    """The codes of all books in one, by their similarities; only what windows need is its own."""
    values: Any = hstack([book.values for book in books], format="csc")
    return replace(books[0], values=values)


def _tables(index: CodeIndex, features: Features) -> dict[str, Any]:
    """The table of all codes, and places and series of each by class."""
    activity, books = features.activity, index.books.values()
    support = np.diff(activity.values.indptr)
    places = np.concatenate([np.full(book.n_units, book.n_observed) for book in books])
    in_series: Any = hstack([book.in_series() for book in books], format="csc")
    density = support / np.maximum(places, 1)
    frame = pd.DataFrame({"density": density, "series": np.diff(in_series.indptr)})
    by_class = None
    if index.data.labels is not None:
        names = np.array(index.data.class_names)
        of_series = np.eye(len(names))[index.data.labels.cpu().numpy()]  # [series, class]
        per_series = activity.n_channels * activity.n_pos
        counts = activity.values.T @ np.repeat(of_series, per_series, axis=0)
        most = np.where(support > 0, counts.max(1), np.nan)
        frame["class"] = pd.Series(names[counts.argmax(1)]).where(support > 0)
        frame["share"] = most / np.maximum(support, 1)
        by_class = {
            "places": packed(counts, "uint32"),
            "series": packed(in_series.T @ of_series, "uint32"),
        }
    if (found := features.properties) is not None:
        frame["property"] = pd.Series(np.array(found.names)[found.best]).where(found.confirmed)
        frame["confirmed"] = found.confirmed
    table = table_of(frame, ("class", "property"))
    return {"table": {**table, "support": packed(support, "uint32")}, "classTable": by_class}


def _prototypes(index: CodeIndex) -> dict[str, Any]:
    """Mean and spread of each code's windows, of the channels that stand out most."""
    data = index.data
    raw = data.series.cpu().numpy().astype(np.float64)
    if data.mask is not None:
        raw = np.where(data.mask.cpu().numpy()[:, None], raw, np.nan)
    n_read = 1 if index.n_channels > 1 else data.n_channels  # channels of a window
    mean_of, spread_of = mean_and_spread(raw.transpose(0, 2, 1).reshape(-1, n_read))
    spread_of = np.where(spread_of > 0, spread_of, 1)
    count = min(MOST_CHANNELS, n_read)
    which, means, spreads, used = [], [], [], []
    for book in index.books.values():
        for unit in range(book.n_units):
            slots, _ = book.column(unit)
            if len(slots) > MOST_PROTOTYPE:  # evenly drawn
                slots = slots[np.linspace(0, len(slots) - 1, MOST_PROTOTYPE).astype(int)]
            series, channel, pos = book.places(slots)
            own = channel if index.n_channels > 1 else None
            mean, spread = mean_and_spread(cut(data, series, own, pos, index.spans)[0])
            far = np.abs(np.nan_to_num(mean) - mean_of[:, None]).max(1) / spread_of
            kept = np.sort(np.argsort(-far, kind="stable")[:count])
            used.append(len(slots))
            which.append(kept)
            means.append(mean[kept])
            spreads.append(spread[kept])
    first, last = index.spans[len(index.spans) // 2]
    return {
        "count": count,
        "width": width_of(index.spans),
        "windows": packed(np.array(used), "uint32"),
        "which": packed(np.array(which), "uint16"),
        "mean": packed(np.array(means), "float32"),
        "spread": packed(np.array(spreads), "float32"),
        "overall": mean_of.tolist(),
        "before": (width_of(index.spans) - (last - first)) // 2,  # samples ahead of the span
    }


def _similar(activity: Activity, books: list[IndexedBook]) -> dict[str, Any]:
    """The codes with the largest overlap of places, and the cosine where tables are the same."""
    matrix, support = activity.values, np.diff(activity.values.indptr)

    def overlaps(part: slice) -> np.ndarray:
        both = (matrix[:, part].T @ matrix).toarray()
        either = support[part, None] + support[None] - both
        return np.where(either > 0, both / np.maximum(either, 1), 0)

    which, overlap = most_alike(overlaps, activity.n_latents, N_SIMILAR, 256)
    cosine, first = np.full(which.shape, np.nan), 0
    for book in books:
        for unit in range(book.n_units):
            others = which[first + unit] - first
            own = (others >= 0) & (others < book.n_units)
            cosine[first + unit, own] = cosines(book, unit)[others[own]]
        first += book.n_units
    return {
        "count": which.shape[1],
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
    named = [one for book in index.books.values() for one in book.names()]
    numbers = {one: number for number, one in enumerate(named)}
    test: Any = search.made.get("test") or ""
    said = test if isinstance(test, str) else f"{test['data']} {test['split']}".strip()
    return {
        "name": name,
        "base": search.base_rate,
        "unit": search.unit,
        "on": f"{search.made.get('n_test')} series ({said})",
        "permutations": int(search.made.get("n_permutations", 0)),
        "rows": [
            {
                "unit": numbers[one.hook, one.group, one.head, one.code],
                "test": _score(one.test),
                "p": one.p,
                "null": one.null,
                "neuron": _rival(one.neuron),
                "latent": _rival(one.latent),
            }
            for one in search.codes
        ],
    }


def _score(score: Score) -> list[float | int | None]:
    values = (score.precision, score.recall)
    return [None if v != v else round(v, 5) for v in values] + [score.support]


def _rival(rival: Rival | None) -> dict[str, Any] | None:
    if rival is None:
        return None
    return {"name": f"{rival.place} [{rival.index}]", "test": _score(rival.test)}
