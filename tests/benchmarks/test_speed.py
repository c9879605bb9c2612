"""How fast sweeps and forward passes are, as ratios measured in one run."""

from __future__ import annotations

import itertools

import torch

import tstlens
from tstlens import patching
from tstlens.training import ConvTST

from .conftest import Ratios, seconds, side_by_side

LAYERS, HEADS, POSITIONS = range(3), range(8), range(25)
TARGET = torch.tensor([3])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    clean, corrupted = torch.randn(2, 1, 12, 25, generator=torch.Generator().manual_seed(0))
    return clean, corrupted


@torch.no_grad()
def serial_loop(model: tstlens.HookedTST, clean, corrupted, metric) -> torch.Tensor:
    """One forward pass per site with the clean run cached: what a careful user writes."""
    values = torch.zeros(3, 8, 25)
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))
    for layer, head, pos in itertools.product(LAYERS, HEADS, POSITIONS):

        def hook(z, hook, head=head, pos=pos):
            z[:, pos, head] = cache[hook.name][:, pos, head]
            return z

        name = f"blocks.{layer}.attn.hook_z"
        values[layer, head, pos] = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, hook)]))
    return values


@torch.no_grad()
def two_passes_per_site(source: ConvTST, clean, corrupted, metric) -> torch.Tensor:
    """The reference's algorithm: for every site run the clean series again, then patch.

    On plain PyTorch modules with forward hooks, at slices of the attention's output.
    """
    values = torch.zeros(3, 8, 25)
    for layer, head, pos in itertools.product(LAYERS, HEADS, POSITIONS):
        attention = source.transformer_encoder.layers[layer].self_attn
        kept = {}

        def keep(module, inputs, output, kept=kept):
            kept["out"] = output[0].clone()

        def replace(module, inputs, output, kept=kept, head=head, pos=pos):
            out = output[0].clone()
            run = slice(16 * head, 16 * head + 16)
            out[:, pos, run] = kept["out"][:, pos, run]
            return (out, *output[1:])

        handle = attention.register_forward_hook(keep)
        source(clean)
        handle.remove()
        handle = attention.register_forward_hook(replace)
        values[layer, head, pos] = metric(source(corrupted))
        handle.remove()
    return values


def test_sweep_against_serial_loops(
    benchmark, model: tstlens.HookedTST, source: ConvTST, ratios: Ratios
) -> None:
    clean, corrupted = pair()
    metric = patching.log_prob(TARGET)
    axes = ("layer", "head", "pos")

    def heads() -> torch.Tensor:
        return patching.sweep(
            model, clean, corrupted, "z", axes, metric, progress=False
        ).values[0]  # fmt: skip

    def slices() -> torch.Tensor:
        return patching.sweep(
            model, clean, corrupted, "attn_out", ("layer", "slice", "pos"), metric,
            n_slices=8, progress=False,
        ).values[0]  # fmt: skip

    expected = serial_loop(model, clean, corrupted, metric)
    torch.testing.assert_close(heads(), expected, atol=1e-5, rtol=0)
    expected = two_passes_per_site(source, clean, corrupted, metric)
    torch.testing.assert_close(slices(), expected, atol=1e-5, rtol=0)

    ours = seconds(heads, 15)
    serial = seconds(lambda: serial_loop(model, clean, corrupted, metric), 2)
    reference = seconds(lambda: two_passes_per_site(source, clean, corrupted, metric), 2)
    ratios.add(
        "sweep of 600 worlds: serial loop with a cached clean run", serial / ours, ">= 12, 40"
    )
    ratios.add(
        "sweep of 600 worlds: two full forward passes per site", reference / ours, ">= 25, 80"
    )
    benchmark(heads)
    benchmark.extra_info.update(serial_s=serial, reference_s=reference, ours_s=ours)


@torch.no_grad()
def test_forward_against_the_source(
    benchmark, model: tstlens.HookedTST, source: ConvTST, ratios: Ratios
) -> None:
    series = torch.randn(256, 12, 25)
    torch.testing.assert_close(model(series), source(series), atol=1e-4, rtol=0)
    ours, theirs, cached = side_by_side(
        lambda: model(series),
        lambda: source(series),
        lambda: model.run_with_cache(series),
        rounds=25,
    )
    ratios.add("forward without hooks / source in eval mode, batch 256", ours / theirs, "<= 1.2")
    ratios.add("run_with_cache of everything / forward, batch 256", cached / ours, "<= 2")
    benchmark(lambda: model(series))
    benchmark.extra_info.update(source_s=theirs, ours_s=ours, cached_s=cached)
