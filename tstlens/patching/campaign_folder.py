"""The folder of a campaign: files that are whole or not there, and a record of what they are of."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tstlens import storage
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
_AGAIN = "delete it and run the campaign again, which makes this one file anew"


class CampaignFolder:
    """Reads and writes a campaign's files.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.identity = path, None

    def open(self, identity: str, made: dict[str, Any]) -> None:
        """Start a campaign in an empty folder, or go on with the same one.

        Raises:
            ArgumentError: the folder holds another campaign, or something else.
            StorageError: the folder cannot be written.
        """
        (self.path / "results").mkdir(exist_ok=True)
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
            plain = json.loads(storage.json_text(record, "what a campaign is of"))
            record = {**plain, "record_sha256": storage.digest_of_json(plain)}
            storage.write_text(self.path / RECORD, storage.json_text(record, RECORD, indent=1))
        found = self.description()
        self.identity = identity
        if found.get("fingerprint") != identity:
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
        if not storage.regular(path):
            raise StorageError(f"expected {RECORD} in {self.path}, found none: no campaign is here")
        found = storage.read_json(path, "a campaign's record", "start in a new folder")
        recorded = found.pop("record_sha256", None)  # None in a campaign of an older tstlens
        if recorded is not None and recorded != storage.digest_of_json(found):
            raise CorruptFileError(f"{path} was altered; start in a new folder")
        version = found.get("format_version")
        if version != FORMAT_VERSION:
            raise CorruptFileError(
                f"expected format version {FORMAT_VERSION} in {path}, got {version!r}; was it "
                "written by another tstlens?"
            )
        self.identity = found.get("fingerprint")
        return found

    def has(self, key: Key) -> bool:
        """Whether this unit of work is done."""
        path = self.path / _file(key)
        if storage.regular(path):
            self.read(key)  # it is whole, and of this campaign
            return True
        return False

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
        arrays["fingerprint"] = np.array(self.identity)
        buffer = BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        storage.write_bytes(self.path / _file(key), buffer.getvalue())

    def read(self, key: Key) -> dict[str, SweepResult]:
        """A unit of work by metric.

        Raises:
            CorruptFileError: the file is damaged.
        """
        path = self.path / _file(key)
        if not storage.regular(path):
            raise CorruptFileError(f"expected results at {path}, found no file; {_AGAIN}")
        with storage.reading(path, "is damaged", _AGAIN), np.load(path) as arrays:
            of = str(arrays["fingerprint"]) if "fingerprint" in arrays else None
            if of is None:
                warnings.warn(
                    f"{path} was written by an older tstlens, which did not record in it of "
                    "which campaign it is; where that is in doubt, delete it",
                    stacklevel=3,
                )
            elif of != self.identity:
                raise CorruptFileError(f"{path} is of another campaign; {_AGAIN}")
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

    def write_table(self, make: Callable[[], pd.DataFrame]) -> None:
        """``summary.csv``, unless it is there."""
        if not (self.path / "summary.csv").is_file():
            text = make().to_csv(index=False, float_format="%.9g")
            storage.write_text(self.path / "summary.csv", text)

    def write_figure(self, key: Key, kind: str, make: Callable[[], go.Figure]) -> None:
        """A figure as HTML, unless it is there; plotly's script lies beside it once."""
        name = f"figures/{_stem(key)}.{kind}.html"
        if (self.path / name).is_file():
            return
        if not (self.path / "figures" / "plotly.min.js").is_file():
            from plotly.offline import get_plotlyjs

            storage.write_text(self.path / "figures" / "plotly.min.js", get_plotlyjs())
        html = make().to_html(include_plotlyjs="plotly.min.js", full_html=True)
        storage.write_text(self.path / name, html)


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
