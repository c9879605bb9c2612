"""Which source families there are and where each lives: the one list of them.

A family is one module of :mod:`tstlens.zoo`. It is imported when a model of it is loaded or
converted; listing the families, or loading a model that none of them made, imports none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One family.

    Args:
        module: its module in ``tstlens.zoo``.
        summary: one line on what it covers.
        parts: the front ends and heads of its own that a saved model may have: kind -> class, or
            ``module:class`` where several families share it.
    """

    module: str
    summary: str
    parts: dict[str, str] = field(default_factory=dict)


FAMILIES = {
    "chronos-2": Entry(
        "chronos_2",
        "Chronos-2 (chronos-forecasting): pipeline.model, live, or weights with config=",
        {"chronos-2-patches": "Chronos2PatchesConfig", "chronos-2-quantiles": "Chronos2HeadConfig"},
    ),
    "chronos-bolt": Entry(
        "chronos_bolt",
        "Chronos-Bolt (chronos-forecasting): pipeline.model, live, or weights with config=",
        {"chronos-bolt-patches": "BoltPatchesConfig", "chronos-bolt-quantiles": "BoltHeadConfig"},
    ),
    "chronos-t5": Entry(
        "chronos_t5",
        "Chronos-T5 (chronos-forecasting): pipeline.model, live, or weights with config=",
        {"chronos-t5-logits": "TokenLogitsConfig", "chronos-t5-tokens": "BinnedTokensConfig"},
    ),
    "conv-tst": Entry(
        "conv_tst",
        "tstlens.training.ConvTST and the classifier of arXiv 2511.21514, live or as a state "
        "dict (then give n_heads=)",
    ),
    "hf-tst": Entry(
        "hf_tst",
        "Hugging Face TimeSeriesTransformer (ForPrediction, Model), live, as a folder, or as a "
        "state dict (then give config=)",
        {
            "lagged-steps": "lagged_steps:LaggedStepsConfig",
            "step-parameters": "lagged_steps:StepParametersConfig",
            "step-stream": "lagged_steps:StepStreamConfig",
        },
    ),
    "itransformer": Entry(
        "itransformer",
        "iTransformer of Time-Series-Library and neuralforecast, live or as a state dict "
        "(n_channels=, n_heads= where they do not tell)",
        {"inverted": "InvertedConfig", "position-head": "PositionHeadConfig"},
    ),
    "moment": Entry(
        "moment",
        "MOMENT (momentfm): reconstruction, forecasting, classification, embedding; live, or "
        "weights with config=",
        {"moment-head": "MomentHeadConfig", "moment-patches": "MomentPatchesConfig"},
    ),
    "mvts": Entry(
        "mvts",
        "mvts_transformer's TSTransformerEncoder and ...Classiregressor, as a state dict "
        "(n_heads=, act_fn= where they are not 8 and 'gelu') or live",
        {"scaled-steps": "parts:ScaledStepsConfig", "flat-head": "parts:FlatHeadConfig"},
    ),
    "patchtst": Entry(
        "patchtst",
        "Hugging Face PatchTST (PatchTSTModel, ForClassification, ForPrediction, "
        "ForRegression, ForPretraining), live, as a folder, or as a state dict (then give config=)",
        {
            "patchtst": "PatchTSTEmbedConfig",
            "patchtst-forecast": "PatchTSTForecastConfig",
            "patchtst-patches": "PatchTSTPatchesConfig",
            "patchtst-regression": "PatchTSTRegressionConfig",
            "patchtst-stream": "PatchTSTStreamConfig",
        },
    ),
    "patchtst-original": Entry(
        "patchtst_original",
        "PatchTST of its authors, neuralforecast and Time-Series-Library, live or as a state "
        "dict (stride=, n_channels=, res_attention= where it does not tell)",
        {"revin-patches": "parts:RevINPatchesConfig"},
    ),
    "timesfm": Entry(
        "timesfm",
        "TimesFM 2.0 (transformers' TimesFmModelForPrediction), live or weights and config=",
        {"timesfm-patches": "TimesFMPatchesConfig", "timesfm-quantiles": "TimesFMHeadConfig"},
    ),
    "timesfm-2.5": Entry(
        "timesfm_25",
        "TimesFM 2.5 (transformers' TimesFm2_5ModelForPrediction), live or weights and config=",
        {
            "timesfm-2.5-patches": "TimesFM25PatchesConfig",
            "timesfm-2.5-quantiles": "TimesFM25HeadConfig",
        },
    ),
    "torch-encoder": Entry(
        "torch_encoder",
        "torch.nn.TransformerEncoder between a front end and a head of your own (give embed= "
        "and head=)",
    ),
    "tsai": Entry(
        "tsai",
        "TST, TSTPlus and PatchTST of tsai, live or as a state dict (n_heads=, act_fn=, "
        "res_attention=, n_time= where it does not tell)",
        {"conv-steps": "parts:ConvStepsConfig"},
    ),
}


def part_kinds() -> list[str]:
    """Every kind of front end and head that the families have."""
    return [kind for entry in FAMILIES.values() for kind in entry.parts]


def part_class(kind: object) -> Any:
    """The config class of a kind of front end or head; None where it is not known."""
    for entry in FAMILIES.values():
        if isinstance(kind, str) and kind in entry.parts:
            module, _, name = entry.parts[kind].rpartition(":")
            return getattr(import_module(f"tstlens.zoo.{module or entry.module}"), name)
    return None


def convert(source: Any, **hints: Any) -> Any:
    """:func:`tstlens.zoo.convert`, for rooms that stand before the zoo."""
    return import_module("tstlens.zoo").convert(source, **hints)
