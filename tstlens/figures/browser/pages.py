"""The browser page of a dictionary's latents, written atomically.

It holds what it needs to know of a Features result as compact text, small enough for 2,000 latents:
little-endian arrays in base64, which the page decodes on demand.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, StorageError
from tstlens.figures.browser import page
from tstlens.saes.reading.activity import top_slots
from tstlens.saes.reading.result import Features
from tstlens.storage import write_text

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


def payload(features: Features, n_windows: int, seed: int = 0) -> dict[str, Any]:
    """Everything on the page as JSON values.

    Args:
        features: the result.
        n_windows: strongest windows per latent.
        seed: of the sample of series, where not all fit.
    """
    data, activity = features.data, features.activity
    shown = shown_series(features, seed)
    series, low, step = quantised(data, shown)
    n_rows = activity.n_channels
    names = list(data.class_names) if data.labels is not None else []
    labels = None if data.labels is None else data.labels.cpu().numpy()
    mono = features.monosemanticity
    return {
        "name": features.name,
        "hook": features.hook,
        "dataset": data.name,
        "split": data.split,
        "latents": activity.n_latents,
        "active": int((activity.density > 0).sum()),
        "l0": round(float(activity.l0), 3),
        "positions": activity.n_observed,
        "total": len(data),
        "series": [int(index) for index in shown],
        "labels": None if labels is None else [int(labels[index]) for index in shown],
        "classes": names,
        "counts": None if labels is None else np.bincount(labels, minlength=len(names)).tolist(),
        "channels": data.n_channels,
        "rows": n_rows,
        "time": data.n_time,
        "pos": activity.n_pos,
        "spans": [list(span) for span in features.spans],
        "cells": [list(cell) for cell in features.cells],
        "raw": {"values": series, "low": low, "step": step, "padding": PADDING},
        "table": _table(features),
        "properties": properties_of(features),
        "neighbours": _neighbours(features),
        "effects": _effects(features),
        "classTable": _classes(features),
        "heat": activations_of(features, shown),
        "windows": _windows(features, shown, n_windows),
        "mono": {
            "names": [str(name) for name in mono.index],
            "columns": [str(name) for name in mono.columns],
            "values": [[_finite(value) for value in row] for row in mono.to_numpy(dtype=float)],
        },
        "windowLength": None if features.properties is None else features.properties.window_length,
        "permutations": None if features.classes is None else features.classes.n_permutations,
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


def _table(features: Features) -> dict[str, Any]:
    frame = features.table()
    out: dict[str, Any] = {}
    for name in frame.columns:
        column = frame[name]
        if name in ("class", "property", "moves"):
            known = sorted({str(value) for value in column.dropna()})
            at = {value: index for index, value in enumerate(known)}
            missing = column.isna()
            codes = [
                65535 if gone else at[str(value)]
                for value, gone in zip(column, missing, strict=True)
            ]
            out[name] = {"words": known, "codes": packed(np.array(codes), "uint16")}
        else:
            out[name] = packed(column.to_numpy(dtype=float), "float32")
    return out


def properties_of(features: Features) -> dict[str, Any] | None:
    """The properties that a latent goes with, as the page draws them; None where not computed."""
    found = features.properties
    if found is None:
        return None
    count = min(N_PROPERTIES, len(found.names))
    order = np.argsort(-np.nan_to_num(np.abs(found.r)), axis=1, kind="stable")[:, :count]
    take = {name: np.take_along_axis(getattr(found, name), order, 1) for name in ("r", "q")}
    heldout = np.take_along_axis(found.r_heldout, order, 1)
    return {
        "names": list(found.names),
        "count": count,
        "which": packed(order, "uint16"),
        "r": packed(take["r"], "float32"),
        "q": packed(take["q"], "float32"),
        "heldout": packed(heldout, "float32"),
    }


def _neighbours(features: Features) -> dict[str, Any]:
    norm = np.linalg.norm(features.directions, axis=1, keepdims=True)
    unit = features.directions / np.where(norm > 0, norm, 1)
    count = min(N_NEIGHBOURS, len(unit) - 1)
    which = np.zeros((len(unit), count), dtype=np.int64)
    cosine = np.zeros((len(unit), count))
    for start in range(0, len(unit) if count else 0, 512):
        part = unit[start : start + 512] @ unit.T
        part[np.arange(len(part)), start + np.arange(len(part))] = -np.inf
        top = np.argsort(-part, axis=1, kind="stable")[:, :count]
        which[start : start + 512] = top
        cosine[start : start + 512] = np.take_along_axis(part, top, 1)
    return {
        "count": count,
        "which": packed(which, "uint32"),
        "cosine": packed(cosine, "float32"),
    }


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


def activations_of(features: Features, shown: np.ndarray) -> dict[str, Any]:
    """Activations of the shown series by latent, as 8-bit shares of the latent's largest."""
    activity = features.activity
    per_series = activity.n_channels * activity.n_pos
    slots = (shown[:, None] * per_series + np.arange(per_series)).ravel()
    whole = len(shown) == activity.n_series
    values: Any = activity.values if whole else activity.values.tocsr()[slots].tocsc()
    values.sort_indices()
    counts = np.diff(values.indptr)
    largest = np.zeros(values.shape[1])
    column = np.repeat(np.arange(values.shape[1]), counts)
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


