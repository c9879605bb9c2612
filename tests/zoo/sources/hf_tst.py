"""TimeSeriesTransformers with drawn weights, and series with covariates for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.zoo.claims import scrambled
from tstlens.model import HookedTST

modeling = pytest.importorskip(
    "transformers.models.time_series_transformer.modeling_time_series_transformer"
)

FORECASTER, BARE = "TimeSeriesTransformerForPrediction", "TimeSeriesTransformerModel"
SIZES = {
    "prediction_length": 4,
    "context_length": 9,
    "lags_sequence": [1, 2, 5],
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
TIME = {"num_time_features": 2, "num_dynamic_real_features": 1}
CATEGORIES = {
    "num_static_categorical_features": 2,
    "cardinality": [3, 5],
    "embedding_dimension": [2, 4],
}
EVERYTHING = {**TIME, **CATEGORIES, "num_static_real_features": 2, "input_size": 2}


def make(kind: Any = FORECASTER, **options: Any) -> Any:
    """A source with every weight drawn: attention far from uniform, norms that do something."""
    torch.manual_seed(0)
    config = modeling.TimeSeriesTransformerConfig(**{**SIZES, **options})
    source = scrambled(getattr(modeling, kind)(config), 0.2)
    with torch.no_grad():
        for name, weight in source.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "value_projection.weight")):
                weight.mul_(4.0)
    return source


def covariates(model: HookedTST, batch: int = 3, steps: int | None = None) -> dict[str, Any]:
    """What the model's source needs beside the values, drawn at random."""
    embed: Any = model.cfg.embed
    n_time = embed.past_length + (steps or embed.prediction_length)
    drawn: dict[str, Any] = {
        name: torch.randn(shape, dtype=model.cfg.dtype)
        for name, shape in embed.covariates(batch, n_time).items()
    }
    if embed.categories:
        codes = [torch.randint(size, (batch,)) for size in embed.categories]
        drawn["static_categorical_features"] = torch.stack(codes, 1)
    return drawn


def values(model: HookedTST, batch: int = 3, steps: int | None = None) -> torch.Tensor:
    embed: Any = model.cfg.embed
    n_time = embed.past_length + (steps or embed.prediction_length)
    walk = torch.randn(batch, embed.n_targets, n_time, dtype=model.cfg.dtype).cumsum(-1)
    return 20 * walk + 5


def series(model: HookedTST, batch: int = 3, steps: int | None = None) -> torch.Tensor:
    return model.with_covariates(values(model, batch, steps), covariates(model, batch, steps))
