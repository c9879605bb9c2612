"""Part (e) of the suite: do 95 % intervals cover? Simulated effects whose mean is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import t
from tqdm.auto import tqdm

from tstlens.data.planted import Score
from tstlens.stats import mean_interval, percentile_interval

LEVEL = 0.95
TAILS = ("constant", "normal", "t3", "lognormal")
_MEANS = {"lognormal": float(np.exp(0.5))}  # of an effect that is there; 1 for the others


def coverage_scores(
    seeds: Sequence[int],
    *,
    sizes: Sequence[int] = (5, 8, 12, 24, 50),
    shares: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 1.0),
    tails: Sequence[str] = TAILS,
    repeats: int = 400,
    n_boot: int = 1000,
    progress: bool = True,
) -> tuple[list[Score], dict[str, float]]:
    """How often nominal 95 % intervals of a mean effect cover it.

    Args:
        seeds: of samples and resamples.
        sizes: independent series in a sample.
        shares: of series that have an effect at all; it is 0 in the others.
        tails: of the effects there are: all 1, normal around 1, t with 3 degrees of freedom
            around 1, lognormal.
        repeats: samples of every seed.
        n_boot: resamples.
        progress: show a bar.
    """
    scores: list[Score] = []
    cells = [(tail, share, n) for tail in tails for share in shares for n in sizes]
    for seed in seeds:
        for tail, share, n in tqdm(cells, desc=f"coverage {seed}", disable=not progress):
            place = [seed, TAILS.index(tail), round(1e6 * share), n]
            generator = np.random.default_rng(place)
            effects = drawn(tail, share, (n, repeats), generator)
            truth = share * _MEANS.get(tail, 1.0)
            half = t.ppf((1 + LEVEL) / 2, n - 1) * effects.std(0, ddof=1) / n**0.5
            mean = effects.mean(0)
            own = mean_interval(effects, level=LEVEL, n_boot=n_boot, seed=generator)
            nowhere = np.where(np.isfinite(own[0]), 0.0, np.nan)
            found = {
                "tstlens": own,
                "plain t, the same samples": (mean - half + nowhere, mean + half),
                "plain t": (mean - half, mean + half),
                "percentile bootstrap": percentile_interval(effects, LEVEL, n_boot, generator),
            }
            task, measure = f"{tail}, {100 * share:g} % active", f"{n} series"
            for method, (low, high) in found.items():
                given = np.isfinite(low)
                covered = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
                if given.any():
                    kind = "method" if method == "tstlens" else "trivial"
                    value = float(covered[given].mean())
                    scores.append(Score(task, method, measure, seed, value, kind))
            without = float(np.isnan(nowhere).mean())
            scores.append(Score(task, "samples without one", measure, seed, without, "answer"))
    return scores, {}


def drawn(
    tail: str, share: float, shape: tuple[int, int], generator: np.random.Generator
) -> Float[np.ndarray, "series sample"]:
    """Effects of which a share is there and the others are 0."""
    there = generator.random(shape) < share
    effects = {
        "constant": lambda: np.ones(shape),
        "normal": lambda: 1 + generator.normal(size=shape),
        "t3": lambda: 1 + generator.standard_t(3, size=shape),
        "lognormal": lambda: generator.lognormal(size=shape),
    }[tail]()
    return np.where(there, effects, 0.0)
