"""``component_task``: a transformer with a known circuit, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tstlens.data import Pairs
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.model.hooked_tst import HookedTST
from tstlens.model.planted import handwritten, trained
from tstlens.model.planted.handwritten import Drawn
from tstlens.model.planted.program import Program
from tstlens.model.planted.verification import Verification, verify
from tstlens.shapes import Series

__all__ = [
    "ComponentSample",
    "ComponentTask",
    "PlantedGraph",
    "component_names",
    "component_task",
]

_MOST_DRAWS = 100  # until every clean series has a partner of another class


@dataclass(frozen=True)
class PlantedGraph:
    """The nodes and edges that matter, under the names of a component graph.

    Args:
        nodes: ``pos3``, ``L0H1``, ``L0MLP`` …; the output, which always matters, is left out.
        edges: ``"L0H1->L1MLP"``; into heads with the part, ``"pos1->L0H0.v"``, where the weights
            were written by hand. A trained head may hear a node through its queries, keys or
            values, so its edges come without: ``"pos1->L0H0"``.
        parts: whether edges into heads name the part.
    """

    nodes: tuple[str, ...]
    edges: tuple[str, ...]
    parts: bool


@dataclass(frozen=True, eq=False)
class ComponentSample:
    """Series of a component task.

    Args:
        series: [series, channel, time].
        labels: [series] the program's class.
        factors: what the class depends on -> int [series].
    """

    series: Series
    labels: Int[Tensor, " series"]
    factors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.series)


@dataclass(frozen=True, eq=False, repr=False)
class ComponentTask:
    """A model, the program that it implements, and where in the model each part of it lives.

    Args:
        name: of the task.
        model: the transformer.
        graph: nodes and edges that matter.
        program: what they compute.
        description: the question that the model answers.
        how: ``"written by hand"`` or ``"trained by interchange intervention"``.
        draw: draws series and factors.
        made: the arguments that make it again.
    """

    name: str
    model: HookedTST
    graph: PlantedGraph
    program: Program
    description: str
    how: str
    draw: Callable[[int, torch.Generator], Drawn]
    made: dict[str, Any] = field(default_factory=dict)

    def sample(self, n: int, seed: int = 0) -> ComponentSample:
        """Fresh series; those with a seed below 2**32 were never trained on.

        Raises:
            ArgumentError: fewer than one, or a negative seed.
        """
        if n < 1 or seed < 0:
            raise ArgumentError(f"expected n of at least 1 and a seed from 0 on, got {n}, {seed}")
        series, factors = self.draw(n, torch.Generator().manual_seed(seed))
        return ComponentSample(series, self.program.run(factors), factors)

    def pairs(self, n: int, seed: int = 0) -> Pairs:
        """Clean series, each with a corrupted one of another class; the target is the clean class.

        Args:
            n: pairs.
            seed: of both.
        """
        clean = self.sample(n, seed)
        generator = torch.Generator().manual_seed(seed + 1_000_003)
        corrupted, predicted = torch.empty_like(clean.series), torch.full((n,), -1)
        for _ in range(_MOST_DRAWS):
            series, factors = self.draw(n, generator)
            labels = self.program.run(factors)
            fits = (labels != clean.labels) & (predicted < 0)
            corrupted[fits], predicted[fits] = series[fits], labels[fits]
            if bool((predicted >= 0).all()):
                break
        else:
            raise ArgumentError(f"no partners of another class after {_MOST_DRAWS} draws")
        made = {"how": "another class", "task": self.name, "seed": seed}
        return Pairs(clean.series, corrupted, clean.labels, predicted=predicted, made=made)

    def verify(self, n: int = 500, seed: int = 0) -> Verification:
        """Does the graph hold under interchange interventions on series of this seed?

        A method that is scored on a task whose graph does not hold is scored against nothing, so
        look at ``holds`` first. What can mislead: agreement in the class says nothing about sizes;
        a node outside may move the logits a little and stay unseen.

        Args:
            n: pairs of series.
            seed: of the series.

        Source: Geiger et al. 2021 (arXiv 2106.02997); Gupta et al. 2024 (arXiv 2407.14494).
        """
        base, source = self.sample(n, seed), self.sample(n, seed + 500_009)
        pair = ((base.series, base.factors), (source.series, source.factors))
        return verify(self.model, self.program, *pair, seed)

    def __repr__(self) -> str:
        cfg = self.model.cfg
        return (
            f"ComponentTask({self.name!r}, {cfg.norm_position}-norm, {self.how}, "
            f"{len(self.graph.nodes)} nodes, {len(self.graph.edges)} edges)"
        )


@dataclass(frozen=True)
class _Recipe:
    """How a task is made."""

    description: str
    program: Callable[[], Program]
    edges: tuple[str, ...]
    draw: Callable[[int, torch.Generator], Drawn]
    make: Callable[..., HookedTST]
    by_hand: bool


_RECIPES = {
    "compare-windows": _Recipe(
        "Is the mean of channel 0 in one window above that of channel 1 in a later one?",
        handwritten.compare_program,
        handwritten.COMPARE_EDGES,
        handwritten.draw_compare,
        handwritten.compare_model,
        True,
    ),
    "same-trend": _Recipe(
        "Do two patches go the same way?",
        handwritten.same_program,
        handwritten.SAME_EDGES,
        handwritten.draw_same,
        handwritten.same_model,
        True,
    ),
    "marked-sample": _Recipe(
        "Is channel 0 positive at the sample that channel 1 marks?",
        handwritten.marked_program,
        handwritten.MARKED_EDGES,
        handwritten.draw_marked,
        handwritten.marked_model,
        True,
    ),
    "both-motifs": _Recipe(
        "Is there a bump in channel 0 in one window and one in channel 1 in another?",
        trained.both_program,
        trained.BOTH_EDGES,
        trained.draw_both,
        trained.both_model,
        False,
    ),
    "unlike-or-high": _Recipe(
        "Do two patches go different ways, or is a third one high?",
        trained.unlike_program,
        trained.UNLIKE_EDGES,
        trained.draw_unlike,
        trained.unlike_model,
        False,
    ),
}


def component_names() -> list[str]:
    """The names that `component_task` knows.

    Example:
        >>> component_names()[0]
        'compare-windows'
    """
    return list(_RECIPES)


def component_task(name: str, seed: int = 0, *, progress: bool = True) -> ComponentTask:
    """A transformer whose circuit is known.

    It answers whether a method that says *which component* does the work is right. What can
    mislead: these circuits are small and clean. In those written by hand the norms do nothing, and
    all other weights are noise; a method that is right here may still fail on a trained model,
    but one that fails here is not to be trusted.

    Args:
        name: one of `component_names`.
        seed: of the noise on weights written by hand, or of initialisation and training.
        progress: show a bar where the model is trained.

    Returns:
        A ComponentTask: ``model``, ``graph``, ``sample(n, seed)``, ``pairs(n, seed)``,
        ``verify()``.

    Raises:
        UnknownNameError: no task of this name.
        ArgumentError: a negative seed.

    Source: Gupta et al. 2024, InterpBench (arXiv 2407.14494), for the trained ones.

    Example:
        >>> task = component_task("same-trend")
        >>> task
        ComponentTask('same-trend', post-norm, written by hand, 5 nodes, 5 edges)
        >>> task.verify(n=100).holds
        True
    """
    if name not in _RECIPES:
        raise UnknownNameError(name, _RECIPES, "this names a task with a known circuit")
    if seed < 0:
        raise ArgumentError(f"seed: expected 0 or more, got {seed}")
    recipe = _RECIPES[name]
    program = recipe.program()
    nodes = (*(f"pos{pos}" for pos in sorted(program.positions)), *program.nodes)
    model = recipe.make(seed) if recipe.by_hand else recipe.make(seed, progress=progress)
    return ComponentTask(
        name,
        model,
        PlantedGraph(nodes, recipe.edges, recipe.by_hand),
        program,
        recipe.description,
        "written by hand" if recipe.by_hand else "trained by interchange intervention",
        recipe.draw,
        {"name": name, "seed": seed},
    )
