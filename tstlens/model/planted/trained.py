"""Circuits that a transformer is trained to have, by strict interchange intervention training.

Every step draws pairs of series, replaces some components' outputs in one by those of the other,
and asks for the class that the program gives with the same values replaced. Components of the
circuit must carry their variable and nothing else that matters; those outside, replaced likewise,
must change nothing. Behaviour alone would leave it to chance which heads do the work.

Source: Gupta et al. 2024, InterpBench (arXiv 2407.14494); Geiger et al. 2022 (arXiv 2112.00826).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tstlens.errors import ArgumentError
from tstlens.model.config import HookedTSTConfig
from tstlens.model.hooked_tst import HookedTST
from tstlens.model.parts import HeadConfig, LinearPatchesConfig, PerStepConfig
from tstlens.model.planted.handwritten import Drawn
from tstlens.model.planted.interchange import component_nodes
from tstlens.model.planted.program import Program, Variable
from tstlens.model.planted.verification import run_both, verify
from tstlens.training.diverging import LastGood

_TRAINING_SEEDS = 2**32  # series for training take seeds from here on
_MOST_CYCLES = 4  # of training, until the circuit holds
_N_ASKED, _ENOUGH = 1000, 0.998  # a margin above what is required on other series


def fit_interchange(
    model: HookedTST,
    program: Program,
    draw: Callable[[int, torch.Generator], Drawn],
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 6e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
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
        ArgumentError: fewer than one step, or a loss that is no longer finite.
    """
    if steps < 1 or batch_size < 1:
        raise ArgumentError(
            f"expected steps and batch_size of at least 1, got {steps}, {batch_size}"
        )
    generator = torch.Generator().manual_seed(_TRAINING_SEEDS + seed)
    inside = (*program.factors, *program.nodes)
    outside = [node for node in component_nodes(model) if node not in program.nodes]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    losses: list[float] = []
    good = LastGood(model, lr)
    for _ in tqdm(range(steps), desc="interchange training", disable=not progress):
        base, source = draw(batch_size, generator), draw(batch_size, generator)
        n_pos = model.n_pos(base[0].shape[2]) or 0
        places = [f"pos{pos}" for pos in range(n_pos) if pos not in program.positions]
        swapped = _some(inside, batch_size, (0.0, 0.3, 0.6), generator)
        swapped |= _some([*outside, *places], batch_size, (0.0, 0.3, 1.0), generator)
        wanted, logits = run_both(model, program, base, source, swapped)
        loss = nn.functional.cross_entropy(logits, wanted)
        losses.append(loss.item())
        good.check_loss(losses[-1], f"at step {len(losses)}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if len(losses) % 100 == 0:
            good.keep(f"at step {len(losses)}")
    good.keep("at the end")
    model.eval()
    return losses


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
            seed=seed + 2 * cycle * _TRAINING_SEEDS,
            progress=progress,
        )
        asking = torch.Generator().manual_seed(2 * _TRAINING_SEEDS + seed)
        base, source = draw(_N_ASKED, asking), draw(_N_ASKED, asking)
        if verify(model, program, base, source, seed).worst >= _ENOUGH:
            return


def _some(
    names: Sequence[str], n: int, shares: Sequence[float], generator: torch.Generator
) -> dict[str, Tensor]:
    """name -> bool [series]: each row swaps one of these shares of the names."""
    rows = torch.randint(len(shares), (n,), generator=generator)
    share = torch.tensor(shares)[rows]
    return {name: torch.rand(n, generator=generator) < share for name in names}


# --- both-motifs: pre-norm, one position per sample -------------------------------------------

_BOTH_TIME, BOTH_WINDOWS = 12, ((1, 2, 3), (7, 8, 9))


def both_program() -> Program:
    """Is there a bump in channel 0 in the first window and one in channel 1 in the second?"""
    return Program(
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
    cfg = HookedTSTConfig(
        n_layers=2,
        d_model=24,
        n_heads=3,
        d_mlp=48,
        n_channels=2,
        n_time=_BOTH_TIME,
        embed=PerStepConfig(),
        positions="learned",
        norm_position="pre",
        final_norm=True,
        act_fn="gelu",
        head=HeadConfig("mean", n_classes=2),
        model_name="both-motifs",
        seed=seed,
    )
    model = HookedTST(cfg)
    _fit_until_it_holds(model, both_program(), draw_both, steps, seed, progress)
    return model


# --- unlike-or-high: post-norm, one position per patch ----------------------------------------

_UNLIKE_POS, _UNLIKE_PATCH, _UNLIKE_AT = 6, 4, (1, 3, 5)


def unlike_program() -> Program:
    """Do patches 1 and 3 go different ways, or is patch 5 high?"""
    return Program(
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
    cfg = HookedTSTConfig(
        n_layers=2,
        d_model=32,
        n_heads=4,
        d_mlp=64,
        n_channels=1,
        n_time=_UNLIKE_POS * _UNLIKE_PATCH,
        embed=LinearPatchesConfig(_UNLIKE_PATCH, _UNLIKE_PATCH),
        positions="learned",
        norm_position="post",
        act_fn="gelu",
        head=HeadConfig("mean", n_classes=2),
        model_name="unlike-or-high",
        seed=seed,
    )
    model = HookedTST(cfg)
    _fit_until_it_holds(model, unlike_program(), draw_unlike, steps, seed, progress)
    return model
