"""What forecasts become when the codes of a position are those of another state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.codebooks.regime_result import StateSwap
from tstlens.data import RegimeMachine, RegimeSeries
from tstlens.model import HookedTST

N_PAIRS = 20_000


def swap_states(
    model: HookedTST,
    machine: RegimeMachine,
    data: RegimeSeries,
    known: Bool[Tensor, "n pos"],
    seed: int,
) -> tuple[StateSwap, ...]:
    """Swap codes between series in different states: each codebook alone, then all together.

    Args:
        model: with codebooks on.
        machine: what wrote the series.
        data: the series.
        known: where the state can be known; both series of a swap are, at the position swapped.
        seed: of the pairs.
    """
    hooks = list(model.acts_to_codebooks)
    which = [[hook] for hook in hooks] + ([hooks] if len(hooks) > 1 else [])
    pairs = _pairs(data.states, known, np.random.default_rng(seed))
    shares = _shares(model, machine, data.series)
    return tuple(_swapped(model, machine, data, chosen, pairs, shares) for chosen in which)


def _pairs(
    states: Tensor, known: Tensor, generator: np.random.Generator
) -> list[tuple[int, Int[Tensor, "way run"]]]:
    """Per position: series, source in another state, and a random one in none of the two."""
    found = []
    for pos in range(1, known.shape[1]):
        rows = known[:, pos].nonzero()[:, 0].cpu().numpy()
        if len(rows) < 3:
            continue
        here = states[:, pos].cpu().numpy()
        source, other = generator.permutation(rows), generator.permutation(rows)
        differ = (here[rows] != here[source]) & (here[other] != here[source])
        triples = np.stack([rows, source, other])[:, differ]
        if triples.shape[1]:
            found.append((pos, torch.from_numpy(triples)))
    return found


def _swapped(
    model: HookedTST,
    machine: RegimeMachine,
    data: RegimeSeries,
    hooks: Sequence[str],
    pairs: list[tuple[int, Tensor]],
    shares: Tensor,
) -> StateSwap:
    rows: dict[str, list[Tensor]] = {}
    states = data.states.cpu()
    valid = machine.valid_next
    for pos, (series, source, other) in pairs:
        before = shares[series, pos]
        target = states[source, pos]
        wanted = ~_allowed(valid, before, target)
        series, source, other = (index[wanted] for index in (series, source, other))
        before, target = before[wanted], target[wanted]
        if not len(series):
            continue
        after, control = (
            _with_codes_of(model, machine, data.series, series, giver, hooks, pos)
            for giver in (source, other)
        )
        same_patch = machine.prototype_of[states[series, pos]] == machine.prototype_of[target]
        for name, values in {
            "success": _allowed(valid, after, target),
            "random": _allowed(valid, control, target),
            "source": _allowed(valid, shares[source, pos], target),
            "aliased": same_patch,
            "before": divergence(before, shares[source, pos]),
            "after": divergence(after, shares[source, pos]),
        }.items():
            rows.setdefault(name, []).append(values)
    all_rows = {name: torch.cat(parts).double().numpy() for name, parts in rows.items()}
    aliased = all_rows.get("aliased", np.zeros(0)) > 0

    def mean(name: str, where: np.ndarray | None = None) -> float:
        values = all_rows.get(name, np.zeros(0))
        values = values if where is None else values[where]
        return float(values.mean()) if len(values) else float("nan")

    return StateSwap(
        hooks=tuple(hooks),
        n=len(aliased),
        success=mean("success"),
        random=mean("random"),
        source=mean("source"),
        n_aliased=int(aliased.sum()),
        aliased_success=mean("success", aliased),
        aliased_random=mean("random", aliased),
        before=mean("before"),
        after=mean("after"),
        by_construction=any(_last(model, hook) for hook in hooks),
    )


def _with_codes_of(
    model: HookedTST,
    machine: RegimeMachine,
    series: Tensor,
    rows: Tensor,
    source: Tensor,
    hooks: Sequence[str],
    pos: int,
) -> Float[Tensor, "run prototype"]:
    with model.swap_codes(series[source], list(hooks), pos=pos):
        return _shares(model, machine, series[rows])[:, pos]


def _shares(
    model: HookedTST, machine: RegimeMachine, series: Tensor
) -> Float[Tensor, "n pos prototype"]:
    with torch.no_grad():
        return machine.prototype_shares(model(series)).cpu()


def _allowed(valid: Tensor, shares: Tensor, states: Tensor) -> Bool[Tensor, " run"]:
    """Whether the most probable prototype may follow a state."""
    return valid[states].gather(1, shares.argmax(-1, keepdim=True))[:, 0]


def _last(model: HookedTST, hook: str) -> bool:
    """Whether all that a forecast depends on passes through this hook point at its position."""
    name = f"blocks.{model.cfg.n_layers - 1}."
    return hook in (f"{name}hook_resid_post", f"{name}hook_resid_mid", "ln_final.hook_normalized")


def divergence(one: Float[Tensor, "run p"], other: Float[Tensor, "run p"]) -> Float[Tensor, " run"]:
    """Jensen-Shannon divergence in bits, 0 to 1."""
    middle = (one + other) / 2
    gained = torch.special.xlogy(one, one / middle) + torch.special.xlogy(other, other / middle)
    return torch.nan_to_num(gained).double().sum(-1).clamp(min=0) / (2 * np.log(2))


def code_divergence(
    model: HookedTST,
    machine: RegimeMachine,
    data: RegimeSeries,
    ids: Int[Tensor, "n some_pos"],
    seed: int,
) -> tuple[float, float]:
    """Mean divergence between forecasts at positions that share a code, and at random ones.

    Only the first positions count, as many as there are ids. Pairs are drawn so that each is as
    likely to be the first of a pair as any other.
    """
    shares = _shares(model, machine, data.series)[:, : ids.shape[1]].flatten(0, 1)
    codes = ids.flatten().cpu().numpy()
    generator = np.random.default_rng(seed)
    first = generator.integers(len(codes), size=N_PAIRS)
    anyone = generator.integers(len(codes), size=N_PAIRS)
    order = np.argsort(codes, kind="stable")
    begin = np.searchsorted(codes[order], codes[first], side="left")
    end = np.searchsorted(codes[order], codes[first], side="right")
    like = order[begin + (generator.random(N_PAIRS) * (end - begin)).astype(int)]
    alike, apart = like != first, anyone != first  # not a position with itself
    within = divergence(shares[first[alike]], shares[like[alike]])
    between = divergence(shares[first[apart]], shares[anyone[apart]])
    return float(within.mean()) if len(within) else float("nan"), float(between.mean())
