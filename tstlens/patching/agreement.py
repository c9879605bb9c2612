"""How well an estimate of effects agrees with the exact ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.patching.result import SweepResult
from tstlens.results import Result
from tstlens.stats import (
    correlation,
    mean_known,
    rank_correlation,
    sign_agreement,
    top_overlap,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Agreement(Result):
    """Agreement of two maps of effects, pair by pair.

    Args:
        pearson: [pair], correlation of the effects; NaN where one map is constant.
        spearman: [pair], correlation of their ranks (signed effects, not their sizes).
        top_k_overlap: [pair], share of the exact map's k largest effects (in size) that are among
            the estimate's k largest; NaN where there are no more than k sites.
        sign_agreement: [pair], share of sites with the same sign, among sites whose exact effect
            is at least 1 % of the pair's largest.
        k: how many sites count as the top.
        exact: [pair, site], the exact effects.
        approximate: [pair, site], the estimated ones.
        sites: what each site is, by axis.
        metric: name of the metric.
        unit: its unit.
        site: what was replaced.
        made: how both were made.
    """

    pearson: Float[np.ndarray, " pair"]
    spearman: Float[np.ndarray, " pair"]
    top_k_overlap: Float[np.ndarray, " pair"]
    sign_agreement: Float[np.ndarray, " pair"]
    k: int
    exact: Float[Tensor, "pair site"]
    approximate: Float[Tensor, "pair site"]
    sites: tuple[dict[str, Any], ...]
    metric: str
    unit: str
    site: str
    made: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair: pearson, spearman, top_k_overlap, sign_agreement."""
        import pandas as pd

        return pd.DataFrame(
            {
                "pair": np.arange(len(self.pearson)),
                "pearson": self.pearson,
                "spearman": self.spearman,
                "top_k_overlap": self.top_k_overlap,
                "sign_agreement": self.sign_agreement,
            }
        )

    def effects(self) -> pd.DataFrame:
        """One row per pair and site: its axes, the exact and the approximate effect."""
        import pandas as pd

        n_pairs = len(self.exact)
        frame = pd.DataFrame(list(self.sites) * n_pairs)
        frame.insert(0, "pair", np.repeat(np.arange(n_pairs), len(self.sites)))
        frame["exact"] = self.exact.flatten().numpy()
        frame["approximate"] = self.approximate.flatten().numpy()
        return frame

    def __repr__(self) -> str:
        means = [
            f"{name} {mean_known(getattr(self, name)):.3f}"
            for name in ("pearson", "spearman", "top_k_overlap", "sign_agreement")
        ]
        return (
            f"Agreement({self.site}, {len(self.pearson)} pairs x {len(self.sites)} sites, "
            f"means: {', '.join(means)})"
        )


@checked
def agreement(exact: SweepResult, approximate: SweepResult, k: int = 5) -> Agreement:
    """How well one sweep's effects agree with another's, pair by pair.

    Answers "may I trust the cheap map?". What can mislead: a high correlation can rest on a few
    strong sites while all others are wrong, and a low one on noise among sites that do nothing,
    so look at the figure (a scatter) and at the top-k overlap too. A site whose effect is not
    finite in one of the two takes no part in that pair.

    Args:
        exact: a :func:`sweep` (or whatever is taken as the truth).
        approximate: an :func:`attribution` of the same pairs, site, axes and metric.
        k: how many of the largest effects count as the top; without more sites than that, there
            is no top-k overlap (NaN).

    Returns:
        Pearson, Spearman, top-k overlap and sign agreement per pair, with frame and figure.

    Raises:
        ArgumentError: the results are of other axes, sites or metrics, or k is below 1.

    Example:
        >>> import torch
        >>> from tstlens.patching import SweepResult
        >>> def result(values):
        ...     return SweepResult(torch.tensor([values]), ("pair", "layer"),
        ...         {"pair": (0,), "layer": (0, 1, 2)}, torch.zeros(1), torch.ones(1),
        ...         "logit", "logit", "attn_out")
        >>> both = agreement(result([0.1, 0.2, 0.6]), result([0.2, 0.1, 0.9]), k=1)
        >>> round(float(both.spearman[0]), 2), float(both.top_k_overlap[0])
        (0.5, 1.0)
    """
    for name in ("axes", "coords", "metric", "site"):
        first, second = getattr(exact, name), getattr(approximate, name)
        if first != second:
            raise ArgumentError(
                f"expected two results over the same {name}, got {first} and {second}; run both "
                "with the same site, axes, pairs and metric"
            )
    if k < 1:
        raise ArgumentError(f"expected k of at least 1, got {k}")
    axes = tuple(axis for axis in exact.axes if axis != "pair")
    grid = torch.cartesian_prod(*(torch.arange(len(exact.coords[axis])) for axis in axes))
    index = grid.view(-1, len(axes)).tolist() if axes else [[]]
    sites = tuple(
        {axis: exact.coords[axis][at] for axis, at in zip(axes, entry, strict=True)}
        for entry in index
    )
    truth, guess = (
        result.effect().detach().double().cpu().reshape(-1, len(sites))
        for result in (exact, approximate)
    )
    rows = [
        (
            correlation(a, b),
            rank_correlation(a, b),
            top_overlap(a, b, min(k, len(sites))),
            sign_agreement(a, b),
        )
        for a, b in zip(truth.numpy(), guess.numpy(), strict=True)
    ]
    pearson, spearman, top, sign = np.array(rows, dtype=float).T
    return Agreement(
        pearson,
        spearman,
        top,
        sign,
        min(k, len(sites)),
        truth,
        guess,
        sites,
        exact.metric,
        exact.unit,
        exact.site,
        made={"exact": exact.made, "approximate": approximate.made},
    )
