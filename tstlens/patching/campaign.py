"""A campaign: all pairs, all sites, both directions, several metrics, one folder.

Every unit of work (a direction, a site, its axes) is one file that is written whole or not at all,
so a campaign that was killed goes on where it stopped and ends with the same numbers.

The folder of a campaign: files that are whole or not there, and a record of what they are of.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tstlens import storage
from tstlens.arguments import Positive, checked, shown
from tstlens.data import Pairs
from tstlens.errors import ArgumentError, CorruptFileError, StorageError, UnknownNameError
from tstlens.metrics import ANY, Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.metrics import log_prob, logit, logit_diff, prob
from tstlens.patching.outputs import Swept
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Site, locate, site_names
from tstlens.patching.statistics import Summary, summary
from tstlens.patching.sweep import swept_pairs
from tstlens.results import Result

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

    def _identity_of(self, key: Key) -> str:
        return f"{self.identity} {_stem(key)}"

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
        arrays["fingerprint"] = np.array(self._identity_of(key))
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
        with storage.reading(path, "is damaged", _AGAIN):
            storage.check_packed(path)
        with storage.reading(path, "is damaged", _AGAIN), np.load(path) as arrays:
            of = str(arrays["fingerprint"]) if "fingerprint" in arrays else None
            if of is None:
                warnings.warn(
                    f"{path} was written by an older tstlens, which did not record in it of "
                    "which campaign it is; where that is in doubt, delete it",
                    stacklevel=3,
                )
            elif of != self._identity_of(key):
                raise CorruptFileError(f"{path} is of another campaign or grid; {_AGAIN}")
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
    cfg = {**model.cfg.to_dict(), "class_names": None, "model_name": None}
    digest = hashlib.sha256(json.dumps([made, cfg], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    for name, value in sorted(vars(pairs).items()):
        if isinstance(value, Tensor):
            _add(digest, name, value)
    for name, metric in metrics.items():
        digest.update(f"{name} {metric.name} {metric.unit} {metric.better} {metric.range}".encode())
        digest.update(getattr(getattr(metric.measure, "__code__", None), "co_code", b""))
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


MakeMetric = Callable[[Pairs], Metric]
DIRECTIONS = ("denoise", "noise")
METRICS: dict[str, MakeMetric] = {
    "log_prob": lambda pairs: log_prob(pairs.target),
    "prob": lambda pairs: prob(pairs.target),
    "logit": lambda pairs: logit(pairs.target),
    "logit_diff": lambda pairs: logit_diff(pairs.target, _predicted(pairs)),
}
_DEFAULT_METRICS = ("log_prob", "prob", "logit")


@dataclass(frozen=True)
class Campaign(Result):
    """What a campaign found.

    Args:
        folder: where it lies.
        results: by (direction, site, axes, metric), the axes joined as in ``"layer x head"``.
        target: a class per pair.
        clusters: [pair] the row in the data of the series that goes wrong: what :func:`summary`
            takes as independent.
        made: model, data, sizes.
    """

    folder: Path
    results: dict[tuple[str, str, str, str], SweepResult]
    target: Tensor
    clusters: tuple[int, ...]
    made: dict[str, Any] = field(default_factory=dict)

    @checked
    def result(
        self,
        site: str,
        axes: Sequence[str],
        metric: str = "log_prob",
        direction: str = "denoise",
    ) -> SweepResult:
        """One sweep of the campaign.

        Raises:
            UnknownNameError: the campaign has no such sweep.
        """
        key = (direction, site, " x ".join(axes), metric)
        if key not in self.results:
            raise UnknownNameError(key, self.results, "The campaign holds these sweeps")
        return self.results[key]

    @checked
    def summary(
        self,
        site: str,
        axes: Sequence[str],
        metric: str = "log_prob",
        direction: str = "denoise",
        *,
        per_class: bool = False,
        **options: Any,
    ) -> Summary:
        """Effect, interval, p and q of one sweep, clustered by the series that went wrong."""
        by = self.target if per_class else None
        result = self.result(site, axes, metric, direction)
        return summary(result, by, cluster=self.clusters, **options)

    def to_dataframe(self) -> pd.DataFrame:
        """Every sweep's mean effects: direction, site, metric, its axes, effect, std_error."""
        import pandas as pd

        frames = []
        for (direction, site, axes, metric), result in self.results.items():
            mean = result.mean("pair")
            frame = mean.to_dataframe()
            if result.n_pairs > 1:
                frame["std_error"] = result.std_error().flatten().numpy()
            for name, value in (("metric", metric), ("axes", axes), ("site", site)):
                frame.insert(0, name, value)
            frame.insert(0, "direction", direction)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        sites = len({key[1:3] for key in self.results})
        return (
            f"Campaign({len(self.target)} pairs, {sites} grids of sites, "
            f"{len(self.results)} sweeps in {self.folder})"
        )


