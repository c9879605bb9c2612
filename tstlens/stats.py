"""Statistics over series: intervals, sign flips, false discoveries, correlations, rankings.

Rows that share a series are not independent, so whole *clusters* of rows are drawn and flipped.
What is not finite at one site is NaN at that site, in effect, interval, p and q, and changes no
number at any other; q-values are taken over the sites that have a p.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tstlens.errors import ArgumentError

FEWEST = 5  # an interval from fewer independent series says nothing
FURTHEST = 3.0  # half widths of the t interval; by the simulation in docs/truth.md
_LIMITS = {  # of a metric, by its unit
    "probability": (0.0, 1.0),
    "nats": (-np.inf, 0.0),
    "squared units": (0.0, np.inf),
    "units": (0.0, np.inf),
}
_CHUNK = 4_000_000  # numbers held at once while resampling
_ROUNDING = 1e-9  # of the largest entry; a spread below it is rounding
SIGN_FLOOR = 0.01  # effects below this share of the largest have no sign worth comparing


def check_intervals(level: float, n_boot: int, name: str = "n_boot") -> None:
    """Raise :class:`ArgumentError` unless an interval can be made this way."""
    if not 0 < level < 1:
        raise ArgumentError(f"expected a level between 0 and 1, 0.95 say, got {level}")
    if n_boot < 100:
        raise ArgumentError(f"expected {name} of at least 100, got {n_boot}")


def by_cluster(
    values: Float[np.ndarray, "row site"], clusters: Sequence[Hashable]
) -> tuple[Float[np.ndarray, "cluster site"], Float[np.ndarray, " cluster"]]:
    """Sums of values and counts of rows in every cluster, in order of first appearance."""
    number = {name: at for at, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[name] for name in clusters])
    sums = np.zeros((len(number), values.shape[1]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(float)


def mean_interval(
    sums: Float[np.ndarray, "cluster site"],
    counts: Float[np.ndarray, " cluster"] | None = None,
    *,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int | np.random.Generator = 0,
    limits: tuple[Any, Any] = (-np.inf, np.inf),
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    """Ends of the interval of the mean, or of another ratio of sums, drawing whole clusters.

    The rule, end by end: where the bootstrap-t says it ends, but no nearer to the mean than the
    end of the plain t interval and no further than three of its half widths. A resample without
    spread has a t that is infinite, by the sign of its numerator. The t interval is the floor
    because bootstrap-t is too narrow where a few heavy effects miss in most resamples; the
    ceiling holds because resamples of near-constant samples have next to no spread to divide by,
    which drives the ends to any distance. Where no cluster differs from 0, there are too few
    that do: no interval (NaN), as from fewer than 5 clusters. Where all clusters agree on another
    number, both ends are that number, as for plain t.

    Simulated at 95 % for 5 to 50 clusters, of which 5 to 100 % have an effect that is constant,
    normal, t with 3 degrees of freedom or lognormal: 89 to 100 % of intervals cover the mean (90 %
    or more from a share of 25 % on), and never fewer than of plain t on the same samples (76 to
    100 %). The table is in docs/truth.md. What can mislead: with few clusters that have an effect,
    the sample knows neither how many there are nor how large they may be, and no interval from it
    can; effects of one size alone are covered nearly always, since their count is a whole number.

    Args:
        sums: sums over the rows of each cluster.
        counts: what the sums are divided by: rows of each cluster, or another sum such as the gap
            between two runs; None for one row per cluster.
        level: coverage.
        n_boot: resamples.
        seed: of the resamples, or a generator.
        limits: least and greatest mean that is possible, for all sites or [site]; ends are cut
            there, or at the mean where it lies outside.

    Source: Efron and Tibshirani 1993, chapter 12 (bootstrap-t); Johnson 1978 and Hall 1988 on why
        plain t misses skewed means; Cochran 1977, chapter 6 (errors of ratios).
    """
    n, n_sites = sums.shape
    counts = np.ones(n) if counts is None else counts
    low, high = np.full(n_sites, np.nan), np.full(n_sites, np.nan)
    known = np.flatnonzero(np.isfinite(sums).all(0))
    if n < FEWEST or not np.isfinite(counts).all() or counts.sum() == 0 or not len(known):
        return low, high
    from scipy.stats import t

    sums = sums[:, known]
    mean, error = _with_error(sums, counts)
    half = t.ppf((1 + level) / 2, n - 1) * error
    first, last = bootstrap_t(sums, counts, level, n_boot, np.random.default_rng(seed))
    ends = [
        np.clip(first, mean - FURTHEST * half, mean - half),
        np.clip(last, mean + half, mean + FURTHEST * half),
    ]
    lowest, highest = (np.broadcast_to(limit, n_sites)[known] for limit in limits)
    ends = np.clip(ends, np.minimum(lowest, mean), np.maximum(highest, mean))
    nothing = ~sums.any(0)
    low[known], high[known] = (np.where(nothing, np.nan, end) for end in ends)
    return low, high


def bootstrap_t(
    sums: Float[np.ndarray, "cluster site"],
    counts: Float[np.ndarray, " cluster"],
    level: float,
    n_boot: int,
    generator: np.random.Generator,
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    """Ends of the bootstrap-t interval alone; infinite where too many resamples have no spread.

    Args:
        sums: finite, as for :func:`mean_interval`, which says how far these ends can be trusted.
        counts: likewise.
        level: coverage.
        n_boot: resamples.
        generator: of the draws.
    """
    n = len(sums)
    mean, error = _with_error(sums, counts)
    size = np.where(error > 0, error, 1.0)
    rest = (sums - mean * counts[:, None]) / size
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(float)  # [boot, n]
    drawn = drawn[(drawn > 0).sum(1) > 1]  # one cluster over and over has no spread by itself
    total = (drawn @ counts)[:, None]
    square_of_counts = (drawn @ counts**2)[:, None]
    alike = not np.ptp(counts) > 0
    outside = int((1 - level) / 2 * (len(drawn) - 1))
    places = outside, len(drawn) - 1 - outside
    low, high = np.empty(sums.shape[1]), np.empty(sums.shape[1])
    per_chunk = max(1, _CHUNK // len(drawn))
    for start in range(0, sums.shape[1], per_chunk):
        at = slice(start, start + per_chunk)
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = drawn @ rest[:, at] / total
            # Sum over clusters of (rest - shift * count)^2: no [boot, cluster, site] is made.
            square = drawn @ rest[:, at] ** 2
            if alike:
                square -= shift**2 * square_of_counts
            else:
                square += shift**2 * square_of_counts
                square -= 2 * shift * (drawn @ (rest[:, at] * counts[:, None]))
            spread = np.sqrt(np.maximum(square, 0.0) * n / (n - 1)) / np.abs(total)
            shift[np.abs(shift) < _ROUNDING] = 0.0
            spread[spread < 1e-6] = 0.0  # rounding, in units of the standard error
            ts = shift / spread
            ts[np.isnan(ts)] = 0.0
        ts.partition(places, axis=0)
        with np.errstate(invalid="ignore"):
            low[at] = mean[at] - np.where(error[at] > 0, ts[places[1]] * error[at], 0.0)
            high[at] = mean[at] - np.where(error[at] > 0, ts[places[0]] * error[at], 0.0)
    return low, high


def _with_error(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ratio of sums and its cluster-robust standard error, 0 where it is rounding."""
    n = len(sums)
    mean = sums.sum(0) / counts.sum()
    rest = np.abs(sums - mean * counts[:, None])
    largest = rest.max(0)
    constant = largest <= _ROUNDING * np.abs(sums).max(0)
    scale = np.where(constant, 1.0, largest)  # squares of huge and of tiny effects stay finite
    error = scale * np.sqrt(((rest / scale) ** 2).sum(0) * n / (n - 1)) / abs(counts.sum())
    return mean, np.where(constant, 0.0, error)


