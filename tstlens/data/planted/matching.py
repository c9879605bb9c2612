"""Scores of discrete codes against true states, and of activations against true features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.randomness import seeded
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FeatureScore", "StateScore", "score_features", "score_states"]


@dataclass(frozen=True)
class StateScore(Result):
    """How well codes tell states apart, beside shuffled codes.

    Args:
        nmi: normalised mutual information of codes and states (arithmetic mean of the entropies),
            0 to 1.
        purity: share of positions whose state is the one that their code stands for.
        shuffled_nmi: the same with the codes shuffled over positions, a mean over shuffles: with
            many codes and few positions it is far from 0.
        shuffled_purity: likewise.
        codes: [used] the codes that occur.
        stands_for: [used] the most frequent state of each, on the positions it was chosen on; -1
            where the code did not occur there.
        precision: [used] share of a code's positions that are in that state.
        recall: [used] share of that state's positions that have the code.
        support: [used] positions of each code.
        n: positions that count.
        made: how.
    """

    nmi: float
    purity: float
    shuffled_nmi: float
    shuffled_purity: float
    codes: Int[np.ndarray, " used"]
    stands_for: Int[np.ndarray, " used"]
    precision: Float[np.ndarray, " used"]
    recall: Float[np.ndarray, " used"]
    support: Int[np.ndarray, " used"]
    n: int
    made: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per code that occurs: code, state, precision, recall, support."""
        import pandas as pd

        return pd.DataFrame(
            {
                "code": self.codes,
                "state": self.stands_for,
                "precision": self.precision,
                "recall": self.recall,
                "support": self.support,
            }
        )

    def __repr__(self) -> str:
        return (
            f"StateScore(nmi={self.nmi:.3f} (shuffled {self.shuffled_nmi:.3f}), purity="
            f"{self.purity:.3f} (shuffled {self.shuffled_purity:.3f}), {len(self.codes)} codes, "
            f"{self.n} positions)"
        )


@checked
@seeded(0)
def score_states(
    ids: Int[Tensor, "*place"],
    states: Int[Tensor, "*place"],
    *,
    chosen_on: tuple[Tensor, Tensor] | None = None,
    observed: Bool[Tensor, "*place"] | None = None,
    n_shuffles: int = 10,
    seed: int = 0,
) -> StateScore:
    """Whether discrete codes (or clusters) are the states of the machine behind the series.

    What can mislead: purity rises with the number of codes and is 1 when every position has a
    code of its own; choose the codes' states on other series (``chosen_on``) and compare with
    the shuffled rows.

    Args:
        ids: ``[...]`` the code of every position.
        states: ``[...]`` the true states of the same positions.
        chosen_on: (ids, states) of the training series, on which the state of each code is
            chosen; None chooses and scores on the same positions.
        observed: ``[...]`` bool, False at padded positions, which do not count.
        n_shuffles: random assignments of the codes to positions.
        seed: of the shuffles.

    Returns:
        A StateScore.

    Raises:
        SeriesShapeError: shapes that differ.
        ArgumentError: nothing observed, or negative ids.

    Source: :func:`sklearn.metrics.normalized_mutual_info_score`; code precision as in
    arXiv 2310.17230.

    Example:
        >>> import torch
        >>> states = torch.tensor([[0, 1, 2, 0, 1, 2]])
        >>> score = score_states(states + 5, states)
        >>> score.nmi, score.purity
        (1.0, 1.0)
    """
    from sklearn.metrics import normalized_mutual_info_score

    if n_shuffles < 1:
        raise ArgumentError(f"n_shuffles: expected at least 1, got {n_shuffles}")
    code, state = _flat(ids, states, observed)
    pair = (code, state) if chosen_on is None else _flat(*chosen_on, None)
    n_states = int(max(state.max(), pair[1].max())) + 1
    n_codes = int(max(code.max(), pair[0].max())) + 1
    chosen = _counts(*pair, n_codes, n_states)
    stands_for = np.where(chosen.any(1), chosen.argmax(1), -1)
    scored = _counts(code, state, n_codes, n_states)
    used = np.flatnonzero(scored.sum(1))
    stands = stands_for[used]
    hits = np.where(stands < 0, 0, scored[used, stands])
    support = scored[used].sum(1)
    per_state = scored.sum(0)[stands]
    generator = np.random.default_rng(seed)
    nmi, purity = [], []
    for _ in range(n_shuffles):
        shuffled = generator.permutation(code)
        nmi.append(normalized_mutual_info_score(state, shuffled))
        # A state for each code is chosen anew, with the same freedom.
        mixed = generator.permutation(pair[0])
        choice = _counts(mixed, pair[1], n_codes, n_states).argmax(1)
        purity.append((choice[shuffled if chosen_on is not None else mixed] == state).mean())
    return StateScore(
        nmi=float(normalized_mutual_info_score(state, code)),
        purity=float(hits.sum() / len(code)),
        shuffled_nmi=float(np.mean(nmi)),
        shuffled_purity=float(np.mean(purity)),
        codes=used,
        stands_for=stands,
        precision=hits / support,
        recall=np.where(stands < 0, 0.0, hits / np.maximum(per_state, 1)),
        support=support,
        n=len(code),
        made={"chosen_on_other_series": chosen_on is not None, "n_shuffles": n_shuffles},
    )


