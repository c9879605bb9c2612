"""How fast SAEs train from a live stream, and how much memory a disk cache takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tstlens

from .conftest import Ratios, side_by_side

saes = pytest.importorskip("tstlens.saes")

HOOK = "blocks.0.hook_mlp_out"
STEPS, BATCH = 40, 512


def trainer_on(stream):
    """sae-lens' own trainer, its own loop, on any data provider."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=128, d_sae=512, k=8))
    return SAETrainer(cfg, sae, stream)


@pytest.mark.parametrize("memory_mb", [512.0, 2.0], ids=["fits in memory", "does not fit"])
def test_training_from_a_live_stream(model: tstlens.HookedTST, ratios: Ratios, memory_mb: float):
    """Each run starts with a new stream, so the first forward passes are part of the time."""
    series = torch.randn(400, 12, 25)
    with torch.no_grad():
        rows = model.run_with_cache(series, names_filter=[HOOK])[1][HOOK].flatten(0, 1).clone()

    def live():
        stream = saes.ActivationStream(model, series, HOOK, batch_size=BATCH, memory_mb=memory_mb)
        trainer_on(stream).fit()

    def from_memory():
        trainer_on(saes.TensorStream(rows, BATCH)).fit()

    slow, fast = side_by_side(live, from_memory, rounds=3)
    where = "kept after the first epoch" if memory_mb > 100 else "forward pass in every epoch"
    ratios.add(f"SAE samples per second, live stream ({where}) / tensor", fast / slow, ">= 0.85x")


def test_a_cache_bigger_than_the_memory_limit_trains_within_it(
    tmp_path: Path, repository: Path, ratios: Ratios
):
    """64 MiB of activations, a limit of 16: the process' peak grows by less than the limit."""
    code = textwrap.dedent(f"""
        import json, resource, torch
        torch.set_num_threads(1)
        from pathlib import Path
        from tstlens import saes
        from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig
        model = HookedTST(HookedTSTConfig(n_layers=1, d_model=256, n_heads=2, d_mlp=64,
            n_channels=3, n_time=32, embed=PerStepConfig(), head=HeadConfig("mean", n_classes=4)))
        series = torch.randn(2048, 3, 32)
        warm = saes.ActivationStream(model, series[:8], "hook_embed", batch_size=256,
            cache=Path(r"{tmp_path}") / "warm", series_per_pass=8)
        saes.fit(warm, d_in=256, d_sae=128, k=4, steps=5, batch_size=256, progress=False)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        stream = saes.ActivationStream(model, series, "hook_embed", batch_size=256, memory_mb=16.0,
            cache=Path(r"{tmp_path}") / "acts", series_per_pass=16)
        saes.fit(stream, d_in=256, d_sae=128, k=4, steps=280, batch_size=256, progress=False)
        size = sum(f.stat().st_size for f in (Path(r"{tmp_path}") / "acts").glob("*.safetensors"))
        print(json.dumps({{"grown": peak() - before, "cache": size / 2**20}}))
    """)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    what = f"peak memory of a {measured['cache']:.0f} MiB cache / its limit of 16 MiB"
    ratios.add(what, measured["grown"] / 16, "<= 1.00x")
    assert measured["cache"] > 60
    assert measured["grown"] <= 16
