"""``truth``: every method of the library against answers that are known, as four tables."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tstlens
from tstlens.data import planted_names
from tstlens.data.planted import Score, TruthTable
from tstlens.data.planted.table import joined
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.figures.images import write_png
from tstlens.model.planted import component_names
from tstlens.report.suite.components import component_scores
from tstlens.report.suite.coverage import coverage_scores
from tstlens.report.suite.features import feature_scores
from tstlens.report.suite.page import markdown, merged
from tstlens.report.suite.states import state_scores
from tstlens.report.suite.where import where_scores
from tstlens.results import Result
from tstlens.storage import write_set

if TYPE_CHECKING:
    import pandas as pd

QUESTIONS = ("where", "component", "feature", "state", "coverage")
_IMAGE = 960  # pixels; the width of a page of a code host
_NEED_SAE_LENS = ("feature", "state")

# Arguments of each part. "small" is for a laptop's coffee break, "full" for the documentation.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "where": {"names": ("low-var", "seq-comb-univariate"), "seeds": (0, 1), "n_series": 16},
        "component": {"seeds": (0, 1), "n_pairs": 32},
        "feature": {"seeds": (0, 1, 2)},
        "state": {"seeds": (0, 1), "steps": 1500, "n_fit": 1500},
        "coverage": {"seeds": (0, 1), "sizes": (8, 24), "shares": (0.1, 1.0), "repeats": 200},
    },
    "full": {
        "where": {"names": tuple(planted_names()), "seeds": (0, 1, 2, 3, 4), "n_series": 40},
        "component": {"seeds": (0, 1, 2, 3, 4), "n_pairs": 64},
        "feature": {"seeds": (0, 1, 2, 3, 4), "steps": 4000},
        "state": {"seeds": (0, 1, 2, 3, 4), "steps": 3000, "n_fit": 4000},
        "coverage": {"seeds": (0, 1, 2, 3, 4)},
    },
}


@dataclass(frozen=True)
class Truth(Result):
    """What every method got right, question by question.

    Args:
        tables: one per question that was asked.
        setting: ``"small"``, ``"full"`` or ``"own"``.
        seconds: question -> CPU seconds of this process.
        made: arguments of each part, version of tstlens.
    """

    tables: tuple[TruthTable, ...]
    setting: str
    seconds: dict[str, float] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, question: str) -> TruthTable:
        for table in self.tables:
            if table.question == question:
                return table
        known = [table.question for table in self.tables]
        raise UnknownNameError(question, known, "this names a table of the suite")

    def to_dataframe(self) -> pd.DataFrame:
        """Every number: question, task, method, kind, measure, seed, value."""
        return joined(self.tables)

    def to_markdown(self, images: Mapping[str, str] | None = None) -> str:
        """The page of all tables, with what each says and where each method misleads.

        Args:
            images: question -> address of its figure, for those that are to be shown.
        """
        return markdown(self.tables, self.setting, self.made, images or {})

    def figure(self, question: str = "where", **options: Any) -> Any:
        """The figure of one table.

        Args:
            question: which.
            **options: of :func:`tstlens.figures.draw_truth`.
        """
        return self[question].figure(**options)

    def save(self, path: str | Path, *, images: bool = False, update: bool = False) -> Path:
        """Write the page, ``docs/truth.md`` say, and the numbers beside it as CSV.

        Args:
            path: of the page.
            images: draw every table's figure as well, ``docs/truth-where.png`` and so on, and show
                it on the page; needs kaleido and Chrome or Chromium.
            update: keep the sections and numbers of other questions that are there already.

        Raises:
            ArgumentError: images were asked for and cannot be drawn.
            StorageError: the place cannot be written.
        """
        import pandas as pd

        path = Path(path)
        shown = {}
        if images:
            for table in self.tables:
                shown[table.question] = f"{path.stem}-{table.question}.png"
                write_png(table.figure(), path.with_name(shown[table.question]), width=_IMAGE)
        page, frame = self.to_markdown(shown), self.to_dataframe()
        numbers = path.with_suffix(".csv")
        if update and path.exists() and numbers.exists():
            page = merged(path.read_text(encoding="utf-8"), page)
            before = pd.read_csv(numbers, float_precision="round_trip")
            frame = pd.concat([before[~before["question"].isin(set(frame["question"]))], frame])
        return write_set({path: page, numbers: frame.to_csv(index=False)})

    def __repr__(self) -> str:
        parts = ", ".join(f"{table.question}: {len(table.methods)} rows" for table in self.tables)
        return f"Truth({self.setting!r}, {parts}, {sum(self.seconds.values()):.0f} CPU seconds)"


def truth(
    setting: str = "small",
    questions: Iterable[str] = QUESTIONS,
    *,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    **options: dict[str, Any],
) -> Truth:
    """Score every method of the library on tasks whose answer is known.

    It answers which method can be trusted with which question: *where* in the series (motif and
    frequency tasks), *which component* (circuits written by hand or trained in), *which feature*
    (sparse features in superposition), *which state* (a regime machine); and whether intervals
    *cover* a known mean as often as they say. Every model is checked
    first: one that has not learned the task, or whose circuit does not hold, is left out. What can
    mislead: the tasks are small and clean; a method that leads here may fail on your model, and a
    method that fails here has no excuse.

    Args:
        setting: ``"small"`` (some minutes on two cores) or ``"full"`` (all tasks, five seeds).
        questions: some of ``"where"``, ``"component"``, ``"feature"``, ``"state"``. The last two
            need sae-lens.
        seeds: in place of the setting's, for all parts.
        progress: show bars.
        **options: question -> arguments in place of the setting's, such as
            ``where={"names": ["low-var"], "n_series": 8}``; see the functions of
            :mod:`tstlens.report.suite`.

    Returns:
        A Truth: four tables with intervals over seeds. The same seeds give the same numbers on the
        same machine and number of threads.

    Raises:
        UnknownNameError: no such setting or question.
        ArgumentError: no seed, or a question that needs sae-lens without it.

    Example:
        >>> from tstlens import report
        >>> found = report.truth("small", ["component"], progress=False)  # doctest: +SKIP
        >>> found.save("docs/truth.md")  # doctest: +SKIP
    """
    if setting not in SETTINGS:
        raise UnknownNameError(setting, SETTINGS, "this names a setting of the suite")
    asked = tuple(dict.fromkeys(questions))
    for question in (*asked, *options):
        if question not in QUESTIONS:
            raise UnknownNameError(question, QUESTIONS, "this names a part of the suite")
    if not asked:
        raise ArgumentError(f"questions: expected some of {', '.join(QUESTIONS)}, got none")
    if seeds is not None and not len(seeds):
        raise ArgumentError("seeds: expected at least one")
    missing = [question for question in asked if question in _NEED_SAE_LENS]
    if missing and importlib.util.find_spec("sae_lens") is None:
        raise ArgumentError(
            f"{', '.join(missing)}: needs sae-lens, pip install 'tstlens[saes]'; or ask "
            "questions=['where', 'component', 'coverage'] only"
        )
    tables, seconds, made = [], {}, {}
    for question in asked:
        chosen = {**SETTINGS[setting][question], **options.get(question, {})}
        if seeds is not None:
            chosen["seeds"] = tuple(int(seed) for seed in seeds)
        if question == "component":
            chosen.setdefault("names", tuple(component_names()))
        begun = time.process_time()
        scores, checks = _PARTS[question](**chosen, progress=progress)
        seconds[question] = time.process_time() - begun
        made[question] = {name: _plain(value) for name, value in chosen.items()}
        if not scores:
            raise ArgumentError(
                f"{question}: no model passed its check, so there is nothing to score; the checks "
                f"were {checks}; try other seeds"
            )
        tables.append(TruthTable(question, tuple(scores), checks=checks, made=made[question]))
    given = "own" if options or seeds is not None else setting
    return Truth(tuple(tables), given, seconds, {"version": tstlens.__version__, **made})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_PARTS: dict[str, Callable[..., tuple[list[Score], dict[str, float]]]] = {
    "where": where_scores,
    "component": component_scores,
    "feature": feature_scores,
    "state": state_scores,
    "coverage": coverage_scores,
}
