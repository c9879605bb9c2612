"""``truth``: every method of the library against answers that are known, as four tables.

The page that the suite writes: its tables, what they say, and where each method misleads.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import tstlens
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.figures.drawing import write_png
from tstlens.results import TableResult
from tstlens.storage import write_set
from tstlens.truth.components import component_names
from tstlens.truth.questions import (
    component_scores,
    coverage_scores,
    feature_scores,
    state_scores,
    where_scores,
)
from tstlens.truth.scores import TITLES, Score, TruthTable
from tstlens.truth.tasks import planted_names

ABOUT = {
    "where": (
        "Small transformers trained on tasks in which a motif at a random place decides the class. "
        "AUPRC: is the ranking of channel x time led by the samples of the motif? Prediction "
        "difference: fall of the class's probability when as many of the highest-ranked samples "
        "as decide are replaced by another background. All methods are given the same references: "
        "backgrounds of training series, which hold no motif, a luxury that real data rarely offer."
    ),
    "component": (
        "Transformers with a known circuit: weights written by hand (all else busy with things "
        "that hardly anything reads, and noise on every weight), or trained by strict interchange "
        "intervention. AUROC: are the circuit's edges and nodes ranked first? Faithfulness: what "
        "as many top edges as the circuit has keep of the logit difference, all others corrupted, "
        "on other pairs (1 is all of it). CMD: area between that curve over growing circuits and "
        "1 (0 is best)."
    ),
    "feature": (
        "Activations of 16 dimensions made of 32 sparse directions, two of them active on average. "
        "MCC: mean absolute correlation of features and latents, matched one to one, on other rows."
    ),
    "state": (
        "Causal transformers that forecast a machine of 36 hidden states, of which a patch alone "
        "does not tell which. One code per position; what a code stands for is chosen on other "
        "series. NMI of codes and states; precision: share of positions whose state is the one "
        "that their code stands for."
    ),
    "coverage": (
        "Effects drawn at random, whose mean is known: a share of the series has one, it is 0 in "
        "the others. How often does the nominal 95 % interval of the mean over series hold it? "
        "*tstlens* is the rule of `tstlens.stats.mean_interval` (bootstrap-t within one to three "
        "half widths of plain t), counted over the samples that it gives an interval of; it gives "
        "none where all effects are 0 (last row: how many samples), where the others say [0, 0] "
        "and miss."
    ),
}
MISLEADS = {
    "where": (
        "**Causal patching of windows** (`patching.window_sweep`) shares out effects of windows of "
        "1 to 16 samples as if they added up: narrow spikes are blurred a little, and where two "
        "motifs are both needed or either is enough, one window says too much or nothing. Its "
        "settings were chosen on seeds 10 and 11 of these tasks, which no table here is made with.",
        "**Causal patching of single samples** changes too little to be noticed where the model "
        "averages, and makes edges that no series has.",
        "**Patching the embedding** has no channels and a position of a convolutional front end "
        "saw more samples than its cell: scored on channel x time it cannot do well with several "
        "channels, and where one position alone changes little it says little.",
        "**Attribution patching at the embedding** adds the error of the linearisation to that.",
        "**Integrated gradients and GradientSHAP** spread credit over the samples by their size "
        'and the sign of the weights, so their maps are ragged within a motif. "Same windows" '
        "are their sums over the windows of causal patching, shared out in the same way: compare "
        "that row with the causal windows, to see what these owe to smoothing.",
        "**Permutation SHAP and occlusion** work on patches, so all samples of a patch share a "
        "score; occlusion gives nothing where another patch says the same.",
        "**Prediction difference** rewards whatever breaks the model, right or wrong: samples "
        "outside the mask that confuse it count as much. Read it beside the AUPRC, and beside "
        "the row of the mask itself.",
    ),
    "component": (
        "**Exact edge patching** goes edge by edge: where two readers back each other up, or an "
        "edge works only together with another (both keys and values, both inputs of an AND), "
        "single edges look weak.",
        "**Edge attribution (EAP)** takes one gradient at the corrupted run: it misses edges into "
        "keys and queries where attention is saturated, and units that are switched off there. "
        "EAP-IG mends most of that for five times the passes.",
        "**Node patching and node attribution** have no edges: between two nodes that matter they "
        "see an edge whether there is one or not, so circuits made from them need many more edges.",
        "**The graph itself** is not the best possible row: in a model under noise the edges "
        "outside do a little as well, and equal scores leave the order beyond it to chance.",
    ),
    "feature": (
        "**A TopK SAE** is told how many features are active; real activations do not say.",
        "**A random dictionary's** score is far above 0: with as many latents as features some "
        "correlate with anything. Read every other row against it.",
        "**PCA, ICA and neurons** have half as many latents as there are features, so their MCC "
        "cannot pass 1/2.",
        "**Nothing here shows** that a trained model's activations are sums of sparse features.",
    ),
    "state": (
        "**The prototype of the patch alone** already tells a good part of the state: read NMI "
        "against that row and not against 0.",
        "**A codebook tuned with the model** is of another model than the frozen rows: training "
        "on codes makes it say what it needs in codes.",
        "**The strongest latent of an SAE** throws most of its code away; an SAE was not made to "
        "give one symbol per position. The same goes for the strongest neuron.",
        "**k-means** is the codebook's start: where the two are level, training the table bought "
        "nothing.",
    ),
    "coverage": (
        "**Few series with an effect** say neither how many there are nor how large they can be: "
        "below five of them the lognormal and t rows fall short whatever the rule, and intervals "
        "of constant effects cover nearly always, since their count is a whole number.",
        "**Plain t** is symmetric and misses skewed means; **percentiles** never reach beyond the "
        "sample and are too narrow below about 20 series.",
        "**Nothing here shows** that other series would be drawn like these, or another training "
        "seed of the model.",
    ),
}


def markdown(
    tables: Sequence[TruthTable], setting: str, made: dict[str, Any], images: Mapping[str, str]
) -> str:
    """The page.

    Args:
        tables: one per question.
        setting: of the suite.
        made: version and arguments.
        images: question -> address of its figure.
    """
    lines = [
        "# Which explanation can you trust?",
        "",
        "Every method of tstlens against answers that are known, made by `tstlens benchmark` "
        f"(setting: {setting}, version {made.get('version', '?')}). Do not edit: run it again.",
        "",
        "Cells are means over tasks and seeds, with the 95 % interval over seeds (percentile "
        "bootstrap) in brackets. With fewer than five seeds an interval is narrower than it should "
        "be: it cannot reach beyond the seeds. Rows in italics are controls: *trivial* ones need "
        "no model or no method, the *answer* is what was planted, put in as if a method had "
        "found it.",
        "",
    ]
    for table in tables:
        lines += _section(table, images.get(table.question))
    return "\n".join(lines).rstrip() + "\n"


def merged(before: str, page: str) -> str:
    """A page with another's sections in place of its own; those that are new come at its end."""
    head, *old = before.rstrip().split("\n## ")
    sections = {part.partition("\n")[0]: part.strip() for part in (*old, *page.split("\n## ")[1:])}
    return "\n\n## ".join([head.strip(), *sections.values()]) + "\n"


