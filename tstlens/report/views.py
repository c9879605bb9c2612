"""Other views of a sweep: in probabilities, by part of the model."""

from __future__ import annotations

import dataclasses

import torch

from tstlens.patching import SweepResult


def as_probability(result: SweepResult) -> SweepResult:
    """A sweep of log-probabilities in probabilities, pair by pair."""
    corrupted = result.baseline.exp()
    each = corrupted.view(-1, *(1,) * (result.values.ndim - 1))
    return dataclasses.replace(
        result,
        values=result.values.exp(),
        effects=each * result.effect().expm1(),
        baseline=corrupted,
        clean=result.clean.exp(),
        rounding=None if result.rounding is None else corrupted * result.rounding,
        metric="probability of the target class",
        unit="probability",
        range=(0.0, 1.0),
    )


def by_part(attention: SweepResult, mlp: SweepResult) -> SweepResult:
    """Attention and MLP of every layer as one result with the axis "part", in the model's order."""
    layers = attention.coords["layer"]
    names = [name for layer in layers for name in (f"attention L{layer}", f"MLP L{layer}")]
    return dataclasses.replace(
        attention,
        values=torch.stack([attention.values, mlp.values], 2).flatten(1),
        effects=torch.stack([attention.effect(), mlp.effect()], 2).flatten(1),
        axes=("pair", "part"),
        coords={"pair": attention.coords["pair"], "part": tuple(names)},
        site="attn_out, mlp_out",
    )