def no_interval(n_clusters: int) -> str:
    """Why :func:`mean_interval` gave none, in words."""
    kind = "" if n_clusters < FEWEST else "non-zero "
    return f"too few {kind}pairs for an interval"


def limits_of(
    unit: str,
    *seen: Float[np.ndarray, ...],
    known: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[float, float]:
    """Least and greatest value that a metric in this unit can have; infinite where there is none.

    Args:
        unit: of the metric, which says it where ``known`` does not.
        seen: values of it. Where one lies outside (an estimate, say) the range is not kept.
        known: the range that the metric itself states.
    """
    low, high = _LIMITS.get(unit, (-np.inf, np.inf)) if known == (-np.inf, np.inf) else known
    inside = all(((part >= low - 1e-6) & (part <= high + 1e-6)).all() for part in seen)
    return (low, high) if inside else (-np.inf, np.inf)


def percentile_interval(
    values: Float[np.ndarray, "row site"],
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int | np.random.Generator = 0,
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    """Ends of the percentile bootstrap interval of the mean: never beyond the rows, too narrow.

    For tables over a few seeds, where what was measured bounds what is said, and as a row to
    compare :func:`mean_interval` with. NaN where a value is, and for a single row.

    Source: Efron 1979.
    """
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn @ values / n, [tail, 1 - tail], axis=0)
    return low, high


def half_width(values: Float[np.ndarray, "row site"]) -> Float[np.ndarray, " site"]:
    """Half of the normal 95 % interval of the mean over rows: too narrow for few of them.

    For numbers that add up exactly and are only looked at; :func:`mean_interval` is what to cite.
    """
    return np.asarray(1.96 * values.std(0, ddof=1) / np.sqrt(len(values)))


def t_interval(
    values: Float[np.ndarray, "row site"], level: float = 0.95
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    """Ends of the plain t interval of the mean; NaN for fewer than two rows.

    For a few seeds, and for what has been measured this way before: of skewed or sparse effects it
    covers less often than :func:`mean_interval`, see there.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    mean = values.mean(0)
    half = t.ppf((1 + level) / 2, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
    return mean - half, mean + half


def strongest_share(
    sums: Float[np.ndarray, "cluster site"], n_boot: int, seed: int
) -> Float[np.ndarray, " site"]:
    """Share of resamples in which a site's mean is the largest in size; 0 where it is not finite.

    Args:
        sums: over the rows of each cluster.
        n_boot: resamples.
        seed: of the resamples.
    """
    n, n_sites = sums.shape
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    known = np.isfinite(sums).all(0)
    sums = np.where(known, sums, 0.0)
    wins = np.zeros(n_sites)
    per_chunk = max(1, _CHUNK // n_sites)
    for start in range(0, n_boot, per_chunk):
        size = np.where(known, np.abs(drawn[start : start + per_chunk] @ sums), -1.0)
        wins += np.bincount(size.argmax(1), minlength=n_sites)
    return np.where(known, wins / n_boot, 0.0)


def flip_p_values(
    sums: Float[np.ndarray, "cluster site"], n_flips: int, generator: np.random.Generator
) -> Float[np.ndarray, " site"]:
    """Two-sided p-values of the mean, flipping the signs of whole clusters.

    Exact where there are at most ``n_flips`` ways to flip; otherwise random flips, the one observed
    counted among them (so p is never 0). A site where nothing ever happens has p = 1, one that is
    not finite has none (NaN).

    Args:
        sums: sums of effects over the rows of each cluster.
        n_flips: how many flips.
        generator: of the flips.

    Source: Winkler et al. 2014; Phipson and Smyth 2010 (p is never 0).
    """
    n = len(sums)
    known = np.isfinite(sums).all(0)
    sums = np.where(known, sums, 0.0)
    exact = n < 60 and 2**n <= n_flips
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1.0 - 2.0 * generator.integers(0, 2, (n_flips, n))
    observed = np.abs(sums.sum(0))
    # Flips that tie with what was observed count, in spite of rounding.
    bar = observed * (1 - 1e-9) - 1e-12 * np.abs(sums).sum(0)
    as_large = np.zeros(sums.shape[1])
    per_chunk = max(1, _CHUNK // max(1, sums.shape[1]))
    for start in range(0, len(signs), per_chunk):
        as_large += (np.abs(signs[start : start + per_chunk] @ sums) >= bar).sum(0)
    p = as_large / len(signs) if exact else (as_large + 1) / (len(signs) + 1)
    return np.where(known, p, np.nan)


def adjusted(p: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """q-values by Benjamini and Hochberg over all entries; NaN stays NaN and does not count.

    Source: Benjamini and Hochberg 1995.
    """
    from scipy.stats import false_discovery_control

    q = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = false_discovery_control(p[known], method="bh")
    return q


def mean_known(values: Float[np.ndarray, " entry"]) -> float:
    """Mean of what is finite; NaN of nothing."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def rank_correlation(
    first: Float[np.ndarray, " site"], second: Float[np.ndarray, " site"]
) -> float:
    """Spearman's correlation over the sites that are finite in both; NaN where one is constant."""
    from scipy.stats import rankdata

    return correlation(*(rankdata(part) for part in _both_known(first, second)))


def correlation(first: Float[np.ndarray, " site"], second: Float[np.ndarray, " site"]) -> float:
    """Pearson's correlation over the sites that are finite in both; NaN where one is constant."""
    first, second = _both_known(first, second)
    if len(first) < 2 or not np.ptp(first) > 0 or not np.ptp(second) > 0:
        return float("nan")
    return float(np.clip(np.corrcoef(first / np.ptp(first), second / np.ptp(second))[0, 1], -1, 1))


def matched(
    similarity: Float[np.ndarray, "a b"],
) -> tuple[Int[np.ndarray, " match"], Int[np.ndarray, " match"]]:
    """Rows and columns of the one-to-one pairs of the largest summed similarity, largest first.

    Source: Kuhn 1955 (Hungarian method).

    Example:
        >>> matched(np.array([[0.9, 0.8], [0.8, 0.1]]))  # not the 0.9, which leaves 0.1
        (array([0, 1]), array([1, 0]))
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity, maximize=True)
    order = np.argsort(-similarity[rows, columns], kind="stable")
    return rows[order], columns[order]


def top_overlap(
    first: Float[np.ndarray, " site"], second: Float[np.ndarray, " site"], k: int
) -> float:
    """Share of the k largest entries (in size) of one that are among the k largest of the other.

    Over the sites that are finite in both. NaN unless there are more than k of them: the top of
    all is all, however they are ordered.
    """
    first, second = _both_known(first, second)
    if k >= len(first):
        return float("nan")
    best, found = (set(np.argsort(-np.abs(x), kind="stable")[:k]) for x in (first, second))
    return len(best & found) / k


def sign_agreement(truth: Float[np.ndarray, " site"], guess: Float[np.ndarray, " site"]) -> float:
    """Share of sites with the same sign, among those of at least 1 % of the largest true effect."""
    truth, guess = _both_known(truth, guess)
    size = np.abs(truth)
    if not len(size) or not size.max() > 0:
        return float("nan")
    return float((np.sign(truth) == np.sign(guess))[size >= SIGN_FLOOR * size.max()].mean())


def _both_known(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(first) & np.isfinite(second)
    return first[known], second[known]


def clustered_correlation(
    units: Float[np.ndarray, "series slot unit"],
    predictors: Float[np.ndarray, "series slot predictor"],
    weight: Float[np.ndarray, "series slot"],
) -> tuple[Float[np.ndarray, "unit predictor"], Float[np.ndarray, "unit predictor"]]:
    """Pearson r over the observed slots, and p with *series* as the unit.

    Positions of one series are alike, so counting them as independent finds something everywhere.
    The covariance is a sum over series, and a t test asks whether these per-series sums are 0 on
    average (cluster-robust; as many degrees of freedom as series less one).

    Args:
        units: [series, slot, unit]; slots are positions (of every channel).
        predictors: [series, slot, predictor].
        weight: [series, slot], 1 where observed, else 0.

    Returns:
        r and two-sided p, [unit, predictor]; NaN where either is constant.

    Source: Pearson 1895; Liang and Zeger 1986 (clusters).
    """
    from scipy.stats import t

    count = max(weight.sum(), 1)
    standard, constant = _standard(predictors, weight, count)
    scaled, dead = _standard(units, weight, count)
    sums = np.matmul(scaled.transpose(0, 2, 1), standard)  # [series, unit, predictor]
    n_series = len(sums)
    freedom = max(n_series - 1, 1)
    noise = sums.std(0) * np.sqrt(n_series / freedom)  # of one series' sum
    statistic = sums.mean(0) * np.sqrt(n_series) / np.where(noise > 0, noise, np.inf)
    valid = ~dead[:, None] & ~constant[None]
    r = np.where(valid, np.clip(sums.sum(0) / count, -1, 1), np.nan)
    return r, np.where(valid, 2 * t.sf(np.abs(statistic), freedom), np.nan)


def _standard(
    values: Float[np.ndarray, "series slot column"],
    weight: Float[np.ndarray, "series slot"],
    count: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of mean 0 and spread 1 over the observed slots, and which of them are constant."""
    mean = (values * weight[:, :, None]).sum((0, 1)) / count
    standard = (values - mean) * weight[:, :, None]
    spread = np.sqrt((standard**2).sum((0, 1)) / count)
    # Rounding leaves a constant column a spread of about (eps * mean), not 0.
    constant = spread <= 1e-9 * np.maximum(np.abs(mean), 1e-30)
    return standard / np.where(constant, np.inf, spread), constant
