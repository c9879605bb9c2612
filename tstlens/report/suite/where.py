"""Part (a) of the suite: which samples decide? Every input explanation against a planted mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.conversion import convert
from tstlens.data import PlantedTask, score_where
from tstlens.data.planted import Score
from tstlens.model import HookedTST
from tstlens.patching import attribution, logit, sweep, window_sweep
from tstlens.patching.windows import shares, window_places
from tstlens.probing import attribute, prediction_difference
from tstlens.training import fit_planted

LEARNED = 0.95  # accuracy from which a model has an answer that a method can be right about
_HELD_OUT = 2  # references that attributions never see, for the prediction difference


@dataclass(frozen=True, eq=False)
class Explained:
    """What is explained: some test series of one model.

    Args:
        model: the trained model.
        task: the series, their labels and the mask of deciding samples.
        references: [reference, series, channel, time], what samples are replaced by: backgrounds
            of training series, which hold no motif.
        held_out: the same, for the prediction difference alone.
        seed: of everything random.
    """

    model: HookedTST
    task: PlantedTask
    references: Tensor
    held_out: Tensor
    seed: int

    @property
    def repeated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Series, references and labels, one row per series and reference."""
        n = len(self.references)
        return (
            self.task.series.repeat(n, 1, 1),
            self.references.flatten(0, 1),
            self.task.labels.repeat(n),
        )

    def averaged(self, rows: Tensor) -> Tensor:
        """Rows of `repeated` as a mean over references, [series, ...]."""
        return rows.unflatten(0, (len(self.references), -1)).mean(0)


def explained(
    name: str, seed: int, n_series: int, n_references: int, progress: bool
) -> tuple[Explained, float]:
    """A model trained on a task, test series to explain, and its accuracy on all test series."""
    source, task, evaluation, _ = fit_planted(name, seed, progress=progress)
    model = convert(source, class_names=task.class_names)
    generator = torch.Generator().manual_seed(seed)
    n_needed = n_references + _HELD_OUT
    rows = torch.randint(len(task), (n_needed, n_series), generator=generator)
    backgrounds = task.background[rows]
    part = task.test[:n_series]
    return (
        Explained(model, part, backgrounds[:n_references], backgrounds[n_references:], seed),
        float(evaluation.accuracy),
    )


def maps(what: Explained) -> dict[str, tuple[str, Tensor]]:
    """Method -> kind of row and map [series, channel, time], larger where it matters more."""
    series = what.task.series
    generator = torch.Generator().manual_seed(what.seed + 17)
    gradients = _attributed(what, "integrated_gradients", "time")
    return {
        "causal patching, windows taken away": ("method", windows(what, away=True)),
        "causal patching, windows put in": ("method", windows(what, away=False)),
        "causal patching, single samples": ("method", _samples(what)),
        "causal patching, embedding": ("method", _embedding(what, exact=True)),
        "attribution patching, embedding": ("method", _embedding(what, exact=False)),
        "integrated gradients": ("method", gradients),
        "integrated gradients, same windows": ("method", over_windows(gradients)),
        "GradientSHAP": ("method", _gradient_shap(what)),
        "permutation SHAP, patches": ("method", _attributed(what, "permutation_shap", "patch")),
        "occlusion, patches": ("method", _attributed(what, "occlusion", "patch")),
        "distance from the mean": ("trivial", (series - what.references.mean((0, 1))).abs()),
        "random order": ("random", torch.rand(series.shape, generator=generator)),
        "the mask itself": ("answer", what.task.mask.float()),
    }


def windows(what: Explained, away: bool) -> Tensor:
    """Shares of samples in the effects of windows, see :func:`tstlens.patching.window_sweep`.

    Args:
        what: the model and series.
        away: windows of the series become the reference's; False puts the series' windows into the
            reference.
    """
    series, references, labels = what.repeated
    clean, corrupted = (references, series) if away else (series, references)
    found = window_sweep(what.model, clean, corrupted, logit(labels), progress=False)
    return what.averaged(found.effect()) * (-1 if away else 1)


