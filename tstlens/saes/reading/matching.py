"""Which latents of two dictionaries are the same: across seeds, sizes and layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from tstlens.arguments import Count, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.results import Result
from tstlens.saes.reading.activity import Activity, activity_of, directions
from tstlens.saes.reading.result import Features
from tstlens.stats import matched

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class DictionaryMatch(Result):
    """One-to-one pairs of latents of two dictionaries, most similar first.

    Args:
        latent_a: [match] of the first dictionary.
        latent_b: [match] its partner in the second.
        similarity: [match] of the two.
        best_a: [latent] the largest similarity of every latent of the first with *any* latent of
            the second (several may choose the same); NaN for latents that are left out.
        chance: [match] similarities of the same matching against a control, largest first.
        by: ``"decoder"`` (cosine of directions) or ``"activations"`` (Pearson over positions).
        control: what the control was.
    """

    latent_a: Int[np.ndarray, " match"]
    latent_b: Int[np.ndarray, " match"]
    similarity: Float[np.ndarray, " match"]
    best_a: Float[np.ndarray, " latent"]
    chance: Float[np.ndarray, " match"]
    by: str
    control: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair: latent_a, latent_b, similarity, and the control's at this rank."""
        import pandas as pd

        return pd.DataFrame(
            {
                "latent_a": self.latent_a,
                "latent_b": self.latent_b,
                "similarity": self.similarity,
                "chance": self.chance,
            }
        )

    def share(self, above: float = 0.7) -> float:
        """Share of the pairs whose similarity is above a threshold."""
        return float((self.similarity > above).mean())

    def __repr__(self) -> str:
        return (
            f"DictionaryMatch({len(self.similarity)} pairs by {self.by}: mean "
            f"{self.similarity.mean():.3f}, {self.share():.0%} above 0.7; "
            f"{self.control}: mean {self.chance.mean():.3f})"
        )


@checked
def compare(
    sae_a: Any,
    sae_b: Any,
    *,
    model: HookedTST | None = None,
    data: TimeSeriesData | None = None,
    by: str | None = None,
    seed: Seed = 0,
    batch_size: Count = 128,
) -> DictionaryMatch:
    """Match the latents of two dictionaries one to one.

    By ``"decoder"``: cosine of the directions, for dictionaries of the same hook point. By
    ``"activations"``: Pearson correlation over the observed positions of ``data``, also across
    layers and models of one kind; latents that are never active are left out. The pairs maximise
    the summed similarity (Hungarian). The control repeats the matching with random directions of
    the same width, or with the series of the second dictionary in another order: the best of many
    random candidates is never 0, so judge by the distance to it.

    What can mislead: one latent of a small dictionary may be several of a large one (splitting):
    ``best_a`` then stays high while one-to-one pairs fall; and activations correlate across layers
    for any two latents that follow the position in the series.

    Args:
        sae_a: an SAE, a codebook, or a :class:`Features`.
        sae_b: another.
        model: to get activations from, where SAEs are given.
        data: the series for them.
        by: "decoder" or "activations"; where None, activations if there are any, else decoder.
        seed: of the control.
        batch_size: series per forward pass.

    Returns:
        The pairs, most similar first.

    Raises:
        ArgumentError: directions of different width, activations over different positions, or
            activations asked for without model and data.

    Source: Kuhn 1955 (Hungarian method); Sharkey et al. 2022 (mean max cosine similarity).

    Example:
        >>> from tstlens import saes
        >>> saes.compare(sae, other).to_dataframe().head()  # doctest: +SKIP
    """
    if by is None:
        have = isinstance(sae_a, Features) and isinstance(sae_b, Features)
        by = "activations" if have or (model is not None and data is not None) else "decoder"
    if by not in ("decoder", "activations"):
        raise ArgumentError(f"expected by='decoder' or 'activations', got {by!r}")
    generator = np.random.default_rng(seed)
    if by == "decoder":
        a, b = _unit(_directions(sae_a)), _unit(_directions(sae_b))
        if a.shape[1] != b.shape[1]:
            raise ArgumentError(
                f"expected directions of one width, got {a.shape[1]} and {b.shape[1]}; compare "
                "dictionaries of different places by activations: by='activations' with model "
                "and data"
            )
        similarity = a @ b.T
        chance = a @ _unit(generator.standard_normal(b.shape)).T
        control, kept_a, kept_b = "random directions", np.arange(len(a)), np.arange(len(b))
    else:
        first = _activity(sae_a, model, data, batch_size)
        second = _activity(sae_b, model, data, batch_size)
        kept_a, kept_b = (np.flatnonzero(one.density > 0) for one in (first, second))
        if not len(kept_a) or not len(kept_b):
            raise ArgumentError("expected dictionaries with active latents, got one without any")
        similarity = correlation(first, second)[np.ix_(kept_a, kept_b)]
        order = generator.permutation(second.n_series)
        chance = correlation(first, reordered(second, order))[np.ix_(kept_a, kept_b)]
        control = "series in another order"
    rows, columns = matched(similarity)
    best = np.full(int(kept_a.max()) + 1 if by == "decoder" else first.n_latents, np.nan)
    best[kept_a] = similarity.max(1)
    return DictionaryMatch(
        latent_a=kept_a[rows],
        latent_b=kept_b[columns],
        similarity=similarity[rows, columns],
        best_a=best,
        chance=chance[matched(chance)],
        by=by,
        control=control,
    )


def correlation(first: Activity, second: Activity) -> Float[np.ndarray, "latent_a latent_b"]:
    """Pearson correlation of every pair of latents over observed positions; 0 where constant.

    Raises:
        ArgumentError: activations over different positions.
    """
    same = first.observed.shape == second.observed.shape and bool(
        (first.observed == second.observed).all()
    )
    if not same:
        raise ArgumentError(
            "expected activations at the same positions of the same series, got "
            f"{first!r} and {second!r}"
        )
    n = first.n_observed
    a, b = first.values.astype(float), second.values.astype(float)
    mean_a, mean_b = (np.asarray(x.sum(0)).ravel() / n for x in (a, b))
    covariance = (a.T @ b).toarray() / n - np.outer(mean_a, mean_b)
    spread_a = np.sqrt(np.maximum(_square(a) / n - mean_a**2, 0))
    spread_b = np.sqrt(np.maximum(_square(b) / n - mean_b**2, 0))
    scale = np.outer(spread_a, spread_b)
    return np.where(scale > 0, covariance / np.where(scale > 0, scale, 1), 0.0)


def reordered(activity: Activity, order: Int[np.ndarray, " series"]) -> Activity:
    """The same activations with the series in another order, as a control.

    The mask stays as it was, so that both sides of a comparison have one.
    """
    per_series = activity.n_channels * activity.n_pos
    slots = (order[:, None] * per_series + np.arange(per_series)).ravel()
    shuffled = activity.values.tocsr()[slots].tocsc()
    return Activity(
        shuffled, activity.observed, activity.n_series, activity.n_channels, activity.n_pos
    )


def _square(values: Any) -> np.ndarray:
    return np.asarray(values.multiply(values).sum(0)).ravel()


def _directions(given: Any) -> np.ndarray:
    if isinstance(given, Features):
        return given.directions.astype(float)
    return directions(given).detach().double().cpu().numpy()


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def _activity(
    given: Any, model: HookedTST | None, data: TimeSeriesData | None, batch_size: int
) -> Activity:
    if isinstance(given, Features):
        return given.activity
    if model is None or data is None:
        raise ArgumentError("by='activations' needs model= and data=, or two Features")
    return activity_of(model, given, data, batch_size=batch_size)