def _section(table: TruthTable, image: str | None) -> list[str]:
    question = table.question
    seeds = sorted({score.seed for score in table.scores})
    lines = [f"## {TITLES[question]}", "", ABOUT[question], ""]
    lines += [f"Seeds {', '.join(map(str, seeds))}. {_checked(table)}".rstrip(), ""]
    if image:
        lines += [f"![{TITLES[question]} Every method's score]({image})", ""]
    lines += [table.to_markdown()]
    if question != "coverage":  # where more than 95 % is no better
        lines += [*_found(table), ""]
    if len(table.tasks) > 1:
        for task in table.tasks:
            lines += [f"### {task}", "", *_checked_of(table, task), table.to_markdown(task)]
    lines += ["Where each misleads:", "", *(f"- {text}" for text in MISLEADS[question]), ""]
    return lines


def _checked(table: TruthTable) -> str:
    if not table.checks:
        return ""
    worst = min(table.checks, key=table.checks.__getitem__)
    text = f"Checked first: lowest {table.checks[worst]:.3f} ({worst})"
    scored = {(score.task, score.seed) for score in table.scores}
    left_out = [
        name for name in table.checks if name.count(",") == 2 and tuple(_place(name)) not in scored
    ]
    if left_out:
        text += f"; left out: {'; '.join(left_out)}, so the mean of that seed is over other tasks."
    else:
        text += "; none left out."
    return text


