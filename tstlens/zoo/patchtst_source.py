"""Hugging Face PatchTST as a source: recognise, rebuild and run it, and say where it computes what.

Nothing here imports ``transformers`` until a source has to be rebuilt from weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HookedTST
from tstlens.randomness import seeded
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import LayerTable, check_keys, first, second

MODULE = "transformers.models.patchtst.modeling_patchtst"
CLASSES = (
    "PatchTSTModel",
    "PatchTSTForClassification",
    "PatchTSTForPrediction",
    "PatchTSTForRegression",
    "PatchTSTForPretraining",
)


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a PatchTST."""
    return config.get("model_type") == "patchtst"


def load(folder: Path) -> nn.Module:
    """The source from a folder that transformers' ``save_pretrained`` wrote."""
    import json

    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StateDictError(
            f"expected *.safetensors in {folder}, found none; save the model again with "
            "source.save_pretrained(folder)"
        )
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return rebuild(state, config)


def rebuild(state: Mapping[str, Tensor], config: Any, architecture: str | None = None) -> nn.Module:
    """The source from its weights and its config.

    Args:
        state: the whole model's state dict.
        config: a ``PatchTSTConfig``, or its dictionary (``config.json``).
        architecture: the class; by default the config's, or the one that the weights fit.

    Raises:
        ArgumentError: no config, no transformers, or weights that fit several classes.
        StateDictError: weights that fit no class, naming what does not fit.
    """
    try:
        from transformers.models.patchtst import modeling_patchtst
    except ImportError as error:
        raise ArgumentError(
            "rebuilding a PatchTST from weights needs transformers, to check the conversion "
            "against it: pip install transformers"
        ) from error
    settings: Any = _settings(config, modeling_patchtst.PatchTSTConfig)
    named = [architecture] if architecture else list(settings.architectures or [])
    unknown = [name for name in named if name not in CLASSES]
    if unknown:
        raise ArgumentError(
            f"architecture must be one of {', '.join(CLASSES)}, got {', '.join(unknown)}"
        )
    skeletons = {
        name: _skeleton(getattr(modeling_patchtst, name), settings) for name in named or CLASSES
    }
    fits, problems = [], {}
    for name, skeleton in skeletons.items():
        try:
            check_keys(state, skeleton.state_dict(), "patchtst")
            fits.append(name)
        except StateDictError as error:
            problems[name] = str(error)
    if not fits:
        nearest = min(problems, key=lambda name: len(_strangers(state, skeletons[name])))
        raise StateDictError(f"as a {nearest}: {problems[nearest]}")
    if len(fits) > 1:
        raise ArgumentError(f"these weights fit {' and '.join(fits)}; say which with architecture=")
    with seeded(0):  # of weights that are overwritten
        source = getattr(modeling_patchtst, fits[0])(copy.deepcopy(settings))
    weight = next(tensor for tensor in state.values() if tensor.is_floating_point())
    source.to(dtype=weight.dtype).load_state_dict(dict(state))
    return source.eval()


def _settings(config: Any, made: Any) -> Any:
    if isinstance(config, made):
        return copy.deepcopy(config)
    if isinstance(config, Mapping):
        return made(**{name: value for name, value in config.items() if name != "model_type"})
    raise ArgumentError(
        "the shapes of a PatchTST's state dict do not tell its options; give config=, the "
        f"PatchTSTConfig or the content of its config.json, got {type(config).__name__}"
    )


def _strangers(state: Mapping[str, Tensor], skeleton: nn.Module) -> set[str]:
    return set(state) ^ set(skeleton.state_dict())


def _skeleton(kind: Any, config: Any) -> nn.Module:
    """The class built from its config on no device: names, shapes and classes of modules."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def check_structure(source: Any) -> None:
    """Raise :class:`UnsupportedSourceError` unless every module is what the config builds."""
    skeleton = _skeleton(type(source), source.config)
    expected = {name: type(module) for name, module in skeleton.named_modules()}
    given = dict(source.named_modules())
    for name in [*expected, *given]:
        found = type(given.get(name))
        if found is not expected.get(name):
            theirs = expected[name].__name__ if name in expected else "no module"
            ours = found.__name__ if name in given else "none"
            raise UnsupportedSourceError(
                f"expected {theirs} at {name!r}, as the source's config builds it, got {ours}; a "
                "module that was replaced may compute something else, so it is not converted"
            )
        if "forward" in vars(given[name]):
            raise UnsupportedSourceError(
                f"the forward of {name or 'the model'!r} was replaced on the instance; what it "
                "computes is not known, so it is not converted"
            )
    shapes = {name: weight.shape for name, weight in source.state_dict().items()}
    for name, weight in skeleton.state_dict().items():
        if shapes.get(name) != weight.shape:
            raise UnsupportedSourceError(
                f"expected {name} {list(weight.shape)}, as the source's config builds it, got "
                f"{list(shapes.get(name, ()))}"
            )


def inner(source: Any) -> Any:
    """The ``PatchTSTModel`` of a source."""
    return source if type(source).__qualname__ == "PatchTSTModel" else source.model


def run_source(
    source: Any, series: Tensor, mask: Tensor | None = None, patch_mask: Tensor | None = None
) -> Tensor:
    """The source's output in our layout and units.

    Args:
        source: any of the five classes.
        series: float [batch, channel, time]; NaN is missing.
        mask: bool [batch, time] of observed samples.
        patch_mask: [batch, channel, patch], 1 where pretraining hides a patch; None hides none.
    """
    missing = series.isnan()
    observed = ~missing if mask is None else mask[:, None] & ~missing
    values = series.masked_fill(~observed, 0.0).transpose(1, 2)
    with _hiding(source, patch_mask):
        out = source(
            past_values=values,
            past_observed_mask=observed.to(values.dtype).transpose(1, 2),
            return_dict=True,
        )
    name = type(source).__qualname__
    if name == "PatchTSTForClassification":
        return out.prediction_logits
    if name == "PatchTSTForPretraining":
        return out.prediction_output
    if name == "PatchTSTModel":
        return out.last_hidden_state
    if name == "PatchTSTForRegression":
        found = out.regression_outputs
        if source.distribution_output is None:
            return found
        n_targets = source.config.num_targets
        return torch.stack([part.reshape(-1, n_targets) for part in found], -1)
    if source.distribution_output is None:
        return out.prediction_outputs.transpose(1, 2)
    return _in_units(source, out)


def _in_units(source: Any, out: Any) -> Tensor:
    """The parameters of the distribution that the source makes of its output."""
    parts = list(out.prediction_outputs)  # each [batch, horizon, channel]
    if source.config.distribution_output == "negative_binomial":
        parts[1] = parts[1] + out.scale.log()
    else:
        parts[-2] = parts[-2] * out.scale + out.loc
        parts[-1] = parts[-1] * out.scale
    return torch.stack(parts, -1).transpose(1, 2)


class _Hide(nn.Module):
    """Pretraining's masking with a mask that is given, instead of a random one."""

    def __init__(self, patch_mask: Tensor | None, value: int | float) -> None:
        super().__init__()
        self.patch_mask, self.value = patch_mask, value

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.zeros_like(patches[..., 0], dtype=torch.bool)
        if self.patch_mask is not None:
            hidden = self.patch_mask.bool()
        return patches.masked_fill(hidden[..., None], self.value), hidden


