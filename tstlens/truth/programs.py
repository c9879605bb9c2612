"""What a planted model computes, in words that a person can check: variables and their parents.

A program works on *factors*, what a series was drawn from (the level of a window, the direction of
a trend), and gives each node of the circuit a value. Replacing a value by that of another series
says what the model has to answer when the node's activation is replaced likewise: an interchange
intervention.

Circuits with every weight written by hand stand under a little noise on all weights. The norms
have an eps of 1e12 and a gain of 1e6 and so pass values through unchanged to float precision; what
a head reads and writes can be seen from the weights alone. All components outside the circuit are
busy: they write what they see into dimensions that hardly anything reads, so that the size of an
activation says nothing. The noise lets them have some small effect, as in a trained model, so that
no method is right merely because all else is exactly zero. Both are drawn from the seed: other
seeds are other models.

A component is a head (its z at all positions), an MLP (what it writes), or the embedding at some
positions, which for front ends whose positions do not overlap is a piece of the series.

Source: Geiger et al. 2021 (arXiv 2106.02997), Geiger et al. 2022 (arXiv 2112.00826).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.model.config import HookedTSTConfig
from tstlens.model.hooked_tst import HookedTST
from tstlens.model.parts import HeadConfig, LinearPatchesConfig, PerStepConfig
from tstlens.shapes import Series

Values = Mapping[str, Tensor]  # name of a factor or node -> int [series]


@dataclass(frozen=True)
class Variable:
    """What one node of the circuit stands for.

    Args:
        node: its name in a component graph: ``"L0H1"``, ``"L1MLP"``.
        value: from factors and earlier variables to int [series].
        means: in words.
    """

    node: str
    value: Callable[[Values], Tensor]
    means: str


@dataclass(frozen=True)
class Program:
    """Variables in the order in which they are computed; the last one is the class.

    Args:
        variables: one per head and MLP of the circuit.
        factors: factor -> positions of the embedding that carry it, and no others.

    Example:
        >>> both = Variable("L1MLP", lambda v: v["a"] * v["L0H0"], "a and b")
        >>> second = Variable("L0H0", lambda v: v["b"], "b")
        >>> program = Program((second, both), {"a": (0,), "b": (1,)})
        >>> base, source = ({"a": torch.tensor([1]), "b": torch.tensor([b])} for b in (0, 1))
        >>> program.run(base), program.run(base, source, {"L0H0": torch.tensor([True])})
        (tensor([0]), tensor([1]))
    """

    variables: tuple[Variable, ...]
    factors: dict[str, tuple[int, ...]]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Heads and MLPs of the circuit."""
        return tuple(variable.node for variable in self.variables)

    @property
    def positions(self) -> frozenset[int]:
        """Positions that carry a factor."""
        return frozenset(pos for carrying in self.factors.values() for pos in carrying)

    def values(self, factors: Values) -> dict[str, Tensor]:
        """The value of every factor and variable, without interventions."""
        return self._values(factors, {}, {})

    def run(
        self, factors: Values, source: Values | None = None, swapped: Values | None = None
    ) -> Tensor:
        """The class, where some values are those of other series.

        Args:
            factors: of the series.
            source: factors of the other series; None for no interventions.
            swapped: factor or node -> bool [series], where its value is the other series'.
        """
        other = {} if source is None else self.values(source)
        return self._values(factors, other, swapped or {})[self.variables[-1].node]

    def _values(self, factors: Values, other: Values, swapped: Values) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name in self.factors:
            values[name] = _mixed(factors[name], other, swapped, name)
        for variable in self.variables:
            value = variable.value(values).long()
            values[variable.node] = _mixed(value, other, swapped, variable.node)
        return values


def _mixed(value: Tensor, other: Values, swapped: Values, name: str) -> Tensor:
    if name not in swapped:
        return value
    return torch.where(swapped[name], other[name], value)


Drawn = tuple[Tensor, dict[str, Tensor]]  # series [n, channel, time], factors


@dataclass(frozen=True)
class Recipe:
    """How a task with a known circuit is made.

    Args:
        description: the question that the model answers.
        program: the circuit.
        edges: those that matter, as :class:`~tstlens.truth.PlantedGraph` names them.
        draw: draws series and factors.
        make: the model of a seed; of a seed and ``progress=`` where it is trained.
        by_hand: whether its weights are written by hand.
    """

    description: str
    program: Program
    edges: tuple[str, ...]
    draw: Callable[[int, torch.Generator], Drawn]
    make: Callable[..., HookedTST]
    by_hand: bool


