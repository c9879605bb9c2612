"""Linear probes: what can be read off an activation by a straight line, and where."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.probing.extraction import Activations, Pool, activations, check_pool
from tstlens.probing.probes_fit import Cell, Kind, Rows, Settings, fit_cell, pipeline
from tstlens.probing.probes_result import ProbeResult
from tstlens.probing.probes_target import Target, Targets, check_varied, targets_of
from tstlens.stats import adjusted

_BY = ("layer", "head", "position")


@checked
def probe(
    model: HookedTST,
    train: TimeSeriesData,
    test: TimeSeriesData | None = None,
    *,
    hooks: str | Sequence[str] = ("resid_post",),
    by: str | Sequence[str] = "position",
    target: Target = "labels",
    kind: Kind = "logistic",
    pool: Pool = "mean",
    channels: str = "joined",
    strength: float = 1.0,
    n_folds: int = 5,
    n_shuffles: int = 5,
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    batch_size: int = 128,
    n_jobs: int = 1,
    progress: bool = True,
) -> ProbeResult:
    """Fit a linear probe at every hook point and position, and score it on held-out series.

    Answers "is this written here in a form that a straight line can read?". Activations are
    standardised and the probe is fitted by scikit-learn, both on training series only. Beside each
    score stand the majority class and *shuffled targets*: the same fit after series have exchanged
    their targets, whose score is what the probe gets for its width alone. With targets per position
    whole series exchange them, so that what the position alone gives away stays in the control.
    Padded positions are used nowhere.

    What can mislead: that a probe reads something does not say that the model uses it (patch or
    steer to see); on series that the model was trained on scores are higher than on others, so
    give a test split where there is one; an untrained model's activations can be read too; late
    positions of padded data hold only the long series, so compare with ``baseline`` there; cells of
    a map share their series and the best one was picked, so its interval is too kind. With
    cross-validation the folds share training series, and the interval covers only which series
    were scored.

    Args:
        model: the model.
        train: series to fit on.
        test: other series to score on; None cross-validates within ``train``, all rows of a series
            in the same fold.
        hooks: full hook names, or TransformerLens' short ones, which stand for all layers.
        by: ``"layer"`` for one probe per hook point, ``"position"`` for one per hook point and
            position, ``"head"`` for one per head (hooks with heads), or several of them.
        target: ``"labels"``, the model's classes where it names them; an array [series] or
            [series, pos] of classes (integers, strings) or of numbers (floats, read by
            ``kind="ridge"``), with a test split as a pair (train, test); or a function from data
            to such an array. [series, channel, pos] goes with ``channels="each"``.
        kind: ``"logistic"`` or ``"ridge"``.
        pool: of the positions of a series, where one vector per series is needed: ``"mean"``,
            ``"max"`` or ``"last"``.
        channels: for models that take each channel by itself: ``"joined"`` puts them side by side,
            ``"each"`` makes each a row of its own (with the series' target).
        strength: of the penalty: 1 / C of the logistic regression, alpha of the ridge.
        n_folds: of cross-validation.
        n_shuffles: fits with shuffled targets per cell.
        level: coverage of the intervals.
        n_boot: resamples of series, for intervals where series have several rows.
        seed: of folds, shuffles and resamples.
        batch_size: series per forward pass.
        n_jobs: processes that fit cells.
        progress: show progress bars.

    Returns:
        Scores [hook, (head), (pos)] with controls; ``figure()`` draws the map.

    Raises:
        UnknownHookError, HookError: hooks that do not exist or cannot fire.
        LabelError: no labels, or a class whose name the model does not have.
        ArgumentError: targets that do not fit or are all the same, the same series to fit and to
            score on, or another option that is not possible.

    Source: Alain and Bengio 2016 (arXiv 1610.01644); Hewitt and Liang 2019 (arXiv 1909.03368) for
        selectivity.

    Example:
        >>> from tstlens import HookedTST, load_dataset, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> train = load_dataset("JapaneseVowels", split="train")
        >>> found = probing.probe(model, train, hooks="pooled", by="layer", kind="ridge",
        ...     n_shuffles=1, progress=False)
        >>> bool(found.values[0] > 0.9)
        True
    """
    wanted = _check_by(by)
    check_pool(pool)
    if channels not in ("joined", "each"):
        raise ArgumentError(f"expected channels to be 'joined' or 'each', got {channels!r}")
    if n_shuffles < 1 or n_folds < 2 or not 0 < level < 1 or n_boot < 100:
        raise ArgumentError(
            "expected n_shuffles of at least 1, n_folds of at least 2, a level between 0 and 1 and "
            f"n_boot of at least 100, got {n_shuffles}, {n_folds}, {level} and {n_boot}"
        )
    _check_apart(train, test)
    if isinstance(target, str):
        train, test = train.for_model(model), None if test is None else test.for_model(model)
    kept, held, name = targets_of(target, train, test)
    pipeline(kind, strength, kept.is_class)  # says what is wrong before anything is run
    read = {"batch_size": batch_size, "progress": progress}
    by_hook = activations(model, train, hooks, **read)
    by_hook_held = None if test is None else activations(model, test, hooks, **read)
    first = next(iter(by_hook.values()))
    sizes = {name: (one.n_heads, one.values.shape[2]) for name, one in by_hook.items()}
    if "head" in wanted and min(n for n, _ in sizes.values()) < 2:
        lacking = [name for name, (n, _) in sizes.items() if n < 2]
        raise ArgumentError(f"by='head' needs hook points with heads, such as 'z'; got {lacking}")
    if len(wanted) > 1 and len(set(sizes.values())) > 1:
        raise ArgumentError(
            f"expected hook points with the same heads and positions, got {sizes}; probe them one "
            "by one, or by='layer'"
        )
    axes = ["hook"]
    coords: dict[str, tuple[Any, ...]] = {"hook": tuple(by_hook)}
    for axis, size in (("head", first.n_heads), ("pos", first.values.shape[2])):
        if axis in wanted:
            axes.append(axis)
            coords[axis] = tuple(range(size))
    how = Settings(kind, strength, n_folds, n_shuffles, level, n_boot, seed, kept.is_class)
    grid = list(product(*(coords[axis] for axis in axes)))

    def rows_of(entry: tuple, of: dict[str, Activations], targets: Targets) -> Rows:
        at = dict(zip(axes, entry, strict=True))
        found = of[at["hook"]]
        found = found.head(at["head"]) if "head" in at else found
        found = found.joined() if channels == "joined" else found
        return _rows(found, targets, at.get("pos"), pool)

    rows_of(grid[0], by_hook, kept)  # says what does not fit
    check_varied(kept, *([] if held is None else [held]))
    jobs = (
        (
            rows_of(entry, by_hook, kept),
            None if by_hook_held is None or held is None else rows_of(entry, by_hook_held, held),
            how,
        )
        for entry in grid
    )
    bar: dict[str, Any] = {
        "total": len(grid),
        "desc": "probes",
        "unit": "fit",
        "disable": not progress,
    }
    if n_jobs == 1:
        cells: list[Cell] = [fit_cell(*job) for job in tqdm(jobs, **bar)]
    else:
        from joblib import Parallel, delayed

        pool_of = Parallel(n_jobs=n_jobs, return_as="generator")
        made: Any = pool_of(delayed(fit_cell)(*job) for job in jobs)
        cells = list(tqdm(made, **bar))
    shape = tuple(len(coords[axis]) for axis in axes)
    numbers = {
        field: np.array([getattr(cell, field) for cell in cells]).reshape(shape)
        for field in ("score", "low", "high", "baseline", "p", "n_train", "n_test")
    }
    blank = (np.nan,) * n_shuffles
    shuffled = np.array([cell.shuffled or blank for cell in cells], dtype=float)
    return ProbeResult(
        values=numbers["score"],
        low=numbers["low"],
        high=numbers["high"],
        baseline=numbers["baseline"],
        shuffled=shuffled.T.reshape(n_shuffles, *shape),
        p=numbers["p"],
        q=adjusted(numbers["p"]),
        n_train=numbers["n_train"],
        n_test=numbers["n_test"],
        axes=tuple(axes),
        coords=coords,
        score="accuracy" if kept.is_class else "R²",
        target=name,
        class_names=kept.names,
        level=level,
        time_cells=first.time_cells if "pos" in axes else None,
        made={
            "model": model.cfg.model_name,
            "kind": kind,
            "strength": strength,
            "pool": None if "pos" in axes or kept.by_position else pool,
            "channels": channels,
            "folds": n_folds if test is None else None,
            "n_series": (len(train), 0 if test is None else len(test)),
            "not_converged": sum(cell.unconverged for cell in cells),
            "seed": seed,
        },
    )


def _check_by(by: str | Sequence[str]) -> set[str]:
    wanted = [by] if isinstance(by, str) else list(by)
    if not wanted or any(one not in _BY for one in wanted):
        raise ArgumentError(f"expected by to be one or several of {', '.join(_BY)}, got {by!r}")
    return {"hook", *("pos" if one == "position" else one for one in wanted if one != "layer")}


def _check_apart(train: TimeSeriesData, test: TimeSeriesData | None) -> None:
    if test is None:
        return
    if train.series.shape == test.series.shape and torch.equal(train.series, test.series):
        raise ArgumentError(
            "train and test hold the same series, so the score would not be held out; leave test "
            "out to cross-validate"
        )


def _rows(found: Activations, targets: Targets, pos: int | None, pool: Pool) -> Rows:
    values, observed = found.values, found.observed
    n_series, n_channels, n_pos, _ = values.shape
    y = targets.values
    if targets.by_position and (y.shape[2] != n_pos or y.shape[1] not in (1, n_channels)):
        expected = f"[series, pos={n_pos}]"
        if n_channels > 1:
            expected += f" or [series, channel={n_channels}, pos]"
        raise ArgumentError(
            f"expected targets {expected} at {found.hook}, got {list(y.shape)}; targets per sample "
            "have to be brought to positions first, see model.time_span"
        )
    if pos is None and not targets.by_position:
        width = found.pooled(pool).reshape(n_series * n_channels, -1)
        place = np.tile(np.arange(n_channels), n_series)
        series = np.repeat(np.arange(n_series), n_channels)
        return Rows(width, y[series], series, place)
    if pos is not None:
        values, observed = values[:, :, pos : pos + 1], observed[:, :, pos : pos + 1]
        y = y[:, :, pos : pos + 1] if targets.by_position else y
    at = np.argwhere(observed)  # [row, (series, channel, pos)]
    series, channel, where = at.T
    place = channel * n_pos + where
    if not targets.by_position:
        return Rows(values[observed], y[series], series, place)
    own = y[series, channel if y.shape[1] > 1 else 0, where]
    return Rows(values[observed], own, series, place)
