"""What the lens returns: the output as read at every depth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LensResult(Result):
    """The model's output as the head reads it off the stream at every point.

    Args:
        output: [point, series, class] logits, or [point, series, channel, horizon] forecasts in
            the units of the series.
        points: where the stream was read, first to last.
        kind: ``"classes"`` or ``"forecast"``.
        target: int [series] classes, or true values [series, channel, horizon]; None where not
            given.
        final: the model's own output, [series, ...]; equals the last point.
        heuristic: what the readings can and cannot say.
        by_pos: the same with every position read by itself, [point, series, pos, ...], or None.
        observed: bool [series, pos], False at padding; beside ``by_pos``.
        series: what a forecaster read, [series, channel, time]; None for classifiers.
        time_cells: first and one-past-last sample that each position stands for, or None.
        class_names: for tables and figures, or None.
        made: how: model, where its norms are.
    """

    output: Float[Tensor, "point series *out"]
    points: tuple[str, ...]
    kind: Literal["classes", "forecast"]
    target: Tensor | None
    final: Float[Tensor, "*series_out"]
    heuristic: str
    by_pos: Float[Tensor, "point series pos *out"] | None = None
    observed: Bool[Tensor, "series pos"] | None = None
    series: Float[Tensor, "series channel time"] | None = None
    time_cells: tuple[tuple[int, int], ...] | None = None
    class_names: tuple[str, ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of ``output``."""
        return ("point", "series", *(("class",) if self._classes() else ("channel", "step")))

    def probabilities(self) -> Float[Tensor, "point series class"]:
        """Class probabilities at every point."""
        return self._logits().softmax(-1)

    def log_prob(self) -> Float[Tensor, "point series"]:
        """Log-probability (nats) of the target class at every point."""
        log_probs = self._logits().log_softmax(-1)
        index = self._labels().expand(log_probs.shape[:2])[..., None]
        return log_probs.gather(-1, index)[..., 0]

    def accuracy(self) -> Float[Tensor, " point"]:
        """Share of series whose largest logit is the target's."""
        return (self._logits().argmax(-1) == self._labels()).double().mean(1)

    def agreement(self) -> Float[Tensor, " point"]:
        """Share of series whose largest logit is that of the model's own output."""
        return (self._logits().argmax(-1) == self.final.argmax(-1)).double().mean(1)

    def kl(self) -> Float[Tensor, "point series"]:
        """KL divergence of each reading from the model's own output, in nats."""
        read, final = self._logits().log_softmax(-1), self.final.log_softmax(-1)
        return (final.exp() * (final - read)).sum(-1)

    @checked
    def mse(self, to: Literal["final", "target"] = "final") -> Float[Tensor, "point series"]:
        """Mean squared distance of each forecast from the final one or from the true values.

        In squared units of the series.
        """
        if self._classes():
            raise ArgumentError("mse is for forecasts, and this model classifies; see kl()")
        if to == "target" and self.target is None:
            raise ArgumentError("no true values were given: call lens(model, series, target)")
        reference = self.target if to == "target" and self.target is not None else self.final
        return ((self.output - reference) ** 2).flatten(2).mean(-1)

    def summary(self) -> pd.DataFrame:
        """One row per point: accuracy, agreement and distance from the model's own output."""
        import pandas as pd

        columns: dict[str, Any] = {"point": list(self.points)}
        if self._classes():
            if self.target is not None:
                columns["accuracy"] = self.accuracy().tolist()
                columns["log_prob"] = self.log_prob().mean(1).tolist()
            columns["agreement"] = self.agreement().tolist()
            columns["kl"] = self.kl().mean(1).tolist()
        else:
            if self.target is not None:
                columns["mse_target"] = self.mse("target").mean(1).tolist()
            columns["mse_final"] = self.mse().mean(1).tolist()
        return pd.DataFrame(columns)

    def to_dataframe(self) -> pd.DataFrame:
        """Long format: point, series, class, logit, probability; or channel, step, forecast."""
        import pandas as pd

        sizes = self.output.shape[1:]
        entries: list[Any] = [list(self.points), *(range(size) for size in sizes)]
        index = pd.MultiIndex.from_product(entries, names=list(self.axes))
        flat = self.output.reshape(-1).double().cpu().numpy()
        if not self._classes():
            return pd.DataFrame({"forecast": flat}, index=index).reset_index()
        frame = pd.DataFrame({"logit": flat}, index=index)
        frame["probability"] = self.probabilities().reshape(-1).double().cpu().numpy()
        frame = frame.reset_index()
        if self.target is not None:
            frame["target"] = frame["series"].map(dict(enumerate(self.target.tolist())))
        return frame

    def __repr__(self) -> str:
        what = f"{self.output.shape[1]} series at {len(self.points)} points"
        return f"LensResult({self.kind} of {what}; {self.heuristic})"

    def _classes(self) -> bool:
        return self.kind == "classes"

    def _logits(self) -> Tensor:
        if not self._classes():
            raise ArgumentError("this model forecasts: its readings have no classes; see mse()")
        return self.output

    def _labels(self) -> Tensor:
        if self.target is None:
            raise ArgumentError("no classes were given: call lens(model, series, labels)")
        return self.target.to(self.output.device).long()
