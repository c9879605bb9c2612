"""What is measured: from a model's output to one number per series, with what the number means."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from tstlens.arguments import check_finite, checked
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError

Better = Literal["higher", "lower"]
ANY = (-math.inf, math.inf)


@dataclass(frozen=True)
class Metric:
    """A named number per series, read off the output and the targets it is compared with.

    It pickles where ``measure`` does: give a function of a module, or an object with parameters,
    rather than a lambda.

    Args:
        name: what tables and figures call it.
        unit: ``"probability"``, ``"nats"``, ``"logit"``, ``"units"``, ``"squared units"`` …;
            ``"value"`` where it has none.
        measure: ``measure(output, *targets)``, from outputs [*world, pair, ...] to values
            [*world, pair]. Without targets it gets the outputs [pair, ...] of all pairs at once.
        targets: what each pair is compared with; the first axis of each is the pair.
        better: which direction is an improvement, ``"higher"`` or ``"lower"``; None where neither
            is. Figures colour improvements alike.
        range: smallest and largest value that it can have.
        first_pair: where these pairs start among all, for errors that name one.
    """

    name: str
    unit: str
    measure: Callable[..., Any]
    targets: tuple[Tensor, ...] = ()
    better: Better | None = None
    range: tuple[float, float] = ANY
    first_pair: int = 0

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower", None):
            raise ArgumentError(f"better: expected 'higher', 'lower' or None, got {self.better!r}")
        if not callable(self.measure):
            raise ArgumentError(f"measure: expected a function of the output, got {self.measure!r}")

    @classmethod
    @checked
    def of(
        cls,
        function: Callable[[Tensor], Any],
        name: str | None = None,
        *,
        unit: str = "value",
        better: Better | None = None,
        range: tuple[Any, Any] = ANY,
    ) -> Metric:
        """A function of your own from outputs [pair, ...] to [pair], with what it means.

        Args:
            function: of the outputs.
            name: what figures call it; the function's own where None ("metric" for a lambda).
            unit: of its values.
            better: which direction is an improvement, if one is.
            range: smallest and largest value that it can have.

        Example:
            >>> Metric.of(lambda output: output.std(1), "spread", better="lower").name
            'spread'
        """
        return cls(name_of(function) if name is None else name, unit, function, (), better, range)

    def __call__(self, output: Float[Tensor, ...]) -> Float[Tensor, "*world pair"]:
        """Values [*world, pair] of outputs [*world, pair, ...] ([pair, ...] without targets).

        Raises:
            SeriesShapeError: the outputs are for another number of pairs.
            LabelError: a target is outside the model's classes.
            ArgumentError: a value is NaN or infinite: the model's output for that pair is.
        """
        values = self.measure(output, *self.targets)
        if self.targets:  # a function of the user's own is checked where its shape is
            check_finite(values, self.name, self.first_pair)
        return values

    def of_rows(self, output: Float[Tensor, "row ..."], *targets: Tensor) -> Float[Tensor, " row"]:
        """Finite values [row] of outputs whose rows are compared with targets of their own.

        Raises:
            ArgumentError: not one finite number per row.
        """
        values = self.measure(output, *targets)
        if getattr(values, "shape", None) != output.shape[:1]:
            raise ArgumentError(
                f"expected the measure to give one number per series [{len(output)}], got "
                f"{list(getattr(values, 'shape', ()))}; it gets the output {list(output.shape)}"
            )
        check_finite(values, self.name, None)
        return values

    def for_model(self, model: Any) -> Metric:
        """The metric as it reads this model's output; itself where the model makes no difference.

        Analyses do this. Call it before you apply a metric of forecasts to an output yourself.
        """
        bound = getattr(self.measure, "bound", None)
        return self if bound is None else replace(self, measure=bound(model))

    @checked
    def of_pairs(self, index: slice) -> Metric:
        """The same metric for some of the pairs."""
        parts = tuple(target[index] for target in self.targets)
        n_before = builtins.range(self.n_pairs or 0)[index].start
        return replace(self, targets=parts, first_pair=self.first_pair + n_before)

    @property
    def n_pairs(self) -> int | None:
        """How many pairs the targets are for; None without targets."""
        return len(self.targets[0]) if self.targets else None


def name_of(function: Any) -> str:
    """What results call a metric, or a function of the user's own.

    Example:
        >>> name_of(lambda output: output), name_of(torch.var)
        ('metric', 'var')
    """
    if isinstance(function, Metric):
        return function.name
    named = getattr(function, "func", function)  # what a functools.partial is of
    name = getattr(named, "__name__", type(named).__name__)
    return "metric" if name == "<lambda>" else name


@dataclass(frozen=True)
class OfClass:
    """The target's entry [*world, pair] of the logits, or of what they are turned into."""

    transform: Callable[[Tensor, int], Tensor] | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if output.ndim < 2 or output.shape[-2] != len(target):
            raise SeriesShapeError(
                f"expected logits of {len(target)} series, one per target, got {list(output.shape)}"
            )
        n_classes = output.shape[-1]
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < n_classes:
            bad = target[(target < 0) | (target >= n_classes)][0]
            raise LabelError(f"expected targets in 0..{n_classes - 1}, got {int(bad)}")
        index = target.to(output.device).long().expand(output.shape[:-1]).unsqueeze(-1)
        values = output if self.transform is None else self.transform(output, -1)
        return values.gather(-1, index).squeeze(-1)


# What of a class is measured -> unit, function of the logits, smallest and largest value.
OF_CLASS: dict[str, tuple[str, Callable[[Tensor, int], Tensor] | None, tuple[float, float]]] = {
    "probability": ("probability", softmax, (0.0, 1.0)),
    "log-probability": ("nats", log_softmax, (-math.inf, 0.0)),
    "logit": ("logit", None, ANY),
}


def of_class(what: str, target: Tensor) -> Metric:
    """A metric of the target class: ``"probability"``, ``"log-probability"`` or ``"logit"``.

    Args:
        what: of the class.
        target: int [pair], indices of the model's logits.

    Raises:
        LabelError: targets that are no integers [pair].
    """
    check_targets(target)
    unit, transform, range = OF_CLASS[what]
    name = f"{what} of the target class"
    return Metric(name, unit, OfClass(transform), (target,), "higher", range)


def check_targets(target: Tensor) -> None:
    """Raise :class:`LabelError` unless these are integers [pair]."""
    if target.ndim != 1 or target.is_floating_point() or target.dtype == torch.bool:
        raise LabelError(
            f"expected targets as integers [pair], got {target.dtype} {list(target.shape)}"
        )


def mean_forecast(output: Float[Tensor, "pair channel horizon"]) -> Float[Tensor, " pair"]:
    """The forecast averaged over channels and horizon."""
    return output.flatten(1).mean(1)
