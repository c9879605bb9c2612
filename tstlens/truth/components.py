"""``component_task``: a transformer with a known circuit, by name, and whether its graph holds.

The weights of some are written by hand (``programs.py``). Others are trained to have the circuit,
by strict interchange intervention training: every step draws pairs of series, replaces some
components' outputs in one by those of the other, and asks for the class that the program gives
with the same values replaced. Components of the circuit must carry their variable and nothing else
that matters; those outside, replaced likewise, must change nothing. Behaviour alone would leave it
to chance which heads do the work.

Source: Gupta et al. 2024, InterpBench (arXiv 2407.14494); Geiger et al. 2022 (arXiv 2112.00826).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tstlens.arguments import Count, Positive, Seed, checked
from tstlens.data import Pairs
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.model.config import HookedTSTConfig
from tstlens.model.hooked_tst import HookedTST
from tstlens.model.parts import HeadConfig, LinearPatchesConfig, PerStepConfig
from tstlens.shapes import Series
from tstlens.truth.programs import (
    BY_HAND,
    Drawn,
    Program,
    Recipe,
    Values,
    Variable,
    component_nodes,
    interchange,
    splice_positions,
)
from tstlens.truth.training import TRAINING_SEEDS, descend

REQUIRED = 0.99


@dataclass(frozen=True)
class Verification(Labelled):
    """How often the model answers as its program does, intervention by intervention.

    Args:
        accuracy: intervention -> share of pairs with the program's answer: ``"none"``; every node
            and factor of the circuit by itself; ``"any of the circuit"`` (each of them with
            probability 1/2); every node and position outside by itself, which must change nothing;
            ``"all outside"``.
        inside: the interventions on the circuit.
        n_pairs: pairs of series.
        made: how.
    """

    accuracy: dict[str, float]
    inside: tuple[str, ...]
    n_pairs: int
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The lowest accuracy over all interventions."""
        return min(self.accuracy.values())

    @property
    def holds(self) -> bool:
        """Whether every intervention is answered rightly in 99 % of the pairs or more."""
        return self.worst >= REQUIRED

    def entries(self) -> dict[str, Sequence[str]]:
        """The interventions."""
        return {"intervention": list(self.accuracy)}

    def columns(self) -> dict[str, list[Any]]:
        """Whether they are on the circuit, and the accuracy."""
        inside = [name in self.inside for name in self.accuracy]
        return {"inside": inside, "accuracy": list(self.accuracy.values())}

    def __repr__(self) -> str:
        worst = min(self.accuracy, key=self.accuracy.__getitem__)
        return (
            f"Verification({'holds' if self.holds else 'FAILS'}: worst {self.worst:.3f} at "
            f"{worst!r} of {len(self.accuracy)} interventions, {self.n_pairs} pairs)"
        )


@torch.no_grad()
def verify(
    model: HookedTST,
    program: Program,
    base: tuple[Series, Values],
    source: tuple[Series, Values],
    seed: int,
) -> Verification:
    """Every interchange intervention on every pair of a base and a source series."""
    n = len(base[0])
    generator = torch.Generator().manual_seed(seed)
    whole = torch.ones(n, dtype=torch.bool)
    n_pos = model.n_pos(base[0].shape[2]) or 0
    inside = (*program.factors, *program.nodes)
    others = [node for node in component_nodes(model) if node not in program.nodes]
    places = [pos for pos in range(n_pos) if pos not in program.positions]

    def right(swapped: dict[str, Tensor]) -> float:
        wanted, logits = run_both(model, program, base, source, swapped)
        return (logits.argmax(1) == wanted).float().mean().item()

    accuracy = {"none": right({})}
    accuracy |= {name: right({name: whole}) for name in inside}
    some = {name: torch.rand(n, generator=generator) < 0.5 for name in inside}
    accuracy["any of the circuit"] = right(some)
    outside = [*others, *(f"pos{pos}" for pos in places)]
    accuracy |= {name: right({name: whole}) for name in outside}
    accuracy["all outside"] = right(dict.fromkeys(outside, whole))
    accuracy["any outside, any of the circuit"] = right(
        some | {name: torch.rand(n, generator=generator) < 0.5 for name in outside}
    )
    names = ("none", *inside, "any of the circuit")
    return Verification(accuracy, names, n, {"model": model.cfg.model_name, "seed": seed})


