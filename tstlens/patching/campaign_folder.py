"""The folder of a campaign: files that are whole or not there, and a record of what they are of."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tstlens.data import Pairs
from tstlens.errors import ArgumentError, CorruptFileError, StorageError
from tstlens.metrics import ANY
from tstlens.model import HookedTST
from tstlens.patching.metrics import Metric
from tstlens.patching.result import SweepResult

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT_VERSION = 1
RECORD = "campaign.json"
_DESCRIBED = (
    "axes",
    "coords",
    "metric",
    "unit",
    "better",
    "site",
    "source",
    "time_cells",
    "positions_are",
    "n_pairs",
    "made",
)
_ARRAYS = ("values", "baseline", "clean", "rounding")
Key = tuple[str, str, str]


class CampaignFolder:
    """Reads and writes a campaign's files.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, identity: str, made: dict[str, Any]) -> None:
        """Start a campaign in an empty folder, or go on with the same one.

        Raises:
            ArgumentError: the folder holds another campaign, or something else.
            StorageError: the folder cannot be written.
        """
        try:
            (self.path / "results").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"could not make the folder {self.path}: {error}") from error
        if not (self.path / RECORD).is_file():
            strangers = [
                entry.name
                for entry in self.path.iterdir()
                if entry.name != "results" and not entry.name.startswith(".")
            ]
            if strangers:
                raise ArgumentError(
                    f"{self.path} holds {sorted(strangers)[:3]} and no campaign; give out= a new "
                    "or an empty folder"
                )
            record = {"format_version": FORMAT_VERSION, "fingerprint": identity, **made}
            self._write_bytes(RECORD, (json.dumps(record, indent=1) + "\n").encode())
        found = self.description()
        if found["fingerprint"] != identity:
            differ = [name for name in made if found.get(name) != made[name]]
            what = f"differing in {', '.join(differ)}" if differ else "of other weights or series"
            raise ArgumentError(
                f"{self.path} holds another campaign ({what}); to go on with it pass what it was "
                "started with, else give out= a new folder"
            )

    def description(self) -> dict[str, Any]:
        """``campaign.json``.

        Raises:
            StorageError: there is none.
            CorruptFileError: it is damaged.
        """
        path = self.path / RECORD
        if not path.is_file():
            raise StorageError(f"expected {RECORD} in {self.path}, found none: no campaign is here")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptFileError(f"{path} is no JSON: {error}; start in a new folder") from error
        version = found.get("format_version") if isinstance(found, dict) else None
        if version != FORMAT_VERSION:
            raise CorruptFileError(
                f"expected format version {FORMAT_VERSION} in {path}, got {version!r}; was it "
                "written by another tstlens?"
            )
        return found

    def has(self, key: Key) -> bool:
        """Whether this unit of work is done."""
        return (self.path / _file(key)).is_file()

    def write(self, key: Key, results: Mapping[str, SweepResult]) -> None:
        """Keep a unit of work: the same sweep read with several metrics."""
        arrays: dict[str, np.ndarray] = {}
        described: dict[str, Any] = {}
        for name, result in results.items():
            for part in _ARRAYS:
                if getattr(result, part) is not None:
                    arrays[f"{name}.{part}"] = getattr(result, part).numpy()
            described[name] = {part: getattr(result, part) for part in _DESCRIBED}
            # JSON has no infinity.
            ends = [end if math.isfinite(end) else None for end in result.range]
            described[name]["range"] = ends
        arrays["described"] = np.array(json.dumps(described))
        self._write(_file(key), lambda handle: np.savez_compressed(handle, **arrays))  # type: ignore[arg-type]

    def read(self, key: Key) -> dict[str, SweepResult]:
        """A unit of work by metric.

        Raises:
            CorruptFileError: the file is damaged.
        """
        path = self.path / _file(key)
        try:
            with np.load(path) as arrays:
                described = json.loads(str(arrays["described"]))
                return {
                    name: SweepResult(
                        **{
                            part: torch.from_numpy(arrays[f"{name}.{part}"])
                            for part in _ARRAYS
                            if f"{name}.{part}" in arrays
                        },
                        **_restored(about),
                    )
                    for name, about in described.items()
                }
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise CorruptFileError(
                f"{path} is damaged ({error}); delete it and run the campaign again, which makes "
                "this one file anew"
            ) from error

    def write_table(self, make: Callable[[], pd.DataFrame]) -> None:
        """``summary.csv``, unless it is there."""
        if not (self.path / "summary.csv").is_file():
            text = make().to_csv(index=False, float_format="%.9g")
            self._write_bytes("summary.csv", text.encode())

    def write_figure(self, key: Key, kind: str, make: Callable[[], go.Figure]) -> None:
        """A figure as HTML, unless it is there; plotly's script lies beside it once."""
        name = f"figures/{_stem(key)}.{kind}.html"
        if (self.path / name).is_file():
            return
        (self.path / "figures").mkdir(exist_ok=True)
        if not (self.path / "figures" / "plotly.min.js").is_file():
            from plotly.offline import get_plotlyjs

            self._write_bytes("figures/plotly.min.js", get_plotlyjs().encode())
        html = make().to_html(include_plotlyjs="plotly.min.js", full_html=True)
        self._write_bytes(name, html.encode())

    def _write_bytes(self, name: str, content: bytes) -> None:
        self._write(name, lambda handle: handle.write(content))

    def _write(self, name: str, fill: Callable[[Any], Any]) -> None:
        """Write beside the place, then rename: a kill leaves the old file or the new one."""
        path = self.path / name
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(staged, "wb") as handle:
                fill(handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(staged, path)
        except OSError as error:
            raise StorageError(f"could not write {path}: {error}") from error
        finally:
            staged.unlink(missing_ok=True)


def fingerprint(
    model: HookedTST, pairs: Pairs, metrics: Mapping[str, Metric], made: dict[str, Any]
) -> str:
    """SHA-256 of everything that the numbers depend on."""
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    for name, value in sorted(vars(pairs).items()):
        if isinstance(value, Tensor):
            _add(digest, name, value)
    for name, metric in metrics.items():
        digest.update(f"{name} {metric.name} {metric.unit}".encode())
        for target in metric.targets:
            _add(digest, name, target)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def _restored(about: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    cells = about["time_cells"]
    ends = zip(about.get("range", ANY), ANY, strict=True)  # campaigns of before had no range
    return {
        **about,
        "range": tuple(far if end is None else end for end, far in ends),
        "axes": tuple(about["axes"]),
        "coords": {axis: tuple(entries) for axis, entries in about["coords"].items()},
        "time_cells": None if cells is None else tuple((first, last) for first, last in cells),
    }


def _stem(key: Key) -> str:
    direction, site, axes = key
    return f"{direction}.{site.replace('.', '-')}.{axes.replace(' x ', '-') or 'whole'}"


def _file(key: Key) -> str:
    return f"results/{_stem(key)}.npz"
