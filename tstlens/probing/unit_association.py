"""Hidden units and latents against predictors of the input window that a person can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from tstlens.arguments import Count, Share, checked
from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import widened, window_properties, windows
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.model.activations import Activations, activations, latents
from tstlens.results import TableResult
from tstlens.stats import adjusted, clustered_correlation, mean_known, t_interval

if TYPE_CHECKING:
    import pandas as pd


Predictor = Callable[[np.ndarray, np.ndarray], np.ndarray]
Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Predictors:
    """Values of every predictor at every slot (position of every channel).

    Args:
        values: [series, slot, predictor].
        names: of the predictors.
    """

    values: Float[np.ndarray, "series slot predictor"]
    names: tuple[str, ...]


def predictors_of(
    data: TimeSeriesData,
    spans: Spans,
    per_channel: bool,
    own: Mapping[str, Predictor] | None,
    standard: bool,
) -> Predictors:
    """Level, slope, variance, frequency bands, channel and position of every window, and the
    user's own.

    Raises:
        ArgumentError: no predictor at all, a name used twice, or a function whose result is not
            one finite number per window.
    """
    parts: list[np.ndarray] = []
    names: list[str] = []
    if standard:
        values, found = window_properties(data, spans, per_channel=per_channel)
        parts.append(values)
        names += found
    for name, function in (own or {}).items():
        if name in names:
            raise ArgumentError(f"predictors: {name!r} is the name of a standard one; rename it")
        parts.append(_of_function(data, spans, per_channel, name, function)[:, :, None])
        names.append(name)
    if not parts:
        raise ArgumentError("expected predictors, got none; leave standard=True, or give some")
    return Predictors(np.concatenate(parts, 2), tuple(names))


def _of_function(
    data: TimeSeriesData, spans: Spans, per_channel: bool, name: str, function: Predictor
) -> Float[np.ndarray, "series slot"]:
    columns = []
    n_channels = data.n_channels if per_channel else 1
    shown = windows(data, widened(spans, data.n_time))
    for channel in range(n_channels):
        for window, seen in shown:
            given = window[:, channel : channel + 1] if per_channel else window
            value = np.asarray(function(given, seen > 0), dtype=np.float64)
            if value.shape != (len(data),):
                raise ArgumentError(
                    f"predictor {name!r}: expected one number per series [{len(data)}] from "
                    f"windows {list(given.shape)}, got {list(value.shape)}"
                )
            observed = seen.any(1)
            if not np.isfinite(value[observed]).all():
                raise ArgumentError(f"predictor {name!r} gave NaN or infinity for some windows")
            columns.append(np.where(observed, value, 0))
    return np.stack(columns, 1)


NEURONS = "neurons"


@dataclass(frozen=True, eq=False)
class Found:
    """One kind of units: the neurons of a hook point, or the latents of a dictionary.

    Args:
        r: [seed, unit, predictor] Pearson correlation on the half that predictors are found on;
            NaN where either is constant.
        q: [seed, unit, predictor] after Benjamini and Hochberg over all pairs.
        r_heldout: [seed, unit, predictor] on the other half.
        confirmed: [seed, unit, predictor] found on one half and confirmed on the other.
        distinct: [seed, unit] confirmed predictors, near-copies of a stronger one left out.
        by_position: [seed, unit] the same count when windows come from other series: what a unit
            follows through the position alone.
        alive: [seed, unit] whether the unit varies on both halves.
    """

    r: Float[np.ndarray, "seed unit predictor"]
    q: Float[np.ndarray, "seed unit predictor"]
    r_heldout: Float[np.ndarray, "seed unit predictor"]
    confirmed: Bool[np.ndarray, "seed unit predictor"]
    distinct: Int[np.ndarray, "seed unit"]
    by_position: Int[np.ndarray, "seed unit"]
    alive: Bool[np.ndarray, "seed unit"]

    @property
    def counts(self) -> Int[np.ndarray, "seed unit"]:
        """Confirmed predictors per unit."""
        return self.confirmed.sum(2)


@dataclass(frozen=True, eq=False, repr=False)
class Units(TableResult):
    """Units against predictors of the input window, for neurons and dictionaries, over seeds.

    Args:
        kinds: what was found, by name: ``"neurons"`` and every dictionary.
        predictors: names.
        hook: hook point of the neurons.
        seeds: of the splits.
        level: of the false discovery rate.
        least_r: the least |r| that counts, on both halves.
        made: how.
    """

    kinds: Mapping[str, Found]
    predictors: tuple[str, ...]
    hook: str
    seeds: tuple[int, ...]
    level: float
    least_r: float
    made: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> pd.DataFrame:
        """One row per kind of units; means over seeds, ``_low`` and ``_high`` over seeds.

        Intervals are plain t, of seeds of the split.

        ``units`` that vary; ``explained`` share with a confirmed predictor; ``predictors`` per
        unit; ``distinct`` of them (near-copies left out); ``by_position``: per unit with other
        series' windows; ``single``: share of explained units with one distinct predictor; ``r``:
        median held-out |r| of the strongest confirmed predictor; ``gain``: distinct predictors per
        explained neuron over those per explained unit of this kind, above 1 where these units
        stand for fewer things.
        """
        import pandas as pd

        base = self._per_explained(self.kinds[NEURONS])
        rows = []
        for name, found in self.kinds.items():
            alive = np.maximum(found.alive.sum(1), 1)
            explained = (found.counts > 0) & found.alive
            n_explained = explained.sum(1)
            single = ((found.distinct == 1) & explained).sum(1) / np.maximum(n_explained, 1)
            columns = {
                "explained": n_explained / alive,
                "predictors": (found.counts * found.alive).sum(1) / alive,
                "distinct": (found.distinct * found.alive).sum(1) / alive,
                "by_position": (found.by_position * found.alive).sum(1) / alive,
                "single": np.where(n_explained > 0, single, np.nan),
                "r": self._strongest(found),
                "gain": base / self._per_explained(found),
            }
            row: dict[str, Any] = {"kind": name, "units": int(found.alive.sum(1).mean())}
            for key, values in columns.items():
                known = values[np.isfinite(values)]
                low, high = t_interval(known[:, None])
                row |= {key: mean_known(values), f"{key}_low": low[0], f"{key}_high": high[0]}
            rows.append(row)
        return pd.DataFrame(rows).set_index("kind")

    def _rows(self) -> pd.DataFrame:
        """One per confirmed pair of a unit and a predictor."""
        import pandas as pd

        parts = []
        for name, found in self.kinds.items():
            seed, unit, predictor = at = np.nonzero(found.confirmed)
            columns = {
                "seed": np.array(self.seeds)[seed],
                "kind": name,
                "unit": unit,
                "predictor": np.array(self.predictors, dtype=object)[predictor],
            }
            numbers = {key: getattr(found, key)[at] for key in ("r", "q", "r_heldout")}
            parts.append(pd.DataFrame(columns | numbers))
        return pd.concat(parts, ignore_index=True)

    @checked
    def of(self, unit: int, kind: str = NEURONS) -> pd.DataFrame:
        """The predictors that one unit follows, in how many seeds, strongest first.

        Raises:
            ArgumentError: no such kind or unit.
        """
        if kind not in self.kinds:
            raise ArgumentError(f"expected kind to be one of {list(self.kinds)}, got {kind!r}")
        found = self.kinds[kind]
        if not 0 <= unit < found.r.shape[1]:
            raise ArgumentError(f"expected a unit in 0..{found.r.shape[1] - 1}, got {unit}")
        import pandas as pd

        table = pd.DataFrame(
            {
                "predictor": self.predictors,
                "r_heldout": found.r_heldout[:, unit].mean(0),
                "seeds": found.confirmed[:, unit].sum(0),
            }
        )
        strongest: Any = table[table["seeds"] > 0]
        order = strongest["r_heldout"].abs().sort_values(ascending=False).index
        return strongest.loc[order].reset_index(drop=True)

    @staticmethod
    def _per_explained(found: Found) -> Float[np.ndarray, " seed"]:
        explained = (found.counts > 0) & found.alive
        total = (found.distinct * explained).sum(1)
        return np.where(explained.any(1), total / np.maximum(explained.sum(1), 1), np.nan)

    @staticmethod
    def _strongest(found: Found) -> Float[np.ndarray, " seed"]:
        size = np.where(found.confirmed, np.abs(found.r_heldout), 0).max(2)  # [seed, unit]
        return np.array([np.median(row[row > 0]) if (row > 0).any() else np.nan for row in size])

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {float((found.distinct * found.alive).sum() / max(found.alive.sum(), 1)):.1f}"
            for name, found in self.kinds.items()
        )
        return f"Units({self.hook}, distinct predictors per unit: {said}; {len(self.seeds)} splits)"


FEWEST = 8  # series, four on each side of the split
CHUNK = 256  # units whose per-series sums are held at once


@checked
def units(
    model: HookedTST,
    data: TimeSeriesData,
    hook: str | None = None,
    *,
    sae: Any = None,
    predictors: Mapping[str, Predictor] | None = None,
    standard: bool = True,
    level: Share = 0.05,
    least_r: Annotated[float, Ge(0), Lt(1)] = 0.2,
    near_copy: Annotated[float, Gt(0), Le(1)] = 0.7,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    spans: Spans | None = None,
    batch_size: Count = 128,
    progress: bool = True,
) -> Units:
    """Which properties of the input window each hidden unit and each latent follows.

    Answers "does a unit stand for one thing that a person can name, and does a latent more than a
    neuron?". Half of the series find (unit, predictor) pairs under false discovery control over
    all of them; the other half confirms those found, with the same sign and under false discovery
    control among them; this for several random halves. p-values take *series* as the unit, since
    positions of one series are alike. Padded positions take no part.

    What can mislead: Pearson sees straight lines only, and a sparse latent's correlation is small
    even where it is perfectly specific; with enough series tiny correlations are confirmed (hence
    ``least_r``), and counts hang on where it is set, so try several; predictors correlate with each
    other, hence ``distinct``; sparse units of *any* directions follow fewer predictors than dense
    ones, so put a random dictionary of the same sparsity beside a trained one before calling its
    gain monosemanticity (on the shipped JapaneseVowels model the random one gains more); the window
    is what the position was *embedded* from, while attention has mixed in the rest; seeds
    are of the split and share their series, so intervals over them do not cover other data or
    other trainings (give several dictionaries for these).

    Args:
        model: the model.
        data: series; at least 8.
        hook: hook point of the neurons, a full name or a short one with a single place; None takes
            the one that ``sae`` reads.
        sae: a dictionary, or several by name (other seeds, a random one as control); None for
            neurons alone.
        predictors: further ones by name: functions from windows [series, channel, sample] and
            observed [series, sample] (bool) to one number per series. Where the model takes each
            channel by itself they are called per channel.
        standard: level, slope, variance, power in three frequency bands (per channel and over
            channels), channel and position.
        level: of the false discovery rate, on each half.
        least_r: the least |r| that counts, on both halves; 0 counts all that is confirmed.
        near_copy: predictors correlated by at least this with a stronger one of the same unit do
            not count as distinct.
        seeds: of the splits.
        spans: (first, one past last) sample of every position, for front ends of your own.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Pairs with correlations, counts per unit, the gain of latents over neurons; frame and
        figure.

    Raises:
        ArgumentError: too few series, no place in time, or another option that is not possible.

    Source: Pearson 1895; Liang and Zeger 1986 (clusters); Benjamini and Hochberg 1995.

    Example:
        >>> from tstlens import HookedTST, load_dataset, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> data = load_dataset("JapaneseVowels", split="test")
        >>> found = probing.units(
        ...     model, data, "blocks.1.hook_mlp_out", seeds=(0,), progress=False)
        >>> int(found.summary().loc["neurons", "units"])
        128
    """
    dictionaries = _dictionaries(sae)
    if len(data) < FEWEST:
        raise ArgumentError(f"expected at least {FEWEST} series to split, got {len(data)}")
    if not len(seeds) or len(set(seeds)) != len(seeds):
        raise ArgumentError(f"expected one or more different seeds, got {list(seeds)}")
    if hook is None:
        if not dictionaries:
            raise ArgumentError("give hook=, sae=, or both")
        hook = str(next(iter(dictionaries.values())).cfg.metadata.hook_name)
    by_name = activations(model, data, hook, batch_size=batch_size)
    if len(by_name) > 1:
        raise ArgumentError(f"expected one hook point, got {hook!r}: {list(by_name)}")
    neurons = next(iter(by_name.values()))
    spans = _spans(neurons, data, spans)
    given = predictors_of(data, spans, neurons.values.shape[1] > 1, predictors, standard)
    of_kind = {NEURONS: neurons}
    for name, dictionary in dictionaries.items():
        of_kind[name] = latents(model, dictionary, data, batch_size=batch_size)
        if of_kind[name].observed.shape != neurons.observed.shape:
            raise ArgumentError(
                f"expected latents at the positions of {neurons.hook}, got those of "
                f"{of_kind[name].hook}"
            )
    weight = neurons.observed.reshape(len(data), -1).astype(float)
    kinds = {}
    bar = tqdm(total=len(of_kind) * len(seeds), desc="units", disable=not progress)
    with bar:
        for name, found in of_kind.items():
            values = found.values.reshape(*weight.shape, -1)
            parts = []
            for seed in seeds:
                parts.append(
                    _one_split(values, given.values, weight, seed, (level, least_r), near_copy)
                )
                bar.update()
            kinds[name] = Found(*(np.stack(part) for part in zip(*parts, strict=True)))
    return Units(
        kinds,
        given.names,
        neurons.hook,
        tuple(int(seed) for seed in seeds),
        level,
        least_r,
        {
            "model": model.cfg.model_name,
            "n_series": len(data),
            "near_copy": near_copy,
            "data": data.name,
            "split": data.split,
        },
    )


def _dictionaries(sae: Any) -> dict[str, Any]:
    if sae is None:
        return {}
    found = dict(sae) if isinstance(sae, Mapping) else {"latents": sae}
    if NEURONS in found:
        raise ArgumentError(f"{NEURONS!r} names the units of the hook point; rename the dictionary")
    return found


def _spans(found: Activations, data: TimeSeriesData, spans: Spans | None) -> Spans:
    n_pos = found.values.shape[2]
    if spans is None:
        if found.spans is None:
            raise ArgumentError(
                f"the positions of {found.hook} have no known place in time; give spans=, the "
                "(first, one past last) sample of every position"
            )
        return found.spans
    if len(spans) != n_pos or any(not 0 <= a < b <= data.n_time for a, b in spans):
        raise ArgumentError(
            f"expected spans of {n_pos} positions within 0..{data.n_time}, got {list(spans)[:3]}"
        )
    return spans


def _one_split(
    values: Float[np.ndarray, "series slot unit"],
    predictors: Float[np.ndarray, "series slot predictor"],
    weight: Float[np.ndarray, "series slot"],
    seed: int,
    limits: tuple[float, float],
    near_copy: float,
) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(values))
    halves = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    r, q, r_heldout, confirmed = confirmed_pairs(values, predictors, weight, halves, limits)
    shown = predictors[halves[0]]
    alike, _ = clustered_correlation(shown, shown, weight[halves[0]])
    # The same windows given to other series: their observed positions differ where data are padded.
    circle = np.empty(len(order), dtype=np.int64)
    for half in halves:
        shuffled = generator.permutation(half)
        circle[shuffled] = np.roll(shuffled, 1)
    both = weight * weight[circle]
    *_, by_chance = confirmed_pairs(values, predictors[circle], both, halves, limits)
    return (
        r,
        q,
        r_heldout,
        confirmed,
        distinct(confirmed, r, alike, near_copy),
        distinct(by_chance, r, alike, near_copy),
        np.asarray(np.isfinite(r).any(1) & np.isfinite(r_heldout).any(1)),
    )


def confirmed_pairs(
    values: Float[np.ndarray, "series slot unit"],
    predictors: Float[np.ndarray, "series slot predictor"],
    weight: Float[np.ndarray, "series slot"],
    halves: tuple[Int[np.ndarray, " one"], Int[np.ndarray, " other"]],
    limits: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """r and q on one half, r on the other, and which pairs were found and confirmed."""
    level, least_r = limits
    (r, p), (r_heldout, p_heldout) = (
        _correlations(values[half], predictors[half], weight[half]) for half in halves
    )
    q = adjusted(p)
    found = (np.nan_to_num(q, nan=1.0) <= level) & (np.nan_to_num(np.abs(r)) >= least_r)
    same = np.sign(np.nan_to_num(r)) == np.sign(np.nan_to_num(r_heldout))
    one_sided = np.where(same, p_heldout / 2, 1 - p_heldout / 2)
    again = adjusted(np.where(found, one_sided, np.nan))
    confirmed = found & same & (np.nan_to_num(again, nan=1.0) <= level)
    return r, q, r_heldout, confirmed & (np.nan_to_num(np.abs(r_heldout)) >= least_r)


def _correlations(
    values: np.ndarray, predictors: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for start in range(0, values.shape[2], CHUNK):
        part = values[:, :, start : start + CHUNK].astype(np.float64)
        parts.append(clustered_correlation(part, predictors, weight))
    r, p = (np.concatenate(part) for part in zip(*parts, strict=True))
    return r, p


def distinct(
    confirmed: Bool[np.ndarray, "unit predictor"],
    r: Float[np.ndarray, "unit predictor"],
    alike: Float[np.ndarray, "predictor predictor"],
    near_copy: float,
) -> Int[np.ndarray, " unit"]:
    """How many confirmed predictors of every unit are no near-copies of a stronger one."""
    size = np.nan_to_num(np.abs(alike)) >= near_copy
    counts = np.zeros(len(confirmed), dtype=np.int64)
    for unit, row in enumerate(confirmed):
        left = np.flatnonzero(row)
        left = left[np.argsort(-np.abs(r[unit, left]), kind="stable")]
        while len(left):
            counts[unit] += 1
            left = left[1:][~size[left[0], left[1:]]]
    return counts
