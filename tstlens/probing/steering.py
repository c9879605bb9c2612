"""Directions in an activation, and the model's output against the strength of a push along one.

A direction leads from one set of series to another, or is that of one latent or code. Every one
knows what strength 1 means. From two sets of series the vector is as long as the
way between their means *along it*, so strengths of different methods can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Count, Draws, Seed, Share, check_fields, checked
from tstlens.data import TimeSeriesData
from tstlens.data.validate import blanked, check_series
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, HookError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.model.activations import Activations, activations
from tstlens.model.hooking import require_one_pass
from tstlens.probing.measures import measured
from tstlens.randomness import seeded
from tstlens.run import Runs
from tstlens.stats import limits_of, mean_interval


def series_and_mask(
    given: Tensor | TimeSeriesData, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Series [batch, channel, time] and mask [batch, time] of what the user passed.

    Padding comes back as zeros.

    Raises:
        ArgumentError: data and a mask beside them, or no series at all.
        SeriesShapeError: something else.
    """
    if isinstance(given, TimeSeriesData):
        if mask is not None:
            raise ArgumentError("data bring their own mask; leave out mask=")
        given, mask = given.series, given.mask
    if not isinstance(given, Tensor):
        raise SeriesShapeError(
            "expected series [batch, channel, time] or a TimeSeriesData, got "
            f"{type(given).__name__}"
        )
    if not len(given):
        raise ArgumentError("expected at least one series, got none")
    check_series(given, mask=mask, missing=True)
    return blanked(given, mask), mask


def as_data(given: Tensor | TimeSeriesData, mask: Tensor | None = None) -> TimeSeriesData:
    """The same as a :class:`TimeSeriesData`."""
    series, mask = series_and_mask(given, mask)
    return TimeSeriesData(series, mask=mask)


Method = Literal["mean", "median", "lda", "probe"]


@dataclass(frozen=True, repr=False)
class Direction(Labelled):
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

    def entries(self) -> dict[str, Sequence[int]]:
        """Entries of the vector, by head where it has several."""
        names = ("head", "feature")[-self.vector.ndim :]
        return {name: range(n) for name, n in zip(names, self.vector.shape, strict=True)}

    def columns(self) -> dict[str, Tensor]:
        """The value."""
        return {"value": self.vector}

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
def random_directions(like: Direction, n: Count, seed: Seed = 0) -> list[Direction]:
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


@dataclass(frozen=True, repr=False)
class DoseResponse(Labelled):
    """The measure of every series at every strength, for a direction and for random ones.

    Args:
        strengths: in units of ``unit``, ascending, 0 among them (no push).
        values: [series, strength], the measure.
        random: [direction, series, strength], the same along random directions of equal norm.
        low: [strength], lower end of the interval of the mean change against no push, over series;
            NaN below 5 series.
        high: [strength], upper end.
        above_low: [strength], lower end of the interval of the direction's change less the mean
            change of random directions, paired by series.
        above_high: [strength], upper end.
        hook: where it was pushed.
        method: how the direction was made.
        unit: what strength 1 means.
        measure: name of the measure.
        measure_unit: its unit.
        level: coverage of the intervals.
        made: how.
    """

    strengths: tuple[float, ...]
    values: Float[np.ndarray, "series strength"]
    random: Float[np.ndarray, "direction series strength"]
    low: Float[np.ndarray, " strength"]
    high: Float[np.ndarray, " strength"]
    above_low: Float[np.ndarray, " strength"]
    above_high: Float[np.ndarray, " strength"]
    hook: str
    method: str
    unit: str
    measure: str
    measure_unit: str
    level: float = 0.95
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Float[np.ndarray, " strength"]:
        """Mean of the measure over series."""
        return self.values.mean(0)

    @property
    def change(self) -> Float[np.ndarray, " strength"]:
        """Mean change against no push."""
        return self.mean - self.mean[self._none]

    @property
    def random_change(self) -> Float[np.ndarray, "direction strength"]:
        """Mean change of every random direction."""
        means = self.random.mean(1)
        return means - means[:, [self._none]]

    @property
    def monotone(self) -> bool:
        """Whether the mean rises (or falls) from each strength to the next."""
        steps = np.diff(self.mean)
        return bool((steps > 0).all() or (steps < 0).all())

    @property
    def p(self) -> Float[np.ndarray, " strength"]:
        """(1 + random directions whose change is at least as large in size) / (1 + how many).

        With n random directions no p lies below 1 / (n + 1); it is 1 at strength 0.
        """
        larger = np.abs(self.random_change) >= np.abs(self.change)
        return (1 + larger.sum(0)) / (1 + len(self.random))

    @property
    def _none(self) -> int:
        return self.strengths.index(0.0)

    def entries(self) -> dict[str, tuple[float, ...]]:
        """The strengths."""
        return {"strength": self.strengths}

    def columns(self) -> dict[str, np.ndarray]:
        """Mean, change with its interval, that of random directions, the difference's, p."""
        own = {name: getattr(self, name) for name in ("mean", "change", "low", "high")}
        above = {name: getattr(self, name) for name in ("above_low", "above_high", "p")}
        return {**own, "random_change": self.random_change.mean(0), **above}

    def __repr__(self) -> str:
        last = int(np.argmax(np.abs(self.strengths)))
        return (
            f"DoseResponse({self.hook}, {self.method}, {self.measure}: {self.mean[self._none]:.3g}"
            f" -> {self.mean[last]:.3g} at {self.strengths[last]:g}, random "
            f"{self.random.mean((0, 1))[last]:.3g}, {'' if self.monotone else 'not '}monotone)"
        )