NOISE = 0.03  # standard deviation of what is added to every weight
NOISE_IN_SCORES = 0.01  # the same for queries and keys, whose products are large
BUSY = 0.35  # of the weights of components outside the circuit
_UNREAD = 4  # dimensions that they write to
HARD = 12.0  # a score that leaves e^-12 to all other positions


def _blank(n_pos: int, seed: int, **options: Any) -> HookedTST:
    """A model of zeros with norms that pass everything and one dimension per position."""
    cfg = HookedTSTConfig(
        n_layers=2,
        d_model=n_pos + 10,  # a dimension per position, six for the circuit, four unread
        n_heads=3,
        d_head=4,
        d_mlp=6,
        positions="learned",
        normalization_type="RMS",
        eps=1e12,
        attn_scale=1.0,
        head=HeadConfig("last", n_classes=2),
        seed=seed,
        **options,
    )
    model = HookedTST(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1e6 if name.endswith((".ln1.w", ".ln2.w")) else 0.0)
        for pos in range(n_pos):
            model.pos_embed.W_pos[pos, pos] = 1
    return model


@torch.no_grad()
def _under_noise(model: HookedTST, program: Program, seed: int) -> HookedTST:
    """Let all other components write to the last dimensions, then add noise to every weight."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(model.cfg.n_layers):
        block: Any = model.blocks[layer]
        for head in range(model.cfg.n_heads):
            if f"L{layer}H{head}" not in program.nodes:
                _busy(block.attn.W_V[head], block.attn.W_O[head], generator)
        if f"L{layer}MLP" not in program.nodes:
            _busy(block.mlp.W_in, block.mlp.W_out, generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("pos_embed"):
            size = NOISE_IN_SCORES if name.endswith(("W_Q", "W_K")) else NOISE
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def _busy(read: Tensor, write: Tensor, generator: torch.Generator) -> None:
    read += BUSY * torch.randn(read.shape, generator=generator)
    unread = write[:, -_UNREAD:]
    unread += BUSY * torch.randn(unread.shape, generator=generator)


def _look(attn: Any, head: int, query: int, keys: tuple[int, ...]) -> None:
    """Make a head look from one position at some others, all alike."""
    attn.W_Q[head, query, 0] = HARD
    attn.W_K[head, list(keys), 0] = 1


def _move(attn: Any, head: int, read: int, write: int) -> None:
    """Make a head move one dimension of the stream into another."""
    attn.W_V[head, read, 0] = 1
    attn.W_O[head, 0, write] = 1


# --- compare-windows: pre-norm, one position per sample --------------------------------------

COMPARE_WINDOWS = ((1, 2, 3), (6, 7, 8))
_COMPARE_POS = 10


COMPARE = Program(
    (
        Variable("L0H0", lambda v: v["a"], "mean of channel 0 over the first window"),
        Variable("L0H1", lambda v: v["b"], "mean of channel 1 over the second window"),
        Variable("L1MLP", lambda v: v["L0H0"] > v["L0H1"], "which of the two is higher"),
    ),
    {"a": COMPARE_WINDOWS[0], "b": COMPARE_WINDOWS[1]},
)
COMPARE_EDGES = (
    *(f"pos{pos}->L0H0.v" for pos in COMPARE_WINDOWS[0]),
    *(f"pos{pos}->L0H1.v" for pos in COMPARE_WINDOWS[1]),
    "L0H0->L1MLP",
    "L0H1->L1MLP",
    "L1MLP->output",
)


def draw_compare(n: int, generator: torch.Generator) -> Drawn:
    """Noise; the windows' means are whole numbers, odd in the first and even in the second."""
    series = torch.randn(n, 2, _COMPARE_POS, generator=generator)
    a = 2 * torch.randint(-2, 2, (n,), generator=generator) + 1  # -3, -1, 1, 3
    b = 2 * torch.randint(-1, 2, (n,), generator=generator)  # -2, 0, 2
    for channel, (level, window) in enumerate(zip((a, b), COMPARE_WINDOWS, strict=True)):
        rows = series[:, channel, list(window)]
        centred = 0.3 * (rows - rows.mean(1, keepdim=True))
        series[:, channel, list(window)] = centred + level[:, None]
    return series, {"a": a, "b": b}


@torch.no_grad()
def compare_model(seed: int) -> HookedTST:
    """Two heads average the windows, the last MLP takes the difference both ways round."""
    model: Any = _blank(
        _COMPARE_POS,
        seed,
        n_channels=2,
        n_time=_COMPARE_POS,
        embed=PerStepConfig(),
        norm_position="pre",
        model_name="compare-windows",
    )
    first, second, mean_a, mean_b, down, up = range(_COMPARE_POS, _COMPARE_POS + 6)
    model.embed.W_E[0, first] = model.embed.W_E[1, second] = 1
    last = _COMPARE_POS - 1
    attn = model.blocks[0].attn
    for head, (read, write) in enumerate(((first, mean_a), (second, mean_b))):
        _look(attn, head, last, COMPARE_WINDOWS[head])
        _move(attn, head, read, write)
    _difference(model.blocks[1].mlp, mean_a, mean_b, up, down)
    model.head.W_U[down, 0] = model.head.W_U[up, 1] = 4
    return _under_noise(model, COMPARE, seed)


