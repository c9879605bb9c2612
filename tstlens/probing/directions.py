"""Directions in an activation: from one set of series to another, or of one latent or code.

Every direction knows what strength 1 means. From two sets of series the vector is as long as the
way between their means *along it*, so strengths of different methods can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import check_fields, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HookedTST
from tstlens.probing.extraction import Activations, activations
from tstlens.probing.steering_inputs import as_data
from tstlens.randomness import seeded
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["mean", "median", "lda", "probe"]
METHODS = ("mean", "median", "lda", "probe")


@dataclass(frozen=True, repr=False)
class Direction(Result):
    """A vector at a hook point, ready for ``model.steer``.

    Args:
        hook: full name of the hook point.
        vector: [*feature]: [d_model], [d_mlp], [head, d_head] at q, k, v and z (or [d_head] with
            ``head``).
        method: how it was made.
        unit: what strength 1 means.
        head: the one head that it belongs to; None for all, or where there are none.
        made: how: series in the two sets, positions, or the dictionary.
    """

    hook: str
    vector: Float[Tensor, "*feature"]
    method: str
    unit: str
    head: int | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not bool(self.vector.isfinite().all()):
            raise ArgumentError("expected a direction of finite numbers, got NaN or infinity")

    @property
    def norm(self) -> float:
        """Euclidean length of the vector, in units of the activation."""
        return float(self.vector.double().norm())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per entry of the vector: (head,) feature, value."""
        import pandas as pd

        axes = ("head", "feature") if self.vector.ndim == 2 else ("feature",)
        index = pd.MultiIndex.from_product([range(n) for n in self.vector.shape], names=axes)
        values = self.vector.reshape(-1).cpu().numpy()
        return pd.DataFrame({"value": values}, index=index).reset_index()

    def __repr__(self) -> str:
        head = "" if self.head is None else f", head {self.head}"
        return f"Direction({self.hook}{head}, {self.method}, norm {self.norm:.3g} = {self.unit})"