@checked
@torch.no_grad()
def dose_response(
    model: HookedTST,
    data: Tensor | TimeSeriesData,
    direction: Direction,
    strengths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    *,
    target: int | Tensor | None = None,
    measure: str | Callable[[Tensor], Tensor] | None = None,
    n_random: Count = 20,
    pos: int | slice | Sequence[int] | None = None,
    mask: Tensor | None = None,
    level: Share = 0.95,
    n_boot: Draws = 2000,
    seed: Seed = 0,
    batch_size: Count = 512,
    progress: bool = True,
) -> DoseResponse:
    """How the output answers to pushes of growing strength, beside random pushes of equal norm.

    Answers "does the model use this direction, and how much of it does it take?". Strength 0 is
    always among the doses. Intervals are over series (:func:`tstlens.stats.mean_interval`); p
    compares with the random directions.

    What can mislead: probabilities saturate (take ``"logit"`` too), and large strengths leave what
    the model was trained on, where curves bend or turn. Where a norm follows the hook point the
    push is divided by its own length, so that more strength replaces the activation rather than
    adding to it. Series that the direction was made from answer more strongly: take others.

    Args:
        model: the model.
        data: series [batch, channel, time], or data with their mask.
        direction: from :func:`direction` or :func:`latent_direction`.
        strengths: doses, in the direction's unit.
        target: the class whose probability is measured, or one class per series; None for
            forecasters and measures of your own.
        measure: ``"probability"`` (None, of a classifier), ``"log_probability"``, ``"logit"``,
            ``"mean_forecast"`` (None, of a forecaster) or a function from outputs [batch, ...] to
            [batch].
        n_random: random directions.
        pos: positions that are pushed; None for all observed ones.
        mask: bool [batch, time], True where observed.
        level: coverage of the intervals.
        n_boot: bootstrap resamples.
        seed: of random directions and resamples.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Curves with frame and figure.

    Raises:
        ArgumentError: no or infinite strengths, a level outside 0 to 1, no target, or a
            trunk that holds mirrored series too.
        UnknownHookError, HookError: of the direction's hook point.

    Source: Turner et al. 2023 (arXiv 2308.10248).

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> way = probing.Direction("hook_embed", torch.ones(128), "by hand", "ones")
        >>> result = probing.dose_response(model, torch.randn(8, 12, 25), way, [1.0], target=3,
        ...     n_random=2, progress=False)
        >>> result.strengths
        (0.0, 1.0)
    """
    series, mask = series_and_mask(data, mask)
    model.check_series(series, mask)
    require_one_pass(model, "to measure what a push does")
    metric = measured(model, measure, target, len(series), "probability")
    doses = tuple(sorted({0.0, *(float(strength) for strength in strengths)}))
    if len(doses) < 2 or not np.isfinite(doses).all():
        raise ArgumentError(f"expected one or more strengths other than 0, got {list(strengths)}")
    others = random_directions(direction, n_random, seed)
    bar = tqdm(
        total=(1 + n_random) * (len(doses) - 1) + 1, desc="dose response", disable=not progress
    )

    runs = Runs(model, series, mask, batch_size=batch_size)

    def run(pushed: Direction, strength: float) -> np.ndarray:
        with model.steer(pushed, strength, pos):
            values = runs.measure(metric).numpy()
        bar.update()
        return values

    with bar:
        still = run(direction, 0.0)
        curves = [
            np.stack([run(one, dose) if dose else still for dose in doses], 1)
            for one in (direction, *others)
        ]
    values, random = curves[0], np.stack(curves[1:])
    zero = doses.index(0.0)
    change = values - values[:, [zero]]
    above = change - (random - random[:, :, [zero]]).mean(0)
    least, most = limits_of(metric.unit, values, random)
    none = values[:, zero].mean()
    ends = []
    for x, limits in ((change, (least - none, most - none)), (above, (least - most, most - least))):
        low, high = mean_interval(x, level=level, n_boot=n_boot, seed=seed, limits=limits)
        if np.isfinite(low).any():
            low[zero] = high[zero] = 0.0  # no push changes nothing, by construction
        ends.append((low, high))
    made = {
        "n_series": len(series),
        "n_random": n_random,
        "norm": direction.norm,
        "pos": "all" if pos is None else pos,
        "direction": direction.made,
        "seed": seed,
    }
    return DoseResponse(
        doses,
        values,
        random,
        *ends[0],
        *ends[1],
        hook=direction.hook,
        method=direction.method,
        unit=direction.unit,
        measure=metric.name,
        measure_unit=metric.unit,
        level=level,
        made=made,
    )
