"""Family ``conv-tst``: :class:`tstlens.training.ConvTST`, live or as a state dict.

A convolution stem with batch norm and ReLU, learned positions, ``torch.nn`` encoder layers, max
pooling and a linear classifier; also the classifier of arXiv 2511.21514. From a state dict every
size is read off the shapes except the head count, which no shape tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from tstlens.errors import ArgumentError, StateDictError
from tstlens.model import ConvStemConfig, HeadConfig, HookedTST, HookedTSTConfig
from tstlens.training.conv_tst import ConvTST, ConvTSTConfig
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import TORCH_LAYER, check_keys, fill, torch_layer_taps
from tstlens.zoo.parity import Trial, run_model, series_trials
from tstlens.zoo.registry import Built, Family, register


def build(
    source: ConvTST | Mapping[str, Tensor],
    n_heads: int | None = None,
    n_time: int | None = None,
    strides: tuple[int, ...] | None = None,
    pooling: Literal["max", "mean", "last"] | None = None,
    activation: Literal["relu", "gelu"] | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert a ConvTST.

    Args:
        source: the module or its state dict.
        n_heads: attention heads (state dict only, needed there).
        n_time: samples of a series (state dict only; needed where the stem has strides).
        strides: of the stem's stages (state dict only; 1 where not given).
        pooling: over positions (state dict only; ``"max"`` where not given).
        activation: of the MLPs (state dict only; ``"relu"`` where not given).
        class_names: one name per logit.
    """
    told = {"n_heads": n_heads, "n_time": n_time, "strides": strides, "pooling": pooling}
    told["activation"] = activation
    told = {name: value for name, value in told.items() if value is not None}
    if isinstance(source, Mapping):
        source = _rebuild(source, told)
        name = "ConvTST rebuilt from a state dict"
    else:
        if told:
            raise ArgumentError(
                f"{', '.join(told)}: a live ConvTST knows these itself; leave them out"
            )
        name = "tstlens.training.ConvTST"
    sizes: Any = source.config
    first: Any = source.transformer_encoder.layers[0]
    cfg = HookedTSTConfig(
        n_layers=sizes.n_layers,
        d_model=sizes.d_model,
        n_heads=sizes.n_heads,
        d_mlp=sizes.d_mlp,
        embed=ConvStemConfig(
            channels=sizes.conv_channels,
            kernel_sizes=sizes.kernel_sizes,
            strides=sizes.strides,
            paddings=tuple(kernel // 2 for kernel in sizes.kernel_sizes),
        ),
        head=HeadConfig(pooling=sizes.pooling, n_classes=sizes.n_classes),
        n_channels=sizes.n_channels,
        n_time=sizes.n_time,
        positions="learned",
        act_fn=sizes.activation,
        norm_position="pre" if sizes.norm_first else "post",
        final_norm=sizes.norm_first,
        eps=first.norm1.eps,
        class_names=class_names,
    )
    weight = source.classifier.weight
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    _fill_model(model, source)
    trials = tuple(
        Trial(name, tensors, run_model, run)
        for name, tensors in series_trials(sizes.n_channels, sizes.n_time, masked=True)
    )
    return Built(model, source, trials, name)


def run(source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's logits."""
    return source(series, mask)


def _fill_model(model: HookedTST, source: ConvTST) -> None:
    stem: Any = model.embed
    for number, stage in enumerate(stem.stages, start=1):
        conv = source.get_submodule(f"conv{number}")
        norm = source.get_submodule(f"bn{number}")
        fill(stage.conv, conv.state_dict())
        stage.norm.load_state_dict(norm.state_dict())
    fill(model.pos_embed, {"W_pos": source.pos_enc[0]})
    for block, layer in zip(model.blocks, source.transformer_encoder.layers, strict=True):
        TORCH_LAYER.fill(block, layer.state_dict())
    final_norm: Any = source.transformer_encoder.norm
    if final_norm is not None:
        fill(model.ln_final, {"w": final_norm.weight, "b": final_norm.bias})
    fill(model.head, {"W_U": source.classifier.weight.T, "b_U": source.classifier.bias})


def _rebuild(state: Mapping[str, Tensor], told: dict[str, Any]) -> ConvTST:
    if "n_heads" not in told:
        raise ArgumentError(
            "the shapes of a conv-tst state dict do not tell the head count; give n_heads="
        )
    sizes = _read_sizes(state, told)
    source = ConvTST(ConvTSTConfig(**sizes))
    expected = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name in state or not name.endswith("num_batches_tracked")
    }
    check_keys(state, expected, "conv-tst")
    source = source.to(dtype=state["classifier.weight"].dtype)
    source.load_state_dict(dict(state), strict=False)
    return source.eval()


def _read_sizes(state: Mapping[str, Tensor], told: dict[str, Any]) -> dict[str, Any]:
    try:
        stages = sum(name.startswith("conv") and name.endswith(".weight") for name in state)
        convs = [state[f"conv{number}.weight"] for number in range(1, stages + 1)]
        layers = {
            int(name.split(".")[2]) for name in state if name.startswith("transformer_encoder.lay")
        }
        n_pos = state["pos_enc"].shape[1]
        strides = tuple(told.get("strides") or (1,) * stages)
        if any(stride != 1 for stride in strides) and "n_time" not in told:
            raise ArgumentError(
                f"with strides {strides} the {n_pos} positions do not tell the length of a "
                "series; give n_time="
            )
        return {
            "n_channels": convs[0].shape[1],
            "n_time": told.get("n_time", n_pos),
            "n_classes": state["classifier.weight"].shape[0],
            "conv_channels": tuple(conv.shape[0] for conv in convs),
            "kernel_sizes": tuple(conv.shape[2] for conv in convs),
            "strides": strides,
            "n_heads": told["n_heads"],
            "d_mlp": state["transformer_encoder.layers.0.linear1.weight"].shape[0],
            "n_layers": len(layers),
            "pooling": told.get("pooling", "max"),
            "activation": told.get("activation", "relu"),
            "norm_first": "transformer_encoder.norm.weight" in state,
        }
    except (KeyError, IndexError, AttributeError) as error:
        raise StateDictError(
            f"this state dict does not fit family 'conv-tst': {error} is missing or misshapen; "
            f"its first entries are {', '.join(list(state)[:4]) or 'none'}"
        ) from error


def recognises(source: nn.Module) -> bool:
    """Whether a module is a ConvTST whose forward pass is ours."""
    return isinstance(source, ConvTST) and type(source).forward is ConvTST.forward


def taps(source: ConvTST, model: HookedTST) -> list[Tap]:
    """Where a ConvTST computes our activations."""
    stages = [
        Tap(f"embed.stages.{number - 1}.hook_pre", f"bn{number}")
        for number in range(1, len(source.config.strides) + 1)
    ]
    return stages + torch_layer_taps("transformer_encoder.layers", model)


register(
    Family(
        name="conv-tst",
        recognises=recognises,
        build=build,
        takes_state_dict=True,
        run=run,
        taps=taps,
    )
)