@checked
def campaign_grids(
    model: HookedTST, sites: Sequence[str] | None = None
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The grids of sites that a campaign sweeps by default: all sites, coarse and by position.

    Site ``pos_embed`` is left out: it is the same in every run.

    Args:
        model: the model.
        sites: short names; None for all that the model has and that fire as it is set.

    Raises:
        UnknownSiteError: the model has no such site.
    """
    found: list[tuple[str, tuple[str, ...]]] = []
    for name in site_names(model) if sites is None else sites:
        place = locate(model, Site(name))
        silent = model.why_silent(place.hook_name(place.layers[0])) is not None
        both = bool(model.cfg.n_decoder_layers) and len(place.layers) == model.cfg.n_layers
        if sites is None and (silent or both or name == "pos_embed"):
            continue  # sites of both stacks are among those of each
        coarse = tuple(axis for axis in ("channel", "head") if axis in place.axes)
        along = next((axis for axis in ("pos", "query", "time") if axis in place.axes), "feature")
        layer = ("layer",) if place.layered else ()
        whole = (*layer, *coarse)
        found += [(name, whole)] if whole else []
        found.append((name, (*whole, along)))
    return tuple(found)


@checked
def run_campaign(
    model: HookedTST,
    pairs: Pairs,
    out: str | Path,
    *,
    grids: Sequence[tuple[str, Sequence[str]]] | None = None,
    metrics: Sequence[str] | Mapping[str, MakeMetric] = _DEFAULT_METRICS,
    directions: Sequence[str] = DIRECTIONS,
    figures: bool = True,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> Campaign:
    """Sweep every site of every pair, in both directions, and keep it all in a folder.

    Answers "what matters in this model, for all its errors?". Every patched run is made once and
    read with all metrics. Calling it again with the same folder goes on where it stopped; a folder
    of another campaign is refused. What can mislead: with so many sites some are strong by chance;
    the table's q-values are the guard.

    Args:
        model: the model.
        pairs: all pairs, from :func:`~tstlens.data.misclassified_pairs` say.
        out: the folder: ``campaign.json``, ``results/*.npz`` (one per direction and grid, values
            of all metrics), ``summary.csv`` (effect, interval, p and q of every site, for all pairs
            and per class) and ``figures/*.html``.
        grids: (site, axes) pairs; None for :func:`campaign_grids`.
        metrics: names among log_prob, prob, logit and logit_diff, or functions from pairs to a
            metric by name. The first one is drawn.
        directions: ``"denoise"`` patches clean into corrupted, ``"noise"`` corrupted into clean.
        figures: write figures.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        progress: show a progress bar.

    Returns:
        All results; also readable later with :func:`load_campaign`.

    Raises:
        ArgumentError: a direction that does not exist, a folder of something else, or hooks on the
            model.
        UnknownNameError: a metric that does not exist.
        CorruptFileError: a file in the folder is damaged.
        UnknownSiteError, UnknownAxisError: a grid that the model does not have.

    Example:
        >>> import tempfile, torch
        >>> from tstlens import patching
        >>> from tstlens.data import Pairs
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> pairs = Pairs(*torch.randn(2, 6, 3, 8), torch.arange(6) % 5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     campaign = patching.run_campaign(model, pairs, folder, figures=False,
        ...         grids=[("z", ("layer", "head"))], progress=False)
        >>> campaign.result("z", ("layer", "head"), "prob", "noise").values.shape
        torch.Size([6, 2, 4])
    """
    check_pairs(model, pairs.clean, pairs.corrupted, pairs.clean_mask, pairs.corrupted_mask)
    hooked = [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    if hooked:
        raise ArgumentError(
            f"expected a model without hooks, got some at {hooked[0]!r}: a folder cannot tell "
            "later what they did; remove them with model.reset_hooks(including_permanent=True)"
        )
    grids = campaign_grids(model) if grids is None else grids
    chosen = [(site, tuple(axes)) for site, axes in grids]
    for site, axes in chosen:
        Swept.found(model, site, axes, None)
    makers = _makers(metrics)
    unknown = [direction for direction in directions if direction not in DIRECTIONS]
    if unknown or not directions or not chosen:
        raise ArgumentError(
            f"expected directions among {DIRECTIONS} and at least one grid, got "
            f"{tuple(directions)} and {len(chosen)} grids"
        )
    made_metrics = {name: make(pairs) for name, make in makers.items()}
    for name, metric in made_metrics.items():
        if not isinstance(metric, Metric):
            raise ArgumentError(
                f"expected metric {name!r} to be a function from pairs to a metric, lambda pairs: "
                f"patching.logit(pairs.target) say; it gave {shown(metric)}"
            )
        made_metrics[name] = metric.for_model(model)
    made = {
        "model": model.cfg.model_name,
        "pairs": pairs.made,
        "n_pairs": len(pairs),
        "metrics": list(makers),
        "directions": list(directions),
        "grids": [[site, list(axes)] for site, axes in chosen],
        "target": pairs.target.tolist(),
        "clusters": _clusters(pairs),
    }
    folder = CampaignFolder(Path(out))
    with storage.claimed(folder.path):
        folder.open(fingerprint(model, pairs, made_metrics, made), made)
        work = [(direction, *grid) for direction in directions for grid in chosen]
        bar = tqdm(work, desc="campaign", unit="grid", disable=not progress)
        for direction, site, axes in bar:
            bar.set_postfix_str(f"{direction} {site} {' x '.join(axes)}")
            key = (direction, site, " x ".join(axes))
            if folder.has(key):
                continue
            turned = pairs if direction == "denoise" else pairs.swap()
            folder.write(key, _sweeps(model, turned, site, axes, made_metrics, memory_mb))
        campaign = load_campaign(folder.path)
        folder.write_table(lambda: _table(campaign, progress))
        if figures:
            _draw(campaign, folder, next(iter(makers)), progress)
    return campaign


@checked
def load_campaign(folder: str | Path) -> Campaign:
    """Read what :func:`run_campaign` wrote.

    Args:
        folder: the campaign's folder.

    Raises:
        StorageError: there is no campaign in the folder.
        CorruptFileError: a file in the folder is damaged.
    """
    stored = CampaignFolder(Path(folder))
    made = stored.description()
    results = {}
    with storage.reading(stored.path, "holds no whole campaign", "run it in a new folder"):
        for direction in made["directions"]:
            for site, axes in made["grids"]:
                key = (direction, site, " x ".join(axes))
                if stored.has(key):
                    for metric, result in stored.read(key).items():
                        results[(*key, metric)] = result
        clusters = tuple(made["clusters"])
        return Campaign(stored.path, results, torch.tensor(made["target"]), clusters, made)


@torch.no_grad()
def _sweeps(
    model: HookedTST,
    pairs: Pairs,
    site: str,
    axes: tuple[str, ...],
    metrics: Mapping[str, Metric],
    memory_mb: float,
) -> dict[str, SweepResult]:
    """One sweep, read with all metrics: what ``sweep`` gives for each."""
    what = Swept.found(model, site, axes, None)
    runs = (pairs.clean, pairs.clean_mask), (pairs.corrupted, pairs.corrupted_mask)
    results = swept_pairs(model, what, *runs, list(metrics.values()), memory_mb)
    arrays = [{part: getattr(one, part).cpu() for part in _ARRAYS} for one in results]
    return {
        name: replace(result, **parts)
        for name, result, parts in zip(metrics, results, arrays, strict=True)
    }


def _makers(metrics: Sequence[str] | Mapping[str, MakeMetric]) -> dict[str, MakeMetric]:
    if isinstance(metrics, Mapping):
        makers = dict(metrics)
    else:
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        for name in names:
            if name not in METRICS:
                raise UnknownNameError(name, METRICS, "Give a dict of functions for others")
        makers = {name: METRICS[name] for name in names}
    if not makers:
        raise ArgumentError("expected at least one metric, got none")
    return makers


def _predicted(pairs: Pairs) -> Tensor:
    if pairs.predicted is None:
        raise ArgumentError(
            "logit_diff compares with the class that the model gave to the corrupted series, and "
            "these pairs do not say which; use misclassified_pairs, or leave logit_diff out"
        )
    return pairs.predicted


def _clusters(pairs: Pairs) -> list[int]:
    """The corrupted series of each pair in the data, or the pair itself."""
    index = pairs.corrupted_index
    return list(range(len(pairs))) if index is None else index.tolist()


def _table(campaign: Campaign, progress: bool) -> pd.DataFrame:
    """Effect, interval, p and q of every site, for all pairs and per class."""
    import pandas as pd

    frames = []
    bar = tqdm(campaign.results.items(), desc="statistics", unit="sweep", disable=not progress)
    for (direction, site, axes, metric), result in bar:
        n_classes = len(set(campaign.target.tolist()))
        for by in (None, campaign.target) if n_classes > 1 else (None,):
            frame = summary(result, by, cluster=campaign.clusters).to_dataframe()
            for name, value in (("metric", metric), ("axes", axes), ("site", site)):
                frame.insert(0, name, value)
            frame.insert(0, "direction", direction)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _draw(campaign: Campaign, folder: CampaignFolder, metric: str, progress: bool) -> None:
    """A map of every sweep, and its strongest sites with intervals."""
    keys = [key for key in campaign.results if key[3] == metric]
    for key in tqdm(keys, desc="figures", unit="sweep", disable=not progress):
        result = campaign.results[key]
        if len(result.axes) > 5:
            continue
        name = key[:3]
        options = {"clusters": campaign.clusters}
        folder.write_figure(name, "map", lambda r=result, o=options: r.figure(**o))
        folder.write_figure(
            name,
            "strongest",
            lambda r=result: summary(r, cluster=campaign.clusters).figure(),
        )