def run_both(
    model: HookedTST,
    program: Program,
    base: tuple[Series, Values],
    source: tuple[Series, Values],
    swapped: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The program's class and the model's logits, both with the same things swapped.

    Args:
        model: the model.
        program: what it should compute.
        base: series and their factors.
        source: those that swapped values come from.
        swapped: factor, head, MLP or position (``pos3``) -> bool [series].
    """
    n = len(base[0])
    places = torch.zeros(n, model.n_pos(base[0].shape[2]) or 0, dtype=torch.bool)
    nodes = {}
    for name, rows in swapped.items():
        if name in program.factors:
            places[:, list(program.factors[name])] |= rows[:, None]
        elif name.startswith("pos"):
            places[:, int(name.removeprefix("pos"))] |= rows
        else:
            nodes[name] = rows
    known = {name: rows for name, rows in swapped.items() if name in program.factors}
    known |= {name: rows for name, rows in nodes.items() if name in program.nodes}
    series = splice_positions(model, base[0], source[0], places)
    return program.run(base[1], source[1], known), interchange(model, series, source[0], nodes)


_MOST_CYCLES = 4  # of training, until the circuit holds
_N_ASKED, _ENOUGH = 1000, 0.998  # a margin above what is required on other series


@checked
def fit_interchange(
    model: HookedTST,
    program: Program,
    draw: Callable[[int, torch.Generator], Drawn],
    *,
    steps: Count,
    batch_size: Count = 128,
    lr: Positive = 6e-3,
    seed: Seed = 0,
    progress: bool = True,
) -> Float[np.ndarray, " step"]:
    """Train a model in place to do what a program does, component by component.

    Args:
        model: in whose nodes the program's variables are to live.
        program: the circuit.
        draw: ``draw(n, generator)`` gives series and factors.
        steps: of AdamW, each on fresh series.
        batch_size: pairs per step.
        lr: peak of the one-cycle schedule.
        seed: of series and interventions.
        progress: show a bar.

    Returns:
        The loss of every step (nats). The model is in eval mode.

    Raises:
        ArgumentError: a loss that is no longer finite.
    """
    generator = torch.Generator().manual_seed(TRAINING_SEEDS + seed)
    inside = (*program.factors, *program.nodes)
    outside = [node for node in component_nodes(model) if node not in program.nodes]

    def loss_at(_: int) -> Tensor:
        base, source = draw(batch_size, generator), draw(batch_size, generator)
        n_pos = model.n_pos(base[0].shape[2]) or 0
        places = [f"pos{pos}" for pos in range(n_pos) if pos not in program.positions]
        swapped = _some(inside, batch_size, (0.0, 0.3, 0.6), generator)
        swapped |= _some([*outside, *places], batch_size, (0.0, 0.3, 1.0), generator)
        wanted, logits = run_both(model, program, base, source, swapped)
        return F.cross_entropy(logits, wanted)

    return descend(model, loss_at, steps, lr, "interchange training", progress)


def _fit_until_it_holds(
    model: HookedTST,
    program: Program,
    draw: Callable[[int, torch.Generator], Drawn],
    steps: int,
    seed: int,
    progress: bool,
) -> None:
    """Train, and again for as long while the circuit does not hold on series kept for asking."""
    for cycle in range(_MOST_CYCLES):
        fit_interchange(
            model,
            program,
            draw,
            steps=steps,
            seed=seed + 2 * cycle * TRAINING_SEEDS,
            progress=progress,
        )
        asking = torch.Generator().manual_seed(2 * TRAINING_SEEDS + seed)
        base, source = draw(_N_ASKED, asking), draw(_N_ASKED, asking)
        if verify(model, program, base, source, seed).worst >= _ENOUGH:
            return


def _untrained(**options: Any) -> HookedTST:
    """What the models that are trained to a graph share."""
    head = HeadConfig("mean", n_classes=2)
    shared = {"n_layers": 2, "positions": "learned", "act_fn": "gelu", "head": head}
    return HookedTST(HookedTSTConfig(**shared, **options))


def _some(
    names: Sequence[str], n: int, shares: Sequence[float], generator: torch.Generator
) -> dict[str, Tensor]:
    """name -> bool [series]: each row swaps one of these shares of the names."""
    rows = torch.randint(len(shares), (n,), generator=generator)
    share = torch.tensor(shares)[rows]
    return {name: torch.rand(n, generator=generator) < share for name in names}


# --- both-motifs: pre-norm, one position per sample -------------------------------------------

_BOTH_TIME, BOTH_WINDOWS = 12, ((1, 2, 3), (7, 8, 9))


BOTH = Program(
    (
        Variable("L0H0", lambda v: v["a"], "bump in channel 0, first window"),
        Variable("L0H2", lambda v: v["b"], "bump in channel 1, second window"),
        Variable("L1MLP", lambda v: v["L0H0"] * v["L0H2"], "both of them"),
    ),
    {"a": BOTH_WINDOWS[0], "b": BOTH_WINDOWS[1]},
)
BOTH_EDGES = (
    *(f"pos{pos}->L0H0" for pos in BOTH_WINDOWS[0]),
    *(f"pos{pos}->L0H2" for pos in BOTH_WINDOWS[1]),
    "L0H0->L1MLP",
    "L0H2->L1MLP",
    "L1MLP->output",
)


def draw_both(n: int, generator: torch.Generator) -> Drawn:
    """Noise, the two bumps with probability 0.7 each, and the same bumps in the other channel."""
    series = 0.4 * torch.randn(n, 2, _BOTH_TIME, generator=generator)
    factors = {}
    for channel, (name, window) in enumerate(zip("ab", BOTH_WINDOWS, strict=True)):
        there = (torch.rand(n, generator=generator) < 0.7).long()
        decoy = torch.randint(0, 2, (n,), generator=generator)
        series[:, channel, list(window)] += 2.0 * (2 * there - 1)[:, None]
        series[:, 1 - channel, list(window)] += 2.0 * (2 * decoy - 1)[:, None]
        factors[name] = there
    return series, factors


def both_model(seed: int, steps: int = 600, progress: bool = True) -> HookedTST:
    """A pre-norm transformer with layer norms, trained to the graph."""
    model = _untrained(
        d_model=24,
        n_heads=3,
        d_mlp=48,
        n_channels=2,
        n_time=_BOTH_TIME,
        embed=PerStepConfig(),
        norm_position="pre",
        final_norm=True,
        model_name="both-motifs",
        seed=seed,
    )
    _fit_until_it_holds(model, BOTH, draw_both, steps, seed, progress)
    return model


# --- unlike-or-high: post-norm, one position per patch ----------------------------------------

_UNLIKE_POS, _UNLIKE_PATCH, _UNLIKE_AT = 6, 4, (1, 3, 5)


UNLIKE = Program(
    (
        Variable("L0H1", lambda v: v["s"], "trend of patch 1"),
        Variable("L0H3", lambda v: v["t"], "trend of patch 3"),
        Variable("L0MLP", lambda v: v["L0H1"] != v["L0H3"], "whether they differ"),
        Variable("L1H0", lambda v: v["u"], "whether patch 5 is high"),
        Variable("L1MLP", lambda v: v["L0MLP"] | v["L1H0"], "one or the other"),
    ),
    {name: (pos,) for name, pos in zip("stu", _UNLIKE_AT, strict=True)},
)
UNLIKE_EDGES = (
    "pos1->L0H1",
    "pos3->L0H3",
    "L0H1->L0MLP",
    "L0H3->L0MLP",
    "pos5->L1H0",
    "L0MLP->L1MLP",
    "L1H0->L1MLP",
    "L1MLP->output",
)


def draw_unlike(n: int, generator: torch.Generator) -> Drawn:
    """Every patch has a slope and a level; the sign of two slopes and of one level counts."""
    ramp = torch.linspace(-1.0, 1.0, _UNLIKE_PATCH)
    shape = (n, _UNLIKE_POS)
    slope = torch.randint(0, 2, shape, generator=generator)
    high = (torch.rand(shape, generator=generator) < 0.35).long()
    noise = 0.2 * torch.randn(*shape, _UNLIKE_PATCH, generator=generator)
    patches = (2 * slope - 1)[..., None] * ramp + (2 * high - 1)[..., None] + noise
    first, second, third = _UNLIKE_AT
    factors = {"s": slope[:, first], "t": slope[:, second], "u": high[:, third]}
    return patches.reshape(n, 1, -1), factors


def unlike_model(seed: int, steps: int = 1400, progress: bool = True) -> HookedTST:
    """A post-norm transformer with layer norms, trained to the graph."""
    model = _untrained(
        d_model=32,
        n_heads=4,
        d_mlp=64,
        n_channels=1,
        n_time=_UNLIKE_POS * _UNLIKE_PATCH,
        embed=LinearPatchesConfig(_UNLIKE_PATCH, _UNLIKE_PATCH),
        norm_position="post",
        model_name="unlike-or-high",
        seed=seed,
    )
    _fit_until_it_holds(model, UNLIKE, draw_unlike, steps, seed, progress)
    return model


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

    @checked
    def sample(self, n: Count, seed: Seed = 0) -> ComponentSample:
        """Fresh series; those with a seed below 2**32 were never trained on."""
        series, factors = self.draw(n, torch.Generator().manual_seed(seed))
        return ComponentSample(series, self.program.run(factors), factors)

    @checked
    def pairs(self, n: Count, seed: Seed = 0) -> Pairs:
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

    @checked
    def verify(self, n: Count = 500, seed: Seed = 0) -> Verification:
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


_RECIPES = BY_HAND | {
    "both-motifs": Recipe(
        "Is there a bump in channel 0 in one window and one in channel 1 in another?",
        BOTH,
        BOTH_EDGES,
        draw_both,
        both_model,
        False,
    ),
    "unlike-or-high": Recipe(
        "Do two patches go different ways, or is a third one high?",
        UNLIKE,
        UNLIKE_EDGES,
        draw_unlike,
        unlike_model,
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


@checked
def component_task(name: str, seed: Seed = 0, *, progress: bool = True) -> ComponentTask:
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
    recipe = _RECIPES[name]
    program = recipe.program
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
