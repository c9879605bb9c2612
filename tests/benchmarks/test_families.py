"""How fast converted foundation models run beside their sources, as ratios measured in one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tstlens
from tests.zoo.sources.moment import MOMENT

from .conftest import Ratios, side_by_side

SIZES = {128: (4, 2), 256: (4, 4), 512: (8, 4)}  # d_model -> heads, layers
AIM = "<= 1.25"


def t5(d_model: int) -> dict[str, Any]:
    heads, layers = SIZES[d_model]
    return {
        "d_model": d_model,
        "d_kv": 64,
        "d_ff": 4 * d_model,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": layers,
    }


def chronos_bolt(d_model: int) -> tuple[Any, torch.Tensor, Callable[[Any, torch.Tensor], Any]]:
    bolt = pytest.importorskip("chronos.chronos_bolt")
    from transformers import T5Config

    own = {
        "context_length": 512,
        "prediction_length": 64,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "quantiles": [level / 10 for level in range(1, 10)],
        "use_reg_token": True,
    }
    config = T5Config(
        **t5(d_model), feed_forward_proj="relu", decoder_start_token_id=0, chronos_config=own
    )
    source = bolt.ChronosBoltModelForForecasting(config).eval()
    series = torch.randn(16, 1, 512)
    return source, series, lambda source, x: source(x[:, 0]).quantile_preds.transpose(1, 2)[:, None]


def moment(d_model: int) -> tuple[Any, torch.Tensor, Callable[[Any, torch.Tensor], Any]]:
    config = {
        "seq_len": 512,
        "patch_len": 8,
        "patch_stride_len": 8,
        "transformer_type": "encoder_only",
        "t5_config": {**t5(d_model), "feed_forward_proj": "gated-gelu", "vocab_size": 8},
    }
    try:
        from momentfm import MOMENTPipeline

        named = {"transformer_backbone": "google/flan-t5-large", "task_name": "reconstruction"}
        source = MOMENTPipeline({**config, **named, "d_model": None}, model_kwargs=dict(named))
        source.init()
    except ImportError:  # the restatement, which computes the same
        source = MOMENT("reconstruction", **config)
    return source.eval(), torch.randn(8, 1, 512), lambda source, x: source(x_enc=x).reconstruction


@torch.no_grad()
@pytest.mark.parametrize("d_model", SIZES)
@pytest.mark.parametrize("family", [chronos_bolt, moment])
def test_forward_against_the_source(
    benchmark, family: Callable[[int], Any], d_model: int, ratios: Ratios
) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, series, run = family(d_model)
        model = tstlens.convert(source)
    expected = run(source, series)
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(model(series), expected, atol=limit, rtol=0)
    ours, theirs = side_by_side(lambda: model(series), lambda: run(source, series), rounds=15)
    ratios.add(f"{family.__name__} forward / source, d_model {d_model}", ours / theirs, AIM)
    benchmark(lambda: model(series))
    benchmark.extra_info.update(source_s=theirs, ours_s=ours)
