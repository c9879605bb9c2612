"""``build``: from a checkpoint to one HTML file and the JSON with its numbers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tstlens
from tstlens import storage
from tstlens.arguments import Seed, checked
from tstlens.data import TimeSeriesData, load_described
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.report.account import account
from tstlens.report.page import render
from tstlens.report.study import Study, study


@checked
def build(
    model: str | Path | HookedTST,
    out: str | Path | None = None,
    *,
    data: str | TimeSeriesData | None = None,
    max_pairs: int = 24,
    seed: Seed = 0,
    progress: bool = True,
) -> Path:
    """Write a report on a classifier: what decides between its classes, and where it errs.

    One HTML file that opens offline, and beside it a JSON file with every number in it. Evaluates
    on the test split; sweeps layers, heads, MLPs, positions and channels over the misclassified
    series and between the classes that the model confuses most; log-probabilities with intervals
    over pairs (bootstrap-t, see :func:`tstlens.stats.mean_interval`), and a control. Between
    classes also: the heads' p- and q-values and the stability of their order, attribution beside
    the exact sweep, and a circuit whose faithfulness is judged on pairs that it was not chosen on.
    Under a minute on two cores for the shipped checkpoints.

    Args:
        model: a checkpoint's name, a folder, a hub id, or a live model.
        out: the HTML file; ``<name>-report.html`` in the current folder where None.
        data: a data set's name, or labelled series to report on; what the checkpoint was trained
            on where None.
        max_pairs: clean/corrupted pairs per question.
        seed: of the choice of pairs, the control and the bootstrap.
        progress: whether to show a bar.

    Returns:
        The HTML file.

    Raises:
        UnknownCheckpointError: nothing goes by that name.
        ArgumentError: no classifier, a checkpoint that does not name its data, data of other
            classes, or fewer than 2 pairs.
        LabelError: data without labels.
        StorageError: the file cannot be written.

    Example:
        >>> from tstlens import report
        >>> report.build("japanese-vowels", "report.html")  # doctest: +SKIP
        PosixPath('report.html')
    """
    started = time.monotonic()
    given = model
    if not isinstance(model, HookedTST):
        model = HookedTST.from_pretrained(model)
    name = model.cfg.model_name if isinstance(given, HookedTST) else Path(given).name
    path = Path(f"{_slug(name)}-report.html" if out is None else out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"expected out to end in .html, got {str(path)!r}")
    storage.check_file(path)
    storage.check_file(path.with_suffix(".json"))
    if not isinstance(data, TimeSeriesData):
        described = {"name": data} if data else model.info.get("data") or {}
        data = load_described(described, "test")
    found = study(model, data, max_pairs, seed, progress)
    made = _made(found, started)
    numbers = account(found, name, made)
    html = render(found, numbers)
    text = json.dumps(_plain(numbers), indent=1) + "\n"
    return storage.write_set({path: html, path.with_suffix(".json"): text})


def _made(found: Study, started: float) -> dict[str, Any]:
    packages = ("torch", "transformer-lens", "aeon", "plotly", "scipy")
    return {
        "tstlens": tstlens.__version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "seed": found.seed,
        "max_pairs": found.max_pairs,
        "bootstrap": {
            "resamples": 2000,
            "level": 0.95,
            "method": "bootstrap-t within one to three t intervals, by series",
        },
        "p_values": {"flips": 10000, "method": "signs of whole series flipped"},
        "seconds": {**found.seconds, "total": time.monotonic() - started},
    }


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _plain(value: Any) -> Any:
    """As JSON takes it: no dataclasses, tensors, tuples or NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    return value