def over_windows(values: Tensor) -> Tensor:
    """What `windows` would make of effects that add up: it tells what smoothing alone does."""
    n_series, _, n_time = values.shape
    inside = window_places(n_time)
    observed = torch.ones(n_series, n_time, dtype=torch.bool)
    sums = values.double() @ inside.double().T
    return shares(sums, inside, observed)[0].to(values.dtype)


def _samples(what: Explained) -> Tensor:
    series, references, labels = what.repeated
    axes = ("channel", "time")
    found = sweep(what.model, references, series, "series", axes, logit(labels), progress=False)
    return -what.averaged(found.effect())


def _embedding(what: Explained, exact: bool) -> Tensor:
    series, references, labels = what.repeated
    find: Any = sweep if exact else attribution
    found = find(what.model, references, series, "embed", ("pos",), logit(labels), progress=False)
    return -_spread(what, what.averaged(found.effect())[:, None])


def _attributed(what: Explained, method: str, unit: Any) -> Tensor:
    """captum's or shap's values, a mean over the references as baselines."""
    found = [
        attribute(
            what.model,
            what.task.series,
            what.task.labels,
            method=method,
            baseline=reference,
            unit=unit,
            n_steps=32,
            n_samples=1,  # permutations per reference, each walked both ways
            seed=what.seed + number,
            progress=False,
        ).values
        for number, reference in enumerate(what.references)
    ]
    values = torch.stack(found).mean(0)
    return values if unit == "time" else _spread(what, values)


def _gradient_shap(what: Explained) -> Tensor:
    return attribute(
        what.model,
        what.task.series,
        what.task.labels,
        method="gradient_shap",
        baseline="samples",
        background=what.references.flatten(0, 1),
        unit="time",
        seed=what.seed,
        progress=False,
    ).values


def _spread(what: Explained, values: Tensor) -> Tensor:
    """Values by position as values by sample; a map without channels is the same for each."""
    _, n_channels, n_time = what.task.series.shape
    cells = [what.model.time_cell(pos, n_time) for pos in range(values.shape[2])]
    lengths = torch.tensor([cell.stop - cell.start for cell in cells])
    return values.repeat_interleave(lengths, dim=2).expand(-1, n_channels, -1)


def lost_probability(what: Explained, found: Tensor) -> float:
    """Prediction difference with as many entries replaced, by another background, as decide."""
    falls = prediction_difference(
        what.model,
        what.task.series,
        what.task.labels,
        found.abs(),
        n_top=what.task.mask.flatten(1).sum(1),
        replacement=what.held_out,
        unit="time",
    )
    return float(falls.mean())


def where_scores(
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    n_series: int = 24,
    n_references: int = 4,
    progress: bool = True,
) -> tuple[list[Score], dict[str, float]]:
    """AUPRC and prediction difference of every method, and the accuracy of every model.

    A model below 95 % is not scored on; its accuracy is in the checks all the same.

    Args:
        names: where-tasks.
        seeds: of task, model and references.
        n_series: test series explained per model.
        n_references: backgrounds that samples are replaced by.
        progress: show a bar.

    Returns:
        Scores, and "accuracy, task, seed" -> accuracy.
    """
    scores, checks = [], {}
    todo = [(name, seed) for name in names for seed in seeds]
    for name, seed in tqdm(todo, desc="where", disable=not progress):
        what, accuracy = explained(name, seed, n_series, n_references, False)
        checks[f"accuracy, {name}, seed {seed}"] = accuracy
        if accuracy < LEARNED:
            continue
        for method, (kind, found) in maps(what).items():
            values = {
                "AUPRC": score_where(found, what.task.mask).mean,
                "prediction difference": lost_probability(what, found),
            }
            scores += [
                Score(name, method, measure, seed, value, kind) for measure, value in values.items()
            ]
    return scores, checks
