"""The browser page of a dictionary's latents, and what it shares with that of codes; atomic.

A page holds what it needs to know of a result as compact text, small enough for thousands of
latents: little-endian arrays in base64, which it decodes on demand.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tstlens.arguments import Count, Seed, checked
from tstlens.codebooks.notes import CodeNotes
from tstlens.data import TimeSeriesData
from tstlens.figures.browser import page
from tstlens.saes.reading.activity import Activity, top_slots
from tstlens.saes.reading.result import Features
from tstlens.storage import check_file, write_text

_NAMES = {"float32": "f4", "uint32": "u4", "int16": "i2", "uint16": "u2", "uint8": "u1"}


def packed(array: np.ndarray, kind: str) -> dict[str, str]:
    """An array as ``{"t": type, "b": base64}``; floats lose what float32 does not hold.

    Args:
        array: any shape; flattened in C order.
        kind: "float32", "uint32", "int16", "uint16" or "uint8".
    """
    raw = np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<")).tobytes()
    return {"t": _NAMES[kind], "b": base64.b64encode(raw).decode("ascii")}


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


MOST_SAMPLES = 6_000_000  # raw values in a page (two bytes each)
MOST_ENTRIES = 2_000_000  # activations in a page (five bytes each)
MOST_OUTPUTS = 48  # bars of an effect chart; longer forecasts are averaged over runs of steps
N_PROPERTIES = 6
N_NEIGHBOURS = 6
PADDING = -32768  # what stands for a padded sample


def payload(
    features: Features, n_windows: int, seed: int, ranked: Activity | None = None
) -> dict[str, Any]:
    """What the pages of latents and of codes have in common, as JSON values.

    Args:
        features: the result.
        n_windows: strongest windows per latent.
        seed: of the sample of series, where not all fit.
        ranked: the activity that windows are ranked by; its own where None.
    """
    data, activity = features.data, features.activity
    shown = shown_series(features, seed)
    series, low, step = quantised(data, shown)
    names = list(data.class_names) if data.labels is not None else []
    labels = None if data.labels is None else data.labels.cpu().numpy()
    return {
        "model": str(features.made.get("model") or ""),
        "dataset": data.name,
        "rowCount": activity.n_latents,
        "total": len(data),
        "series": [int(index) for index in shown],
        "labels": None if labels is None else [int(labels[index]) for index in shown],
        "classes": names,
        "counts": None if labels is None else np.bincount(labels, minlength=len(names)).tolist(),
        "channels": data.n_channels,
        "rows": activity.n_channels,
        "time": data.n_time,
        "pos": activity.n_pos,
        "spans": [list(span) for span in features.spans],
        "cells": [list(cell) for cell in features.cells],
        "raw": {"values": series, "low": low, "step": step, "padding": PADDING},
        "properties": _properties(features),
        "heat": _activations(activity, shown),
        "windows": _windows(ranked or activity, shown, n_windows),
        "windowLength": None if features.properties is None else features.properties.window_length,
    }


def about(data: TimeSeriesData, *parts: str) -> str:
    """The line below a page's title: the data, then what else there is to say."""
    said = [f"{data.name} {data.split}".strip(), f"{len(data)} series", *parts]
    return " · ".join(filter(None, said))


def _of_latents(features: Features) -> dict[str, Any]:
    """What only the page of latents has."""
    activity, mono = features.activity, features.monosemanticity
    active = f"{int((activity.density > 0).sum())} of {activity.n_latents} latents active"
    return {
        "noun": "latent",
        "about": about(features.data, active, f"{activity.l0:.3g} per position"),
        "hooks": [
            {
                "name": features.hook,
                "units": activity.n_latents,
                "positions": activity.n_observed,
            }
        ],
        "table": table_of(features.table(), ("class", "property", "moves")),
        "similar": _neighbours(features),
        "effects": _effects(features),
        "classTable": _classes(features),
        "beside": {
            "head": ["", *(str(name) for name in mono.index)],
            "rows": [_measured(name, mono[name]) for name in mono.columns],
        },
    }


def shown_series(features: Features, seed: int) -> np.ndarray:
    """Indices of the series that fit in a page: all, or a sample with the classes' shares."""
    data, activity = features.data, features.activity
    by_samples = MOST_SAMPLES // (data.n_channels * data.n_time)
    by_entries = int(len(data) * MOST_ENTRIES / max(activity.values.nnz, 1))
    room = max(min(by_samples, by_entries), 1)
    if len(data) <= room:
        return np.arange(len(data))
    order = np.random.default_rng(seed).permutation(len(data))
    if data.labels is not None:  # take every class in turn, in proportion to its size
        labels = data.labels.cpu().numpy()[order]
        place = np.empty(len(order))
        for label in np.unique(labels):
            at = np.flatnonzero(labels == label)
            place[at] = (np.arange(len(at)) + 0.5) / len(at)
        order = order[np.argsort(place, kind="stable")]
    return np.sort(order[:room])