def _difference(mlp: Any, one: int, other: int, up: int, down: int) -> None:
    """Hidden units for one - other and other - one, written to two dimensions."""
    for unit, (sign, write) in enumerate(((1, up), (-1, down))):
        mlp.W_in[one, unit], mlp.W_in[other, unit] = 2 * sign, -2 * sign
        mlp.W_out[unit, write] = 1


# --- same-trend: post-norm, one position per patch --------------------------------------------

_SAME_POS, SAME_PATCH, _SAME_AT = 6, 4, (1, 4)
_RAMP = torch.tensor([-1.5, -0.5, 0.5, 1.5])


SAME = Program(
    (
        Variable("L0H1", lambda v: v["s"], "trend of patch 1, copied to patch 4"),
        Variable("L0MLP", lambda v: v["L0H1"] == v["t"], "whether both trends are alike"),
        Variable("L1H0", lambda v: v["L0MLP"], "that, moved to the last position"),
    ),
    {"s": (_SAME_AT[0],), "t": (_SAME_AT[1],)},
)
SAME_EDGES = (
    "pos1->L0H1.v",
    "L0H1->L0MLP",
    "pos4->L0MLP",
    "L0MLP->L1H0.v",
    "L1H0->output",
)


def draw_same(n: int, generator: torch.Generator) -> Drawn:
    """Patches with a slope and a level of their own; at two of them the slope's sign counts."""
    slope = torch.empty(n, _SAME_POS).uniform_(0.6, 1.4, generator=generator)
    sign = torch.randint(0, 2, (n, _SAME_POS), generator=generator)
    level = torch.randn(n, _SAME_POS, generator=generator)
    noise = 0.1 * torch.randn(n, _SAME_POS, SAME_PATCH, generator=generator)
    patches = level[..., None] + (2 * sign - 1)[..., None] * slope[..., None] * _RAMP + noise
    return patches.reshape(n, 1, -1), {"s": sign[:, _SAME_AT[0]], "t": sign[:, _SAME_AT[1]]}


@torch.no_grad()
def same_model(seed: int) -> HookedTST:
    """A copying head, an MLP that multiplies signs, a moving head."""
    model: Any = _blank(
        _SAME_POS,
        seed,
        n_channels=1,
        n_time=_SAME_POS * SAME_PATCH,
        embed=LinearPatchesConfig(SAME_PATCH, SAME_PATCH),
        norm_position="post",
        model_name="same-trend",
    )
    trend, copied, alike, evidence = range(_SAME_POS, _SAME_POS + 4)
    model.embed.W_E[..., trend] = (_RAMP / _RAMP.pow(2).sum()).view_as(model.embed.W_E[..., trend])
    attn = model.blocks[0].attn
    _look(attn, 1, _SAME_AT[1], _SAME_AT[:1])
    _move(attn, 1, trend, copied)
    # |t + c| - |t - c| has the sign of t c.
    mlp = model.blocks[0].mlp
    for unit, (of_trend, of_copy) in enumerate(((1, 1), (-1, -1), (1, -1), (-1, 1))):
        mlp.W_in[trend, unit], mlp.W_in[copied, unit] = of_trend, of_copy
        mlp.W_out[unit, alike] = 1 if of_trend == of_copy else -1
    attn = model.blocks[1].attn
    _look(attn, 0, _SAME_POS - 1, _SAME_AT[1:])
    _move(attn, 0, alike, evidence)
    model.head.W_U[evidence, 1], model.head.W_U[evidence, 0] = 3, -3
    return _under_noise(model, SAME, seed)


# --- marked-sample: pre-norm, one position per sample, attention by content -------------------

_MARKED_POS, MARKED_WINDOW = 10, (2, 3, 4, 5, 6, 7)


MARKED = Program(
    (
        Variable("L0H2", lambda v: v["s"], "channel 0 at the marked sample"),
        Variable("L1MLP", lambda v: v["L0H2"], "its sign"),
    ),
    {"s": MARKED_WINDOW},
)
MARKED_EDGES = (
    *(f"pos{pos}->L0H2.{part}" for pos in MARKED_WINDOW for part in "kv"),
    "L0H2->L1MLP",
    "L1MLP->output",
)


