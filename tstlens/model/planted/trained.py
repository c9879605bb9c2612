"""Circuits that a transformer is trained to have, by strict interchange intervention training.

Every step draws pairs of series, replaces some components' outputs in one by those of the other,
and asks for the class that the program gives with the same values replaced. Components of the
circuit must carry their variable and nothing else that matters; those outside, replaced likewise,
must change nothing. Behaviour alone would leave it to chance which heads do the work.

Source: Gupta et al. 2024, InterpBench (arXiv 2407.14494); Geiger et al. 2022 (arXiv 2112.00826).
"""

from __future__ import annotations

import math

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
from tstlens.model.planted.verification import run_both

_TRAINING_SEEDS = 2**32  # series for training take seeds from here on


def fit_interchange(
    model: HookedTST,
    program: Program,
    draw,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 3e-3,
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
    losses = []
    for _ in tqdm(range(steps), desc="interchange training", disable=not progress):
        base, source = draw(batch_size, generator), draw(batch_size, generator)
        n_pos = model.n_pos(base[0].shape[2]) or 0
        places = [f"pos{pos}" for pos in range(n_pos) if pos not in program.positions]
        swapped = {name: _some(batch_size, 0.5, 0.6, generator) for name in inside}
        swapped |= {name: _some(batch_size, 0.5, 0.6, generator) for name in (*outside, *places)}
        wanted, logits = run_both(model, program, base, source, swapped)
        loss = nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ArgumentError(f"lr: the loss is no longer finite at step {len(losses)}; try less")
    model.eval()
    return losses


def _some(n: int, share: float, rows: float, generator: torch.Generator) -> Tensor:
    """bool [n]: True with probability ``share`` in a share ``rows`` of the first rows."""
    chosen = torch.rand(n, generator=generator) < share
    return chosen & (torch.arange(n) < rows * n)
