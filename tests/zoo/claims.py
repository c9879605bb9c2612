"""What every converted model has to hold, measured: live hooks, exact sweeps, clean splices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tstlens import patching
from tstlens.model import HookedTST


@torch.no_grad()
def scrambled(source: nn.Module, strength: float = 0.5, seed: int = 0) -> Any:
    """The source with noise on every weight, bias and norm: attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in source.parameters():
        parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
    return source.eval()


def mean_entropy(pattern: Tensor) -> float:
    """Of attention, in parts of a uniform pattern's."""
    entropy = -(pattern * pattern.clamp(min=1e-30).log()).sum(-1).mean()
    return float(entropy / torch.tensor(float(pattern.shape[-1])).log())


def live(model: HookedTST) -> list[str]:
    return [name for name in model.hook_dict if model.why_silent(name) is None]


def dead_hooks(model: HookedTST, series: Tensor, allowed: tuple[str, ...] = ()) -> list[str]:
    """Hook points where an edit does nothing, no gradient comes, or that misstate their axes."""
    clean = model(series)
    generator = torch.Generator().manual_seed(0)
    dead = []
    for name in live(model):
        kept: dict[str, Tensor] = {}

        def shift(activation: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> Tensor:
            kept["here"] = activation.requires_grad_()
            noise = torch.randn(activation.shape, generator=generator, dtype=activation.dtype)
            return activation + noise

        out = model.run_with_hooks(series.clone(), fwd_hooks=[(name, shift)])
        changed = (out - clean).abs().max() > 1e-6 * clean.abs().max()
        (gradient,) = torch.autograd.grad(out.square().sum(), kept["here"], allow_unused=True)
        reached = gradient is not None and bool(gradient.isfinite().all() and gradient.any())
        if not (changed and reached and as_declared(model.point(name), kept["here"])):
            dead.append(name)
    return [name for name in dead if name not in allowed]


def as_declared(point: Any, activation: Tensor) -> bool:
    """Whether an activation has the axes that its hook point declares, of the sizes it knows."""
    known = zip(point.layout, activation.shape, strict=True)
    return all(point.sizes.get(axis, 1 if axis == "1" else size) == size for axis, size in known)


def sweep_error(
    model: HookedTST,
    clean: Tensor,
    corrupted: Tensor,
    site: str,
    axes: tuple[str, ...],
    metric: Any,
    entries: list[tuple[int, ...]],
) -> float:
    """How far a sweep is from the serial loop with run_with_hooks, at some of its entries.

    Axes are ``layer`` and then those of the activation, as the site orders them.
    """
    result = patching.sweep(model, clean, corrupted, site, axes, metric, progress=False)
    values = torch.as_tensor(result.values)
    _, cache = model.run_with_cache(clean)
    worst = 0.0
    for entry in entries:
        layer = entry[0] if axes[0] == "layer" else None
        place = patching.sites.locate(model, patching.Site(site, layer=layer))
        index = dict(zip(axes, entry, strict=True))
        selection = tuple(index.get(axis, slice(None)) for axis in place.axes)

        def put(activation: Tensor, hook: Any, place: Any = place, at: Any = selection) -> Tensor:
            edited = place.by_series(activation.clone())
            edited[(slice(None), *at)] = place.by_series(cache[hook.name])[(slice(None), *at)]
            return edited.reshape(activation.shape)

        out = model.run_with_hooks(corrupted.clone(), fwd_hooks=[(place.template, put)])
        found = entry if layer is None else (result.coords["layer"].index(layer), *entry[1:])
        worst = max(worst, float((values[(slice(None), *found)] - metric(out)).abs().max()))
    return worst


def splicing_changes_then_restores(
    model: HookedTST, series: Tensor, hook: str
) -> tuple[bool, bool]:
    """Whether an SAE and a codebook at a hook point each change the output, and leave no trace."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    before = model(series)
    width = model.run_with_cache(series, names_filter=hook)[1][hook].shape[-1]
    metadata = SAEMetadata(hook_name=hook)
    config = StandardSAEConfig(
        d_in=width, d_sae=2 * width, dtype=str(series.dtype).split(".")[-1], metadata=metadata
    )
    model.add_sae(StandardSAE(config))
    changed = not torch.allclose(model(series), before)
    model.reset_saes()
    coded, restored = coding_changes_then_restores(model, series, hook)
    return changed and coded, torch.equal(model(series), before) and restored


def coding_changes_then_restores(model: HookedTST, series: Tensor, hook: str) -> tuple[bool, bool]:
    """The same of a codebook."""
    from tstlens.codebooks import Codebook, CodebookConfig

    before = model(series)
    width = model.run_with_cache(series, names_filter=hook)[1][hook].shape[-1]
    dtype = str(series.dtype).split(".")[-1]
    model.add_codebook(Codebook(CodebookConfig(d_in=width, n_codes=4, dtype=dtype)), hook=hook)
    changed = not torch.allclose(model(series), before)
    model.reset_codebooks()
    return changed, torch.equal(model(series), before)