@checked
def direction(
    model: HookedTST,
    a: Tensor | TimeSeriesData,
    b: Tensor | TimeSeriesData,
    *,
    hook: str,
    method: Method = "mean",
    head: int | None = None,
    pos: int | None = None,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> Direction:
    """The direction in an activation that leads from the series ``a`` to the series ``b``.

    Answers "which way does the activation differ between these two kinds of series?". Every series
    counts once, with the mean over its observed positions (and over its channels where they go
    through the trunk by themselves). ``"mean"`` and ``"median"`` are differences of the sets' means
    and medians; ``"lda"`` is the normal of Fisher's discriminant (covariance shrunk after Ledoit
    and Wolf), ``"probe"`` that of a logistic regression on standardised activations. The last two
    are scaled to the distance of the two means along them.

    What can mislead: a direction that separates two sets need not be one that the model *uses*
    (steer with it and see), and with fewer series than dimensions ``"lda"`` and ``"probe"``
    separate any two sets: check on held-out series with :func:`separability`.

    Args:
        model: the model.
        a: series where the way starts, [batch, channel, time] or data with their mask.
        b: series where it ends.
        hook: full name of a hook point with a feature axis.
        method: ``"mean"``, ``"median"``, ``"lda"`` or ``"probe"``.
        head: at q, k, v and z the one head to take; None for all of them.
        pos: take this position only; None for the mean over observed positions.
        a_mask: bool [batch, time], True where ``a`` was observed.
        b_mask: the same of ``b``.

    Returns:
        The direction; strength 1 is the way from ``a`` to ``b``.

    Raises:
        UnknownHookError, HookError: no such hook point, or one that cannot fire.
        ArgumentError: no series, another method, a head or position that is not there or is
            padding, or two sets between which there is no difference.

    Source: Turner et al. 2023 (arXiv 2308.10248), Wilinski et al. 2024 (arXiv 2409.12915) for time
        series (mean and median); scikit-learn for the discriminant and the regression.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> way = probing.direction(model, torch.randn(9, 12, 25), torch.randn(9, 12, 25) + 1,
        ...     hook="blocks.1.hook_resid_post", method="mean")
        >>> way.vector.shape, way.unit
        (torch.Size([128]), 'one difference of the means')
    """
    if method not in METHODS:
        raise ArgumentError(f"expected method as one of {', '.join(METHODS)}, got {method!r}")
    sets, heads = [], 1
    for name, given, mask in (("a", a, a_mask), ("b", b, b_mask)):
        held = activations(model, as_data(given, mask), hook)
        if len(held) != 1:
            raise ArgumentError(f"hook: expected one hook point, got {hook!r} for {list(held)}")
        (held,) = held.values()
        hook, heads = held.hook, held.n_heads
        sets.append(_one_vector_each(held, name, head, pos))
    first, last = sets
    apart = last.mean(0) - first.mean(0)
    if method == "mean":
        vector, unit = apart, "one difference of the means"
    elif method == "median":
        vector = np.median(last, axis=0) - np.median(first, axis=0)
        unit = "one difference of the medians"
    else:
        normal = _normal(first, last, method)
        vector = normal * float(normal @ apart)
        unit = "one difference of the means along the direction"
    if not np.linalg.norm(vector) > 0:
        raise ArgumentError(
            f"expected two sets of series that differ at {hook}, got none of a difference "
            f"({method}); are they the same series?"
        )
    shaped = torch.from_numpy(np.ascontiguousarray(vector)).to(model.cfg.dtype)
    if heads > 1 and head is None:
        shaped = shaped.unflatten(0, (heads, -1))
    made = {"n_a": len(first), "n_b": len(last), "pos": "mean" if pos is None else pos}
    return Direction(hook, shaped, method, unit, head, made)


@checked
def latent_direction(dictionary: Any, index: int, hook: str | None = None) -> Direction:
    """The direction of one latent of an SAE, or of one code of a codebook: its decoder row.

    Strength s adds what the dictionary would write with the latent s higher, whether or not the
    latent is active. Of a dictionary that normalises its input the row is in normalised units.

    Args:
        dictionary: an SAE, transcoder or codebook with ``W_dec`` [latent, width] and
            ``cfg.metadata.hook_name`` (or give ``hook``).
        index: of the latent or code.
        hook: the hook point that it writes to, where its metadata do not say.

    Raises:
        ArgumentError: no decoder, no such latent, or no hook name.

    Source: Templeton et al. 2024 (feature steering with sparse autoencoders).

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from tstlens import probing
        >>> sae = SimpleNamespace(W_dec=torch.eye(4))
        >>> probing.latent_direction(sae, 2, hook="hook_embed").vector
        tensor([0., 0., 1., 0.])
    """
    rows = getattr(dictionary, "W_dec", None)
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        raise ArgumentError(
            f"expected a dictionary with W_dec [latent, width], got {type(dictionary).__name__}"
        )
    if not 0 <= index < len(rows):
        raise ArgumentError(f"expected a latent in 0..{len(rows) - 1}, got {index}")
    cfg = getattr(dictionary, "cfg", None)
    metadata = getattr(cfg, "metadata", None)
    known = getattr(metadata, "hook_name_out", None) or getattr(metadata, "hook_name", None)
    hook, head = hook or known, getattr(metadata, "hook_head_index", None)
    if not hook:
        raise ArgumentError("the dictionary does not know its hook point; give hook=")
    unit = "one unit of the latent's activation"
    normalises = getattr(cfg, "normalize_activations", None)
    if normalises not in (None, "none"):
        unit += f" (in units normalised by {normalises})"
    vector = rows[index].detach().clone()
    return Direction(hook, vector, "latent", unit, head, {"latent": index})


@checked
def random_directions(like: Direction, n: int, seed: int = 0) -> list[Direction]:
    """Directions of the same norm at the same hook point, uniform over the sphere.

    The control of every steering experiment: any push of this size does something. What can
    mislead: activations fill few dimensions, and most random directions point out of them.

    Args:
        like: the direction that they are compared with.
        n: how many.
        seed: the same seed gives the same directions.

    Example:
        >>> import torch
        >>> from tstlens.probing import Direction, random_directions
        >>> way = Direction("hook_embed", torch.tensor([3.0, 4.0]), "mean", "one difference")
        >>> [round(other.norm, 3) for other in random_directions(way, 2)]
        [5.0, 5.0]
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(n):
        draw = torch.randn(like.vector.shape, generator=generator, dtype=torch.float64)
        vector = (draw / draw.norm() * like.norm).to(like.vector)
        made = {"seed": seed, "number": number}
        found.append(replace(like, vector=vector, method="random", made=made))
    return found


def _one_vector_each(
    held: Activations, name: str, head: int | None, pos: int | None
) -> Float[np.ndarray, "series width"]:
    """The vector of every series in double precision."""
    if head is not None:
        if held.n_heads < 2:
            raise HookError(f"head={head} was given, but {held.hook} has no heads")
        if not 0 <= head < held.n_heads:
            raise ArgumentError(f"expected a head in 0..{held.n_heads - 1}, got {head}")
        held = held.head(head)
    if pos is None:
        return held.pooled("mean").mean(1).astype(float)
    n_pos = held.values.shape[2]
    if not -n_pos <= pos < n_pos:
        raise ArgumentError(f"expected a position in 0..{n_pos - 1}, got {pos}")
    seen = held.observed[:, :, pos].all(1)
    if not seen.all():
        raise ArgumentError(
            f"position {pos} is padding in {int((~seen).sum())} of the series {name}; leave them "
            "out, or take another position"
        )
    return held.values[:, :, pos].mean(1).astype(float)


@seeded(0)
def _normal(first: np.ndarray, last: np.ndarray, method: str) -> Float[np.ndarray, " width"]:
    """Unit normal of the plane that scikit-learn puts between the two sets."""
    if min(len(first), len(last)) < 2:
        raise ArgumentError(
            f"method={method!r} needs at least 2 series in each set, got {len(first)} and "
            f"{len(last)}; 'mean' takes one"
        )
    x = np.concatenate([first, last])
    y = np.repeat([0, 1], [len(first), len(last)])
    if method == "lda":
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
        normal = model.fit(x, y).coef_[0]
    else:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(x)
        probe = LogisticRegression(max_iter=2000, class_weight="balanced")
        normal = probe.fit(scaler.transform(x), y).coef_[0] / scaler.scale_
    length = np.linalg.norm(normal)
    return normal / length if length > 0 else normal