def quantised(data: TimeSeriesData, shown: np.ndarray) -> tuple[dict, list[float], list[float]]:
    """Raw values as 16-bit steps of each channel's range."""
    values = data.series.cpu().numpy()[shown].astype(np.float64)
    seen = np.ones((len(shown), 1, data.n_time), dtype=bool)
    if data.mask is not None:
        seen = data.mask.cpu().numpy()[shown][:, None]
    seen = np.broadcast_to(seen, values.shape)
    low = np.where(seen, values, np.inf).min((0, 2))
    high = np.where(seen, values, -np.inf).max((0, 2))
    step = np.where(high > low, (high - low) / 65000, 1.0)
    whole = np.round((values - low[:, None]) / step[:, None]) - 32500
    whole = np.where(seen, np.clip(whole, -32500, 32500), PADDING)
    return packed(whole, "int16"), low.tolist(), step.tolist()


def table_of(frame: Any, words: Iterable[str] = ()) -> dict[str, Any]:
    """The columns of a frame, packed; those of words as the words and the number of each."""
    out: dict[str, Any] = {}
    for name in frame.columns:
        if name in words:
            codes, known = pd.factorize(frame[name].astype("string"), sort=True)
            codes = packed(np.where(codes < 0, 65535, codes), "uint16")
            out[name] = {"words": known.tolist(), "codes": codes}
        else:
            out[name] = packed(frame[name].to_numpy(dtype=float), "float32")
    return out


def _properties(features: Features) -> dict[str, Any] | None:
    """The properties that a latent goes with, as the page draws them; None where not computed."""
    found = features.properties
    if found is None:
        return None
    count = min(N_PROPERTIES, len(found.names))
    order = np.argsort(-np.nan_to_num(np.abs(found.r)), axis=1, kind="stable")[:, :count]
    numbers = {"r": found.r, "q": found.q, "heldout": found.r_heldout}
    return {
        "names": list(found.names),
        "count": count,
        "which": packed(order, "uint16"),
        **{
            name: packed(np.take_along_axis(values, order, 1), "float32")
            for name, values in numbers.items()
        },
    }


def _neighbours(features: Features) -> dict[str, Any]:
    unit = features._unit()

    def cosines(part: slice) -> np.ndarray:
        return unit[part] @ unit.T

    which, cosine = most_alike(cosines, len(unit), N_NEIGHBOURS)
    return {
        "count": which.shape[1],
        "which": packed(which, "uint32"),
        "cosine": packed(cosine, "float32"),
    }