def _checked_of(table: TruthTable, task: str) -> list[str]:
    """One line: what the checks of a task gave, from the lowest to the highest."""
    values = {name: value for name, value in table.checks.items() if f", {task}, " in name}
    if not values:
        return []
    kind = next(iter(values)).partition(",")[0]
    low, high = min(values.values()), max(values.values())
    return [f"{_CHECKS.get(kind, kind)}: {low:.3f} to {high:.3f}.", ""]


_CHECKS = {
    "accuracy": "Accuracy of the trained models",
    "interchange": "Lowest accuracy under interchange interventions",
}


def _place(check: str) -> tuple[str, int]:
    """Task and seed of "accuracy, low-var, seed 1"."""
    _, task, seed = check.split(", ")
    return task, int(seed.removeprefix("seed "))


SMALLER = frozenset({"CMD"})  # measures of which less is better


def _found(table: TruthTable) -> list[str]:
    """What the table says, in sentences made from its numbers."""
    sentences = []
    methods = [method for method in table.methods if table.kind_of(method) == "method"]
    controls = [m for m in table.methods if table.kind_of(m) in ("trivial", "random")]
    for measure in table.measures:
        sign = -1 if measure in SMALLER else 1
        mean = {
            method: float(np.mean(values))
            for method in (*methods, *controls)
            if len(values := table.values(method, measure))
        }
        ranked = sorted((m for m in methods if m in mean), key=lambda m: -sign * mean[m])
        if not ranked:
            continue
        first = ranked[0]
        level = [m for m in ranked if f"{mean[m]:.2f}" == f"{mean[first]:.2f}"]
        text = f"- {measure}: {_listed(level)} {'lead' if level[1:] else 'leads'} "
        text += f"({mean[first]:.2f})"
        if len(ranked) > len(level):
            following = ranked[len(level)]
            text += f", then {following} ({mean[following]:.2f})"
            text += f"; last of the methods is {ranked[-1]} ({mean[ranked[-1]]:.2f})"
        rivals = [m for m in controls if m in mean]
        if rivals:
            best = max(rivals, key=lambda m: sign * mean[m])
            beaten = [m for m in ranked if sign * mean[m] <= sign * mean[best]]
            text += f". The best control is {best} ({mean[best]:.2f})"
            text += f", which {_listed(beaten)} did not beat" if beaten else ", behind all of them"
        sentences.append(text + ".")
    return sentences


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


QUESTIONS = tuple(TITLES)
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
class Truth(TableResult):
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

    def _rows(self) -> list[dict[str, Any]]:
        return [row for table in self.tables for row in table._rows()]

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
            **options: of :func:`tstlens.truth.draw_truth`.
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
            :mod:`tstlens.truth.questions`.

    Returns:
        A Truth: four tables with intervals over seeds. The same seeds give the same numbers on the
        same machine and number of threads.

    Raises:
        UnknownNameError: no such setting or question.
        ArgumentError: no seed, or a question that needs sae-lens without it.

    Example:
        >>> from tstlens import truth
        >>> found = truth.truth("small", ["component"], progress=False)  # doctest: +SKIP
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
