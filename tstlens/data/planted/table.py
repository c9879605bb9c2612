"""A table of methods scored against known answers, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.results import Result
from tstlens.stats import percentile_interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Score", "TruthTable"]

KINDS = ("method", "trivial", "random", "answer")


class Score(NamedTuple):
    """One number: a method on a task, of one seed.

    Args:
        task: what was planted.
        method: what looked for it.
        measure: what is counted: ``"AUPRC"``, ``"edge AUROC"`` …
        seed: of task and model.
        value: the number.
        kind: ``"method"``; ``"trivial"`` for what needs no model; ``"random"``; ``"answer"`` for
            the planted answer itself, put in as if a method had given it.
    """

    task: str
    method: str
    measure: str
    seed: int
    value: float
    kind: str = "method"


@dataclass(frozen=True)
class TruthTable(Result):
    """How near each method comes to a planted answer, task by task and over all tasks.

    Args:
        question: ``"where"``, ``"component"``, ``"feature"`` or ``"state"``.
        scores: every number that was measured.
        notes: what to know when reading it: where each method misleads.
        checks: what was checked before any method was scored (a model's accuracy, a graph under
            interchange interventions) -> the lowest value over tasks and seeds.
        level: coverage of the intervals.
        made: how: sizes, seeds, CPU seconds.
    """

    question: str
    scores: tuple[Score, ...]
    notes: tuple[str, ...] = ()
    checks: dict[str, float] = field(default_factory=dict)
    level: float = 0.95
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores:
            raise ArgumentError("expected at least one score, got none")
        strange = sorted({score.kind for score in self.scores} - set(KINDS))
        if strange:
            raise UnknownNameError(strange[0], KINDS, "this names a kind of row")

    @property
    def measures(self) -> tuple[str, ...]:
        """What is counted, in the order in which it came."""
        return tuple(dict.fromkeys(score.measure for score in self.scores))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What was planted, in the order in which it came."""
        return tuple(dict.fromkeys(score.task for score in self.scores))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order in which they came; trivial, random and answer rows last."""
        kinds = {score.method: KINDS.index(score.kind) for score in self.scores}
        return tuple(sorted(kinds, key=kinds.__getitem__))

    def kind_of(self, method: str) -> str:
        """The kind of a row.

        Raises:
            UnknownNameError: no such method in this table.
        """
        for score in self.scores:
            if score.method == method:
                return score.kind
        raise UnknownNameError(method, self.methods, "this names a row of the table")

    def values(self, method: str, measure: str, task: str | None = None) -> np.ndarray:
        """One value per seed, a mean over tasks where no task is named; NaN where not measured."""
        by_seed: dict[int, list[float]] = {}
        for score in self.scores:
            named = score.method == method and score.measure == measure
            if named and task in (None, score.task):
                by_seed.setdefault(score.seed, []).append(score.value)
        return np.array([np.mean(found) for _, found in sorted(by_seed.items())])

    def summary(self, task: str | None = None) -> pd.DataFrame:
        """One row per method and measure: mean, low, high over seeds, and how many seeds.

        The interval is the percentile bootstrap over seeds, each with its mean over tasks, so it
        says what another seed would give, not another task. It is NaN for a single seed, and with
        fewer than five it is no wider than the seeds themselves lie apart: too narrow.

        Args:
            task: one of them; None for the mean over all.
        """
        import pandas as pd

        rows = []
        for method in self.methods:
            for measure in self.measures:
                values = self.values(method, measure, task)
                if not len(values):
                    continue
                low, high = interval(values, self.level)
                row = {"method": method, "kind": self.kind_of(method), "measure": measure}
                row |= {"mean": values.mean(), "low": low, "high": high, "n_seeds": len(values)}
                rows.append(row)
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: question, task, method, kind, measure, seed, value."""
        import pandas as pd

        frame = pd.DataFrame(self.scores, columns=list(Score._fields))
        frame.insert(0, "question", self.question)
        return frame

    def to_markdown(self, task: str | None = None) -> str:
        """A Markdown table, one row per method and one column per measure.

        Args:
            task: one of them; None for the mean over all.
        """
        found = self.summary(task)
        lines = ["| method | " + " | ".join(self.measures) + " |"]
        lines.append("|---" * (1 + len(self.measures)) + "|")
        for method in self.methods:
            rows = found[found["method"] == method].set_index("measure")
            cells = [
                _cell(rows.loc[measure]) if measure in rows.index else "–"
                for measure in self.measures
            ]
            lines.append(f"| {_named(method, self.kind_of(method))} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        seeds = {score.seed for score in self.scores}
        return (
            f"TruthTable({self.question!r}, {len(self.methods)} rows, {len(self.tasks)} tasks, "
            f"{len(seeds)} seeds)"
        )


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of the mean; NaN for fewer than two values."""
    values = np.asarray(values, dtype=float)
    low, high = percentile_interval(values[:, None], level, 5000)
    return float(low[0]), float(high[0])


def joined(tables: Iterable[TruthTable]) -> pd.DataFrame:
    """The numbers of several tables, one under the other."""
    import pandas as pd

    return pd.concat([table.to_dataframe() for table in tables], ignore_index=True)


def _named(method: str, kind: str) -> str:
    return method if kind == "method" else f"*{method}* ({kind})"


def _cell(row: Any) -> str:
    text = f"{row['mean']:.2f}"
    if np.isfinite(row["low"]):
        text += f" [{row['low']:.2f}, {row['high']:.2f}]"
    return text
