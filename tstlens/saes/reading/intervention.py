"""Taking one latent away, or adding it: dose response, beside random latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.saes.checks import check_at_least, check_data
from tstlens.saes.reading.by_head import by_head
from tstlens.saes.reading.latent_effect import LatentEffect
from tstlens.saes.reading.worlds import Worlds


@checked
def ablate_latent(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    latent: Any,
    *,
    doses: Sequence[float | int] = (0.25, 0.5, 0.75, 1.0),
    n_controls: int = 8,
    max_series: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> LatentEffect:
    """What the output would be with less of one latent.

    A share (``doses``) of the latent's term ``activation * direction`` is subtracted from the
    activation, at every position where it is active; the SAE's error stays in place and everything
    downstream is computed anew. Only series in which the latent is active are used: in the others
    nothing would change. Controls are other latents, ablated in the same series, drawn at random
    among those active in at least half of these series (or, where fewer are, those active in the
    most).

    What can mislead: a latent whose loss others make up for has no effect, and may still be used;
    a control that writes a larger term has a larger effect for that alone.

    Args:
        model: the model.
        sae: a sae-lens SAE of one of its hook points, or a codebook.
        data: series to ablate in.
        latent: which one.
        doses: shares to remove; 1 removes it, above 1 turns it around.
        n_controls: control latents.
        max_series: at most so many series, those where the latent is strongest; None for all.
        seed: of the draw of controls.
        batch_size: worlds per forward pass.

    Returns:
        Outputs per dose and series, with frame and figure.

    Raises:
        ArgumentError: no such latent, one that is never active, or no doses.

    Example:
        >>> from tstlens import saes
        >>> saes.ablate_latent(model, sae, data, 12).to_dataframe()  # doctest: +SKIP
    """
    worlds, latents, strongest = _prepare(
        model, sae, data, latent, doses, n_controls, batch_size, max_series
    )
    order = strongest[:, latent].argsort(descending=True, stable=True)
    chosen = order[strongest[order, latent] > 0][:max_series]
    controls = _controls(strongest[chosen] > 0, latent, n_controls, seed)
    active = latents[worlds.row_index(chosen)]
    outputs = [
        torch.stack(
            [
                worlds.outputs(chosen, -dose * active[:, :, one], _same(one, chosen)).cpu()
                for dose in doses
            ]
        )
        for one in (latent, *controls)
    ]
    return _result("ablation", worlds, data, latent, doses, outputs, controls, chosen, 1.0, seed)


@checked
def steer_latent(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    latent: Any,
    *,
    doses: Sequence[float | int] = (0.5, 1.0, 2.0, 4.0),
    unit: float | int | None = None,
    n_controls: int = 8,
    max_series: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> LatentEffect:
    """What the output would be with more of one latent, at every position.

    ``dose * unit * direction`` is added to the activation at all observed positions. Controls are
    other latents of the SAE, drawn at random among the active ones, with the added vector scaled to
    the same length: so they ask whether *this* direction matters, not how far one has to push.

    What can mislead: a large dose leaves the activations that the model has ever seen, and moves
    the output for that alone: compare with the controls at the same dose.

    Args:
        model: the model.
        sae: a sae-lens SAE of one of its hook points, or a codebook.
        data: series to steer.
        latent: which one.
        doses: multiples of ``unit``; negative ones push the other way.
        unit: activation of one dose; by default the latent's mean activation where it is active
            in the data.
        n_controls: control latents.
        max_series: at most so many series, evenly spaced over the data; None for all.
        seed: of the draw of controls.
        batch_size: worlds per forward pass.

    Returns:
        Outputs per dose and series, with frame and figure.

    Raises:
        ArgumentError: no such latent, one that is never active (give ``unit``), or no doses.

    Example:
        >>> from tstlens import saes
        >>> saes.steer_latent(model, sae, data, 12, doses=(1, 2)).figure()  # doctest: +SKIP
    """
    worlds, latents, strongest = _prepare(
        model, sae, data, latent, doses, n_controls, batch_size, max_series, never=unit is None
    )
    if unit is None:
        values = latents[:, :, latent]
        unit = float(values[values != 0].mean())
    count = min(max_series or len(data), len(data))
    chosen = torch.linspace(0, len(data) - 1, count, dtype=torch.float64).round().long()
    chosen = chosen.to(latents.device)
    controls = _controls((strongest > 0).any(0)[None], latent, n_controls, seed)
    norm = worlds.directions.norm(dim=1)
    n_rows, n_pos = len(chosen) * worlds.rows, latents.shape[1]
    outputs = []
    for one in (latent, *controls):
        size = unit * float(norm[latent] / norm[one].clamp(min=1e-12))
        by_dose = [
            worlds.outputs(chosen, latents.new_full((n_rows, n_pos), d * size), _same(one, chosen))
            for d in doses
        ]
        outputs.append(torch.stack(by_dose).cpu())
    return _result("steering", worlds, data, latent, doses, outputs, controls, chosen, unit, seed)


def _prepare(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    latent: Any,
    doses: Sequence[float | int],
    n_controls: int,
    batch_size: int,
    max_series: int | None,
    never: bool = True,
) -> tuple[Worlds, Tensor, Tensor]:
    check_data(data)
    check_at_least(1, batch_size=batch_size)
    if max_series is not None:
        check_at_least(1, max_series=max_series)
    if not len(doses) or not all(np.isfinite(dose) for dose in doses):
        raise ArgumentError(f"expected at least one finite dose, got {list(doses)}")
    if n_controls < 0:
        raise ArgumentError(f"expected n_controls of at least 0, got {n_controls}")
    n_latents = len(by_head(model, sae).W_dec)
    if isinstance(latent, bool) or not isinstance(latent, int | np.integer):
        raise ArgumentError(f"expected a latent as an integer, got {latent!r}")
    if not 0 <= latent < n_latents:
        raise ArgumentError(f"expected a latent in 0..{n_latents - 1}, got {latent}")
    worlds = Worlds(model, sae, data, batch_size=batch_size)
    strongest = worlds.latents.unflatten(0, (-1, worlds.rows)).amax((1, 2))  # [series, latent]
    if never and not bool((strongest[:, latent] > 0).any()):
        raise ArgumentError(
            f"latent {latent} is never active on these {len(data)} series; choose one with a "
            "density above 0 in features.table(), or give unit= to steer with it all the same"
        )
    return worlds, worlds.latents, strongest


def _same(latent: int, series: Tensor) -> Tensor:
    return torch.full_like(series, latent)


def _controls(active: Tensor, latent: int, n_controls: int, seed: int) -> tuple[int, ...]:
    """Other latents, at random among those active in at least half of the series."""
    share = active.double().mean(0).cpu()
    share[latent] = -1
    candidates = (share >= 0.5).nonzero()[:, 0]
    if len(candidates) < n_controls:
        order = share.argsort(descending=True, stable=True)
        candidates = order[share[order] > 0][:n_controls]
    generator = torch.Generator().manual_seed(seed)
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:n_controls]]
    return tuple(sorted(int(one) for one in drawn))


def _result(
    kind: str,
    worlds: Worlds,
    data: TimeSeriesData,
    latent: int,
    doses: Sequence[float | int],
    outputs: list[Tensor],
    controls: tuple[int, ...],
    chosen: Tensor,
    unit: float,
    seed: int,
) -> LatentEffect:
    forecast = worlds.output.ndim == 3
    n_out = worlds.output.shape[-1]
    known = tuple(getattr(worlds.model.cfg, "class_names", None) or data.class_names)
    names = known if len(known) == n_out and not forecast else None
    chosen = chosen.cpu()
    empty = outputs[0][None][:0]
    return LatentEffect(
        kind=kind,
        latent=int(latent),
        doses=tuple(float(dose) for dose in doses),
        output=outputs[0],
        baseline=worlds.output.cpu()[chosen],
        controls=torch.stack(outputs[1:]) if controls else empty,
        control_latents=controls,
        series=chosen,
        outputs=tuple(names or (str(index) for index in range(n_out))),
        task="forecast" if forecast else "class",
        labels=None if data.labels is None else data.labels.cpu()[chosen],
        unit=float(unit),
        hook=worlds.place.reads,
        made={"seed": seed, "n_series": len(chosen)},
    )
