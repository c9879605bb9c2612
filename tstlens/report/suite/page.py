"""The page that the suite writes: its tables, what they say, and where each method misleads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tstlens.data.planted import TruthTable

TITLES = {
    "where": "Which samples decide?",
    "component": "Which component does it?",
    "feature": "Which feature is there?",
    "state": "Which state is it in?",
    "coverage": "Do intervals cover?",
}
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
