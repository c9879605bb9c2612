"""Any torch.nn.TransformerEncoder converts exactly, or the option that does not is named."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tstlens
from tstlens.errors import (
    ArgumentError,
    ParityError,
    SeriesShapeError,
    UnknownFamilyError,
    UnsupportedSourceError,
)

OPTIONS = [
    {"norm_first": norm_first, "activation": activation, "bias": bias, "batch_first": batch_first}
    for norm_first in (False, True)
    for activation in ("relu", "gelu")
    for bias in (True, False)
    for batch_first in (True, False)
]


def by_hand(source, embed, head, series, batch_first, causal=False):
    """The whole model as a user of torch would write it."""
    x = embed.eval()(series)
    mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1) if causal else None
    source.eval()
    if batch_first:
        return head(source(x, mask=mask))
    return head(source(x.transpose(0, 1), mask=mask).transpose(0, 1))


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
def test_every_combination_of_options_converts(encoder, ends, options, final_norm):
    norm = nn.LayerNorm(8, bias=options["bias"]) if final_norm else None
    source, parts = encoder(norm=norm, **options), ends()
    series = torch.randn(4, 3, 10)
    model = tstlens.convert(source, example=series, causal=options["bias"], **parts)
    expected = by_hand(
        source, **parts, series=series, batch_first=options["batch_first"], causal=options["bias"]
    )
    torch.testing.assert_close(model(series), expected, rtol=1e-4, atol=1e-5)
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-10
    assert model.cfg.final_norm == final_norm
    double = copy.deepcopy(model).double()(series.double())
    source, parts = source.double(), {name: part.double() for name, part in parts.items()}
    expected = by_hand(
        source,
        **parts,
        series=series.double(),
        batch_first=options["batch_first"],
        causal=options["bias"],
    )
    torch.testing.assert_close(double, expected, rtol=1e-10, atol=1e-10)


@given(
    n_layers=st.integers(1, 3),
    n_heads=st.integers(1, 4),
    d_head=st.integers(1, 5),
    d_mlp=st.integers(1, 9),
    n_time=st.integers(1, 9),
    norm_first=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3]),
)
@settings(max_examples=15)
def test_any_size_converts(
    encoder, ends, n_layers, n_heads, d_head, d_mlp, n_time, norm_first, eps
):
    d_model = n_heads * d_head
    source = encoder(
        n_layers,
        d_model=d_model,
        nhead=n_heads,
        dim_feedforward=d_mlp,
        norm_first=norm_first,
        layer_norm_eps=eps,
    )
    parts, series = ends(d_model), torch.randn(2, 3, n_time)
    model = tstlens.convert(source, **parts)
    expected = by_hand(source, **parts, series=series, batch_first=True)
    torch.testing.assert_close(model(series), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.functional.silu, torch.relu],
    ids=["ReLU", "GELU", "tanh GELU", "SiLU", "silu", "relu"],
)
def test_activations_given_as_functions_or_modules_convert(encoder, ends, activation):
    source, parts, series = encoder(activation=activation), ends(), torch.randn(2, 3, 5)
    model = tstlens.convert(source, **parts)
    expected = by_hand(source, **parts, series=series, batch_first=True)  # with gradients
    torch.testing.assert_close(model(series), expected, rtol=1e-5, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_lines_of_the_readme_run_as_written(tmp_path):
    my_embedding_module = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 64, 1), _Transposed())
    my_head_module = nn.Sequential(nn.Flatten(1), nn.LazyLinear(5))
    my_head_module(torch.zeros(1, 12, 64))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)
    mine = tstlens.convert(encoder, embed=my_embedding_module, head=my_head_module)
    mine.save_pretrained(tmp_path / "my-tst")
    with pytest.raises(ArgumentError, match="embed is a module of your own.*pass it again"):
        tstlens.HookedTST.from_pretrained(tmp_path / "my-tst")
    again = tstlens.HookedTST.from_pretrained(
        tmp_path / "my-tst", embed=my_embedding_module, head=my_head_module
    )
    series = torch.randn(2, 3, 12)
    assert torch.equal(again(series), mine(series))
    assert again.parity == mine.parity
    expected = my_head_module(encoder.eval()(my_embedding_module(series)))
    torch.testing.assert_close(mine(series), expected, rtol=1e-4, atol=1e-5)


class _Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_conversion_leaves_everything_it_was_given_alone(encoder, ends):
    source, parts = encoder().train(), ends()
    source.layers[0].linear1.weight.requires_grad_(False)
    modules = {"source": source, **parts}
    before = {
        f"{name}.{key}": value.clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    names = {name: list(vars(module)) for name, module in modules.items()}
    model = tstlens.convert(source, example=torch.randn(2, 3, 5), **parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(module.training for module in modules.values()) and not model.training
    assert not source.layers[0].linear1.weight.requires_grad
    for name, module in modules.items():
        assert list(vars(module)) == names[name]
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[f"{name}.{key}"])


def with_(change):
    def arrange(source):
        for layer in source.layers:
            change(layer)

    return arrange


def _attention(**options):
    return lambda layer: setattr(
        layer, "self_attn", nn.MultiheadAttention(8, 2, batch_first=True, **options)
    )


class _OtherLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_(_attention(add_bias_kv=True)), "add_bias_kv"),
        (with_(_attention(add_zero_attn=True)), "add_zero_attn"),
        (with_(_attention(kdim=4, vdim=4)), "kdim and vdim"),
        (with_(lambda layer: setattr(layer, "activation", torch.tanh)), "activation.*tanh.*relu"),
        (with_(lambda layer: setattr(layer.norm1, "eps", 1e-3)), "norm1.eps=0.001 and norm2.eps"),
        (lambda source: setattr(source, "norm", nn.RMSNorm(8)), "final norm is RMSNorm"),
        (lambda source: setattr(source, "norm", nn.LayerNorm(8, eps=1e-3)), "eps=0.001.*eps=1e-05"),
        (
            lambda source: setattr(source, "norm", nn.LayerNorm(8, elementwise_affine=False)),
            "weight missing",
        ),
        (
            lambda source: setattr(source.layers[1], "norm_first", True),
            "norm_position is 'post' in layer 0 but 'pre' in layer 1",
        ),
        (
            lambda source: setattr(source.layers[1], "activation", nn.functional.gelu),
            "act_fn is 'relu' in layer 0 but 'gelu' in layer 1",
        ),
        (
            lambda source: source.layers.__setitem__(
                1, _OtherLayer(8, 2, 12, batch_first=True)
            ),
            "expected torch.nn.TransformerEncoderLayer, got _OtherLayer; a subclass",
        ),
        (lambda source: setattr(source, "layers", nn.ModuleList()), "has no layers"),
    ],
    ids=[
        "bias_kv", "zero_attn", "kdim", "activation", "eps", "rms", "final eps", "no weight",
        "norm_first differs", "activation differs", "subclass", "no layers",
    ],
)  # fmt: skip
def test_an_option_that_is_not_covered_is_named(encoder, ends, change, words):
    source = encoder()
    change(source)
    with pytest.raises(UnsupportedSourceError, match=words):
        tstlens.convert(source, **ends())


def test_front_end_and_head_are_needed_and_must_be_modules(encoder, ends, no_shape_checks):
    with pytest.raises(ArgumentError, match="has no front end and no head; give embed= as a torch"):
        tstlens.convert(encoder())
    with pytest.raises(ArgumentError, match="give head= as a torch module.*got function"):
        tstlens.convert(encoder(), embed=ends()["embed"], head=lambda x: x)
    with pytest.raises(ArgumentError, match="takes no heads; it takes embed, head, example"):
        tstlens.convert(encoder(), heads=2, **ends())


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.zeros(5), "expected .batch, channel, time., got .5."),
        (torch.zeros(2, 12), "expected .batch, channel, time., got .2, 12."),
    ],
)
def test_an_example_that_is_no_series_is_refused(encoder, ends, example, words):
    with pytest.raises(SeriesShapeError, match=words):
        tstlens.convert(encoder(), example=example, **ends())


def test_a_front_end_of_another_width_is_refused_when_an_example_shows_it(encoder, ends):
    parts = {**ends(), "embed": ends(6)["embed"]}
    with pytest.raises(SeriesShapeError, match=r"give \[batch, pos, d_model=8\], got \[2, 5, 6\]"):
        tstlens.convert(encoder(), example=torch.randn(2, 3, 5), **parts)


def test_a_subclass_or_a_lone_layer_is_not_recognised(encoder, ends):
    class Mine(nn.TransformerEncoder):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) + 1

    layer = nn.TransformerEncoderLayer(8, 2, 12)
    for source in (Mine(layer, 1, enable_nested_tensor=False), layer, nn.Linear(2, 2)):
        with pytest.raises(UnknownFamilyError, match="conv-tst.*torch-encoder"):
            tstlens.convert(source, **ends())


def test_of_a_model_around_an_encoder_the_error_says_how_the_encoder_converts(encoder, ends):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = encoder()

    with pytest.raises(UnknownFamilyError, match=r"convert\(model.trunk, embed=.* example="):
        tstlens.convert(Classifier())
    tstlens.convert(Classifier().trunk, **ends())


def test_a_source_that_computes_something_else_fails_the_parity_check(encoder, ends):
    source = encoder()
    source.layers[0].register_forward_hook(lambda layer, args, out: out * 1.01)
    with pytest.raises(ParityError, match="does not match its source: DIFFERENT"):
        tstlens.convert(source, **ends())
