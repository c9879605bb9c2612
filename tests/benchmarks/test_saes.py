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
STEPS, BATCH = 80, 512  # four epochs: a real training has hundreds


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


KEPT = {
    "memory": ("kept in memory", ">= 0.85x"),
    "disk": ("kept in a disk cache", ">= 0.85x"),
    "nothing": ("forward pass in every epoch", "no more than the next line"),
}


@pytest.mark.parametrize("kept", KEPT)
def test_training_from_a_live_stream(
    tmp_path_factory: pytest.TempPathFactory, model: tstlens.HookedTST, ratios: Ratios, kept: str
):
    """Each run starts with a new stream, so the first forward passes are part of the time.

    Where nothing is kept the forward pass itself is the limit: its share of the time is measured
    beside the stream, as the ratio that a stream without any cost of its own would reach.
    """
    series = torch.randn(400, 12, 25)
    with torch.no_grad():
        rows = model.run_with_cache(series, names_filter=[HOOK])[1][HOOK].flatten(0, 1).clone()

    def live():
        cache = tmp_path_factory.mktemp("activations") if kept == "disk" else None
        memory_mb = 512.0 if kept == "memory" else 2.0
        stream = saes.ActivationStream(
            model, series, HOOK, batch_size=BATCH, memory_mb=memory_mb, cache=cache
        )
        assert stream.kept_in == kept
        trainer_on(stream).fit()

    def from_memory():
        trainer_on(saes.TensorStream(rows, BATCH)).fit()

    @torch.no_grad()
    def forward_passes():
        for _ in range(STEPS * BATCH // len(rows)):
            model(series, stop_at_layer=1)

    slow, fast, passes = side_by_side(live, from_memory, forward_passes, rounds=3)
    where, aim = KEPT[kept]
    ratios.add(f"SAE samples per second, live stream ({where}) / tensor", fast / slow, aim)
    if kept == "nothing":
        ratios.add(
            "  the same if the stream cost nothing but its passes", fast / (fast + passes), "-"
        )


def test_a_cache_bigger_than_the_memory_limit_trains_within_it(
    tmp_path: Path, repository: Path, ratios: Ratios
):
    """64 MiB of activations, a limit of 16: the peak grows by less than that. Linux only."""
    code = textwrap.dedent(f"""
        import json, torch
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
        def megabytes(what):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
        before = megabytes("VmRSS")
        stream = saes.ActivationStream(model, series, "hook_embed", batch_size=256, memory_mb=16.0,
            cache=Path(r"{tmp_path}") / "acts", series_per_pass=16)
        saes.fit(stream, d_in=256, d_sae=128, k=4, steps=280, batch_size=256, progress=False)
        size = sum(f.stat().st_size for f in (Path(r"{tmp_path}") / "acts").glob("*.safetensors"))
        print(json.dumps({{"grown": megabytes("VmHWM") - before, "cache": size / 2**20}}))
    """)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    what = f"peak memory of a {measured['cache']:.0f} MiB cache / its limit of 16 MiB"
    ratios.add(what, measured["grown"] / 16, "<= 1.00x")
    assert measured["cache"] > 60
    assert measured["grown"] <= 16