def _windows(features: Features, shown: np.ndarray, n: int) -> dict[str, Any]:
    """The strongest rows of the shown series: slot among them, and activation."""
    activity = features.activity
    per_series = activity.n_channels * activity.n_pos
    place = np.full(activity.n_series, -1)
    place[shown] = np.arange(len(shown))
    whole = len(shown) == activity.n_series
    starts, slots, strength = [0], [], []
    for latent in range(activity.n_latents):
        found = top_slots(activity, latent, n if whole else activity.n_series * activity.n_channels)
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


def _finite(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


HERE = Path(__file__).parent
SCRIPTS = ("data.js", "charts.js", "rows.js", "table.js", "latent.js", "main.js")


@page.register
def write_features(
    features: Features,
    path: str | Path,
    *,
    title: str | None = None,
    n_windows: int = 9,
    seed: int = 0,
) -> Path:
    """Write a page on which every latent can be looked up, sorted, searched and seen.

    The page holds a table of all latents; a click opens one: its strongest windows on the raw
    series, the classes it is active in, a map of its activation over series and time, what its
    removal does to the output, the properties that it follows and its nearest latents. Everything
    is inside the file; it asks for nothing from anywhere. Of data sets with more than 6 million
    samples (or 2 million activations) a sample of the series is shown, as the page says; the
    numbers in its tables are those of all.

    Args:
        features: what :func:`tstlens.saes.features` returned.
        path: the file to write; its folder is made if missing.
        title: heading of the page; the hook and the data where None.
        n_windows: strongest windows per latent.
        seed: of the sample of series, where not all fit.

    Returns:
        The path.

    Raises:
        StorageError: the place is a folder, or cannot be written.
        ArgumentError: n_windows below 1.

    Example:
        >>> from tstlens import saes
        >>> saes.features(model, sae, data).to_html("features.html")  # doctest: +SKIP
    """
    if isinstance(n_windows, bool) or not isinstance(n_windows, int) or n_windows < 1:
        raise ArgumentError(f"expected n_windows of at least 1, got {n_windows!r}")
    path = Path(path)
    if path.is_dir():
        raise StorageError(f"expected a file to write at {path}, found a folder; name a file in it")
    about = title or f"{features.name} latents of {features.hook}"
    text = render(payload(features, n_windows, seed), about)
    return write_text(path, text)


def render(content: dict, title: str) -> str:
    """The page as text."""
    parts = {
        "title": html.escape(title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "data": embedded({**content, "title": title}),
        "script": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name in ("title", "style", "script", "data"):  # data last: it may hold any text
        text = text.replace(f"[[{name}]]", parts[name])
    return text