def _flat(ids: Tensor, states: Tensor, observed: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    if ids.shape != states.shape or (observed is not None and observed.shape != ids.shape):
        seen = "" if observed is None else f" and observed {list(observed.shape)}"
        raise SeriesShapeError(
            f"expected ids and states of the same positions, got {list(ids.shape)} and "
            f"{list(states.shape)}{seen}; with k codes per position score one of the k at a time"
        )
    if observed is not None:
        ids, states = ids[observed], states[observed]
    if ids.numel() == 0:
        raise ArgumentError("ids: expected at least one observed position, got none")
    if int(ids.min()) < 0 or int(states.min()) < 0:
        raise ArgumentError("ids and states: expected indices of 0 or more, got a negative one")
    return ids.flatten().cpu().numpy(), states.flatten().cpu().numpy()


def _counts(code: np.ndarray, state: np.ndarray, n_codes: int, n_states: int) -> np.ndarray:
    flat = np.bincount(code.astype(np.int64) * n_states + state, minlength=n_codes * n_states)
    return flat.reshape(n_codes, n_states)


@dataclass(frozen=True)
class FeatureScore(Result):
    """How well activations match true features one to one, beside shuffled rows.

    Args:
        mcc: mean over features of the absolute Pearson correlation with the latent that each is
            matched with, 0 to 1; a feature without a latent counts 0.
        shuffled_mcc: the same with the rows of the activations shuffled, a mean over shuffles.
        correlation: [feature] with its latent, with its sign; 0 where there is none.
        latent: [feature] which one; -1 where there is none.
        n_latents: that could be matched.
        made: how.
    """

    mcc: float
    shuffled_mcc: float
    correlation: Float[np.ndarray, " feature"]
    latent: Int[np.ndarray, " feature"]
    n_latents: int
    made: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per feature: feature, latent, correlation."""
        import pandas as pd

        frame = pd.DataFrame({"latent": self.latent, "correlation": self.correlation})
        return frame.rename_axis("feature").reset_index()


@checked
def score_features(
    activations: Float[Tensor, "row latent"],
    truth: Float[Tensor, "row feature"],
    *,
    n_shuffles: int = 10,
    seed: int = 0,
) -> FeatureScore:
    """Whether single latents follow the features that were planted.

    The mean correlation coefficient: correlate, match one to one for the largest sum, take the
    mean. What can mislead: with many latents chance is well above 0 (look at
    ``shuffled_mcc``); a feature that is split over two latents is matched with one of them.

    Args:
        activations: ``[row, latent]``, one row per position.
        truth: ``[row, feature]``, how active each planted feature was there.
        n_shuffles: random orders of the rows.
        seed: of the shuffles.

    Returns:
        A FeatureScore; latents and features that never change correlate 0 with everything.

    Raises:
        SeriesShapeError: shapes that do not belong together.

    Source: Hyvarinen and Morioka 2016 (mean correlation coefficient).

    Example:
        >>> import torch
        >>> truth = torch.rand(50, 3)
        >>> score_features(-truth[:, [2, 0, 1]], truth, n_shuffles=2).latent
        array([1, 2, 0])
    """
    if activations.ndim != 2 or truth.ndim != 2 or len(activations) != len(truth):
        raise SeriesShapeError(
            "expected activations [row, latent] and truth [row, feature] with the same rows, "
            f"got {list(activations.shape)} and {list(truth.shape)}"
        )
    if len(truth) < 2 or n_shuffles < 1:
        raise ArgumentError(
            f"expected at least 2 rows and 1 shuffle, got {len(truth)} and {n_shuffles}"
        )
    latents = _standard(activations.detach().cpu().double().numpy())
    features = _standard(truth.detach().cpu().double().numpy())
    correlation, latent = _matched(latents, features)
    generator = np.random.default_rng(seed)
    shuffled = [
        np.abs(_matched(generator.permutation(latents), features)[0]).mean()
        for _ in range(n_shuffles)
    ]
    return FeatureScore(
        mcc=float(np.abs(correlation).mean()),
        shuffled_mcc=float(np.mean(shuffled)),
        correlation=correlation,
        latent=latent,
        n_latents=latents.shape[1],
        made={"n_shuffles": n_shuffles, "seed": seed},
    )


def _standard(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and length 1, so that products are correlations; constant ones are 0."""
    centred = values - values.mean(0)
    length = np.linalg.norm(centred, axis=0)
    still = length <= 1e-12 * np.maximum(np.abs(values).max(0), 1e-300) * len(values) ** 0.5
    return np.where(still, 0.0, centred / np.where(still, 1.0, length))


def _matched(latents: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    table = features.T @ latents  # [feature, latent]
    rows, columns = linear_sum_assignment(np.abs(table), maximize=True)
    correlation, latent = np.zeros(len(table)), np.full(len(table), -1)
    correlation[rows], latent[rows] = table[rows, columns], columns
    return correlation, latent