def draw_marked(n: int, generator: torch.Generator) -> Drawn:
    """Noise, and in channel 1 one mark within the window; decoy values everywhere else."""
    sign = torch.randint(0, 2, (n,), generator=generator)
    size = torch.empty(n).uniform_(0.7, 1.5, generator=generator)
    series = torch.randn(n, 2, _MARKED_POS, generator=generator)
    series[:, 1] *= 0.1
    rows = torch.arange(n)
    at = MARKED_WINDOW[0] + torch.randint(0, len(MARKED_WINDOW), (n,), generator=generator)
    series[rows, 1, at] = 3
    series[rows, 0, at] = (2 * sign - 1) * size
    return series, {"s": sign}


@torch.no_grad()
def marked_model(seed: int) -> HookedTST:
    """A head that looks for the mark and moves the value beside it; an MLP reads its sign."""
    model: Any = _blank(
        _MARKED_POS,
        seed,
        n_channels=2,
        n_time=_MARKED_POS,
        embed=PerStepConfig(),
        norm_position="pre",
        model_name="marked-sample",
    )
    value, mark, found, nothing, down, up = range(_MARKED_POS, _MARKED_POS + 6)
    model.embed.W_E[0, value] = model.embed.W_E[1, mark] = 1
    attn = model.blocks[0].attn
    attn.W_Q[2, _MARKED_POS - 1, 0] = 1
    attn.W_K[2, mark, 0] = 4 * math.log(2)  # a mark of 3 weighs 2^12 times as much as none
    _move(attn, 2, value, found)
    _difference(model.blocks[1].mlp, found, nothing, up, down)
    model.head.W_U[down, 0] = model.head.W_U[up, 1] = 4
    return _under_noise(model, MARKED, seed)


BY_HAND = {
    "compare-windows": Recipe(
        "Is the mean of channel 0 in one window above that of channel 1 in a later one?",
        COMPARE,
        COMPARE_EDGES,
        draw_compare,
        compare_model,
        True,
    ),
    "same-trend": Recipe(
        "Do two patches go the same way?", SAME, SAME_EDGES, draw_same, same_model, True
    ),
    "marked-sample": Recipe(
        "Is channel 0 positive at the sample that channel 1 marks?",
        MARKED,
        MARKED_EDGES,
        draw_marked,
        marked_model,
        True,
    ),
}

Swaps = Mapping[str, Bool[Tensor, " series"]]  # L0H1, L1MLP -> where it is the source's


def component_nodes(model: HookedTST) -> list[str]:
    """Names of all heads and MLPs, layer by layer."""
    names = []
    for layer in range(model.cfg.n_layers):
        names += [f"L{layer}H{head}" for head in range(model.cfg.n_heads)]
        names.append(f"L{layer}MLP")
    return names


def splice_positions(
    model: HookedTST, base: Series, source: Series, swapped: Bool[Tensor, "series pos"]
) -> Series:
    """The series with the samples of some positions taken from other series."""
    n_time = base.shape[2]
    take = torch.zeros(len(base), n_time, dtype=torch.bool)
    for pos in range(swapped.shape[1]):
        take[:, model.time_cell(pos, n_time)] |= swapped[:, pos, None]
    return torch.where(take[:, None], source, base)


def interchange(
    model: HookedTST, base: Series, source: Series, swaps: Swaps
) -> Float[Tensor, "series class"]:
    """The model's output on ``base`` with some components' outputs those of ``source``.

    Args:
        model: pre-norm or post-norm.
        base: [series, channel, time].
        source: [series, channel, time], row by row the other series.
        swaps: head or MLP -> bool [series]; components that are not named stay the base's own,
            computed from what now reaches them.
    """
    names = [_hook(node) for node in swaps]
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    with model.hooks(fwd_hooks=[(name, keep) for name in dict.fromkeys(names)]):
        model(source)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        layer = hook.name.split(".")[1]
        if hook.name.endswith("hook_mlp_out"):
            take = swaps[f"L{layer}MLP"][:, None, None]
        else:
            heads = [
                swaps.get(f"L{layer}H{head}", torch.zeros(len(base), dtype=torch.bool))
                for head in range(model.cfg.n_heads)
            ]
            take = torch.stack(heads, 1)[:, None, :, None]
        return torch.where(take.to(activation.device), kept[hook.name], activation)

    with model.hooks(fwd_hooks=[(name, replace) for name in dict.fromkeys(names)]):
        return model(base)


def _hook(node: str) -> str:
    layer, _, head = node.removeprefix("L").partition("H")
    if head:
        return f"blocks.{layer}.attn.hook_z"
    return f"blocks.{layer.removesuffix('MLP')}.hook_mlp_out"