@contextmanager
def _hiding(source: Any, patch_mask: Tensor | None) -> Iterator[None]:
    """A source whose masking, where it has one, is the given one."""
    model = inner(source)
    if not model.do_mask_input:
        yield
        return
    drawn = model.masking
    model.masking = _Hide(patch_mask, source.config.mask_value)
    try:
        yield
    finally:
        model.masking = drawn


def run(source: Any, series: Tensor, mask: Tensor | None) -> Tensor:
    """The source's output by its eager attention, which gives away its patterns."""
    before = source.config._attn_implementation
    source.config._attn_implementation = "eager"
    try:
        return run_source(source, series, mask)
    finally:
        source.config._attn_implementation = before


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a PatchTST computes our activations."""
    prefix = "" if inner(source) is source else "model."

    def rows(seen: Any) -> Tensor:  # [batch, channel, pos, ...] as [row, pos, ...]
        return first(seen).flatten(0, 1) if first(seen).ndim == 4 else first(seen)

    def by_pos(seen: Any) -> Tensor:  # [batch * pos, channel, d_model] as [row, pos, d_model]
        return seen[0].unflatten(0, (-1, n_pos)).transpose(1, 2).flatten(0, 1)

    def statistic(index: int) -> Any:  # [batch, 1, channel] as [batch, channel, 1]
        return lambda seen: seen[index].transpose(1, 2)

    n_pos = inner(source).encoder.positional_encoder.position_enc.shape[0]
    found = [
        Tap("embed.hook_scaled", f"{prefix}scaler", statistic(0)),
        Tap("embed.hook_patches", f"{prefix}patchifier"),
    ]
    if "embed.hook_loc" in model.hook_dict:
        found.append(Tap("embed.hook_loc", f"{prefix}scaler", statistic(1)))
    if "embed.hook_scale" in model.hook_dict:
        found.append(Tap("embed.hook_scale", f"{prefix}scaler", statistic(2)))
    post = model.cfg.norm_position == "post"
    extra = [
        Tap("hook_resid_pre", "", rows, "input"),
        Tap("attn.hook_pattern", "self_attn", second),
        Tap("hook_normalized_resid_post" if post else "hook_resid_post", "", rows),
    ]
    if source.config.channel_attention:
        extra += [
            Tap("hook_channel_attn_out", "self_attn", by_pos, call=1),
            Tap(
                "channel_attn.hook_pattern",
                "self_attn",
                lambda seen: seen[1].unflatten(0, (-1, n_pos)),
                call=1,
            ),
        ]
    own = {part: path for part, path in layer_table(source).rows.items() if "channel" not in part}
    table = LayerTable(own, tuple(extra))
    for layer in range(model.cfg.n_layers):
        path = f"{prefix}encoder.layers.{layer}"
        found += table.find(model, f"blocks.{layer}", path, {"attn": rows, "mlp": rows})
    return found


def layer_table(source: Any) -> LayerTable:
    """Where the weights of a layer are; attention over channels has those over patches again."""
    own, leaf = source.config, ".batchnorm" if source.config.norm_type == "batchnorm" else ""
    names = {"Q": "q_proj", "K": "k_proj", "V": "v_proj", "O": "out_proj"}
    attentions = ("attn", "channel_attn") if own.channel_attention else ("attn",)
    norms = (1, 2, 3) if own.channel_attention else (1, 3)
    return LayerTable(
        {f"{name}.{letter}": f"self_attn.{n}" for name in attentions for letter, n in names.items()}
        | {"mlp.in": "ff.0", "mlp.out": "ff.3"}
        | {f"ln{ours + 1}": f"norm_sublayer{n}{leaf}" for ours, n in enumerate(norms)}
    )