def most_alike(
    likeness: Callable[[slice], np.ndarray], n: int, most: int, chunk: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """The others that each of ``n`` is most like, and how like, largest first; [n, most].

    Args:
        likeness: of a slice of them to all, [slice, n].
        n: of them.
        most: to keep of each; fewer where there are fewer others.
        chunk: at a time.
    """
    most = min(most, n - 1)
    which, how = np.zeros((n, most), dtype=np.int64), np.zeros((n, most))
    for start in range(0, n if most else 0, chunk):
        at = slice(start, min(start + chunk, n))
        part = likeness(at)
        part[np.arange(len(part)), start + np.arange(len(part))] = -np.inf
        which[at] = np.argsort(-part, axis=1, kind="stable")[:, :most]
        how[at] = np.take_along_axis(part, which[at], 1)
    return which, how


def _effects(features: Features) -> dict[str, Any] | None:
    found = features.effects
    if found is None:
        return None
    names = list(features.outputs)
    change, probability = found.change, found.probability
    if len(names) > MOST_OUTPUTS:
        runs = np.array_split(np.arange(len(names)), MOST_OUTPUTS)
        change = np.stack([change[:, run].mean(1) for run in runs], axis=1)
        if probability is not None:
            probability = np.stack([probability[:, run].mean(1) for run in runs], axis=1)
        names = [
            names[run[0]] if len(run) == 1 else f"{names[run[0]]} to {names[run[-1]]}"
            for run in runs
        ]
    return {
        "task": found.task,
        "names": names,
        "change": packed(change, "float32"),
        "probability": None if probability is None else packed(probability, "float32"),
        "series": packed(found.n_series, "uint32"),
    }


def _classes(features: Features) -> dict[str, Any] | None:
    found = features.classes
    if found is None:
        return None
    return {
        "auc": packed(found.auc, "float32"),
        "share": packed(found.active_share, "float32"),
        "chance": packed(found.chance, "float32"),
    }


def _activations(activity: Activity, shown: np.ndarray) -> dict[str, Any]:
    """Activations of the shown series by latent, as 8-bit shares of the latent's largest."""
    per_series = activity.n_channels * activity.n_pos
    slots = (shown[:, None] * per_series + np.arange(per_series)).ravel()
    whole = len(shown) == activity.n_series
    values: Any = activity.values if whole else activity.values.tocsr()[slots].tocsc()
    values.sort_indices()
    column = np.repeat(np.arange(values.shape[1]), np.diff(values.indptr))
    largest = np.zeros(values.shape[1])
    np.maximum.at(largest, column, values.data)
    share = values.data / np.where(largest > 0, largest, 1)[column]
    padded = np.flatnonzero(~activity.observed[slots])
    return {
        "start": packed(values.indptr, "uint32"),
        "slot": packed(values.indices, "uint32"),
        "share": packed(np.clip(np.round(share * 254) + 1, 1, 255), "uint8"),
        "largest": packed(largest, "float32"),
        "padded": packed(padded, "uint32"),
    }


def _windows(activity: Activity, shown: np.ndarray, n: int) -> dict[str, Any]:
    """The strongest rows of the shown series: slot among them, and activation."""
    per_series = activity.n_channels * activity.n_pos
    place = np.full(activity.n_series, -1)
    place[shown] = np.arange(len(shown))
    whole = len(shown) == activity.n_series
    starts, slots, strength = [0], [], []
    for latent in range(activity.n_latents):
        found = top_slots(activity, latent, n if whole else None)
        found = found[place[found // per_series] >= 0][:n]
        own, values = activity.column(latent)
        strength.append(values[np.searchsorted(own, found)])
        slots.append(place[found // per_series] * per_series + found % per_series)
        starts.append(starts[-1] + len(found))
    return {
        "start": packed(np.array(starts), "uint32"),
        "slot": packed(np.concatenate(slots), "uint32"),
        "activation": packed(np.concatenate(strength), "float32"),
    }


_MEASURES = {  # columns of ``monosemanticity``: in words, and how numbers of it are shown
    "units": ("active units", "{:.0f}"),
    "l0": ("active per position", "{:.1f}"),
    "class_share": ("tell a class (q ≤ 0.05)", "{:.0%}"),
    "class_auc": ("mean AUC", "{:.3f}"),
    "class_auc_chance": ("… by chance", "{:.3f}"),
    "purity": ("class purity of top windows", "{:.0%}"),
    "purity_chance": ("… by chance", "{:.0%}"),
    "property_share": ("follow a property", "{:.0%}"),
    "property_r": ("median |r| held out", "{:.3f}"),
    "similarity": ("likeness of top windows", "{:.3f}"),
    "similarity_chance": ("… by chance", "{:.3f}"),
}


def _measured(name: str, values: Iterable[Any]) -> list[str]:
    """A row of the table beside the random dictionary and the neurons."""
    label, form = _MEASURES.get(name, (name, "{:.3g}"))
    return [label, *("–" if value != value else form.format(value) for value in values)]


HERE = Path(__file__).parent
SCRIPTS = ("data", "charts", "rows", "table", "notes", "searches", "detail")


@page.register
@checked
def write_features(
    features: Features,
    path: str | Path,
    *,
    notes: CodeNotes | str | Path | None = None,
    title: str | None = None,
    n_windows: Count = 9,
    seed: Seed = 0,
) -> Path:
    """Write a page on which every latent can be looked up, sorted, searched, seen and noted on.

    The page holds a table of all latents; a click opens one: its strongest windows on the raw
    series, the classes it is active in, a map of its activation over series and time, what its
    removal does to the output, the properties that it follows, its nearest latents and a note.
    Everything is inside the file; it asks for nothing from anywhere. Of data sets with more than 6
    million samples (or 2 million activations) a sample of the series is shown, as the page says;
    the numbers in its tables are those of all.

    Args:
        features: what :func:`tstlens.saes.features` returned.
        path: the file to write; its folder is made if missing.
        notes: on latents, ``notes.add(text, hook, latent)``, or a file of them that the page or
            :class:`~tstlens.codebooks.CodeNotes` wrote.
        title: heading of the page; the hook and the data where None.
        n_windows: strongest windows per latent.
        seed: of the sample of series, where not all fit.

    Returns:
        The path.

    Raises:
        StorageError: the place is a folder, or cannot be written; no notes there.

    Example:
        >>> from tstlens import saes
        >>> saes.features(model, sae, data).to_html("features.html")  # doctest: +SKIP
    """
    check_file(Path(path))
    content = {**payload(features, n_windows, seed), **_of_latents(features)}
    return write(content, path, notes, title or f"{features.name} latents of {features.hook}")


def write(
    content: dict[str, Any], path: str | Path, notes: CodeNotes | str | Path | None, title: str
) -> Path:
    """Write a page, its JSON values complete but for notes and title."""
    if isinstance(notes, str | Path):
        notes = CodeNotes.load(notes)
    texts = {} if notes is None else dict(notes.texts)
    script = "\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "title": html.escape(title),
        "noun": content["noun"],
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "data": embedded({**content, "title": title, "notes": texts}),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():  # data last: it may hold any text
        text = text.replace(f"[[{name}]]", part)
    return write_text(Path(path), text)
