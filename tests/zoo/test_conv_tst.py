"""A converted ConvTST is its source, live or from a state dict."""

from __future__ import annotations

import pytest
import torch

import tstlens
from tstlens.errors import ArgumentError, StateDictError, UnknownFamilyError, UnknownNameError
from tstlens.training import ConvTST


@pytest.fixture(scope="module")
def published(reference_folder):
    return torch.load(reference_folder / "TST_japanesevowels.pth", weights_only=True)


@pytest.fixture(scope="module")
def reference(published):
    return tstlens.convert(published, family="conv-tst", n_heads=8)


def test_the_published_state_dict_converts_within_both_tolerances(reference):
    parity = reference.parity
    assert parity.passed and parity.max_rel <= 1e-5 and parity.max_rel_float64 <= 1e-10
    assert (parity.tolerance, parity.tolerance_float64) == (1e-5, 1e-10)
    cfg = reference.cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_mlp, cfg.n_time) == (3, 128, 8, 256, 25)
    assert (cfg.n_channels, cfg.n_classes, cfg.norm_position, cfg.act_fn) == (
        12,
        10,
        "post",
        "relu",
    )


def test_the_reference_gets_361_of_370_right(reference):
    data = tstlens.load_dataset("JapaneseVowels", split="test")
    with torch.no_grad():
        predicted = reference(data.series).argmax(1) - 1  # its logits go by raw label, 0 unused
    assert len(data) == 370 and int((predicted == data.labels).sum()) == 361


def test_the_reference_equals_torch_modules_put_together_by_hand(reference, published):
    from torch import nn
    from torch.nn import functional

    layer = nn.TransformerEncoderLayer(128, 8, 256, batch_first=True)
    trunk = nn.TransformerEncoder(layer, 3).double().eval()
    prefix = "transformer_encoder."
    trunk.load_state_dict({k[len(prefix) :]: v for k, v in published.items() if prefix in k})
    state = {k: v.double() if v.is_floating_point() else v for k, v in published.items()}
    x = series = torch.randn(5, 12, 25, dtype=torch.float64)
    for number, padding in [(1, 2), (2, 1), (3, 1)]:
        x = functional.conv1d(
            x, state[f"conv{number}.weight"], state[f"conv{number}.bias"], padding=padding
        )
        statistics = [state[f"bn{number}.{name}"] for name in ("running_mean", "running_var")]
        affine = [state[f"bn{number}.{name}"] for name in ("weight", "bias")]
        x = functional.batch_norm(x, *statistics, *affine).relu()
    x = trunk(x.transpose(1, 2) + state["pos_enc"]).amax(1)
    expected = x @ state["classifier.weight"].T + state["classifier.bias"]
    import copy

    ours = copy.deepcopy(reference).double()(series)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("strides", "activation"), [((1, 1), "gelu"), ((2, 3), "relu")], ids=["1,1", "2,3"]
)
@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_live_source_and_its_state_dict_convert_alike(
    conv_tst, norm_first, pooling, strides, activation
):
    options = {"pooling": pooling, "strides": strides, "activation": activation}
    source = conv_tst(norm_first=norm_first, **options)
    model = tstlens.convert(source, class_names=("a", "b", "c"))
    rebuilt = tstlens.convert(
        source.state_dict(), family="conv-tst", n_heads=2, n_time=14, **options
    )
    series = torch.randn(5, 2, 14)
    mask = torch.arange(14) < torch.tensor([14, 9, 7, 10, 13])[:, None]
    source.eval()
    with torch.no_grad():
        for given in (None, mask):
            expected = source(series, given)
            for ours in (model, rebuilt, model.fold_batch_norm()):
                torch.testing.assert_close(ours(series, mask=given), expected, rtol=1e-4, atol=1e-5)
    assert model.parity.passed and any("padded" in name for name in model.parity.inputs)
    assert model.cfg.class_names == ("a", "b", "c")
    assert model.info["family"] == "conv-tst"
    assert not model.training


def test_a_float64_source_stays_float64(conv_tst):
    source = conv_tst().double()
    model = tstlens.convert(source)
    assert model.cfg.dtype == torch.float64
    assert torch.equal(model.W_U, source.classifier.weight.T)
    state = tstlens.convert(source.state_dict(), family="conv-tst", n_heads=2)
    assert state.cfg.dtype == torch.float64


def test_conversion_leaves_the_source_alone_and_shares_nothing(conv_tst):
    source = conv_tst().train()
    source.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    model = tstlens.convert(source)
    assert source.training and not source.conv1.weight.requires_grad
    assert source.classifier.weight.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    state = dict(before)
    tstlens.convert(state, family="conv-tst", n_heads=2)
    assert state.keys() == before.keys()


def test_gradients_agree_with_the_source(conv_tst):
    source = conv_tst(norm_first=True).double().eval()
    model = tstlens.convert(source)
    series = torch.randn(3, 2, 14, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(source(series).square().sum(), series)
    (ours,) = torch.autograd.grad(model(series).square().sum(), series)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def drop(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("classifier.bias"), r"1 missing \(classifier.bias\)"),
        (drop("transformer_encoder.layers.1.norm2.weight"), r"1 missing .*layers.1.norm2.weight"),
        (drop("pos_enc"), r"'pos_enc' is missing or misshapen"),
        (drop("conv1.weight"), r"'conv\d.weight' is missing|missing"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda s: s.update({"conv2.bias": torch.zeros(7)}),
            r"conv2.bias is \[7\], expected \[8\]",
        ),
        (
            lambda s: s.update({"classifier.weight": torch.zeros(3, 9)}),
            r"classifier.weight is \[3, 9\], expected \[3, 8\]",
        ),
        (lambda s: s.update({"pos_enc": torch.zeros(14)}), "missing or misshapen|pos_enc is"),
        (lambda s: s.clear(), r"first entries are none"),
        (
            lambda s: s.update({f"module.{k}": s.pop(k) for k in list(s)}),
            r"first entries are module.pos_enc",
        ),
        (lambda s: s.update(pos_enc=3), r"missing or misshapen|tensors by name, got int"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(conv_tst, change, words, no_shape_checks):
    state = dict(conv_tst().state_dict())
    change(state)
    with pytest.raises(StateDictError, match=words):
        tstlens.convert(state, family="conv-tst", n_heads=2)


def test_a_training_checkpoint_is_not_a_state_dict(conv_tst, no_shape_checks):
    checkpoint = {"model": conv_tst().state_dict(), "epoch": 3}
    with pytest.raises(StateDictError, match="got OrderedDict for 'model'.*the inner"):
        tstlens.convert(checkpoint, family="conv-tst", n_heads=2)


def test_batch_counts_may_be_missing(conv_tst):
    state = {k: v for k, v in conv_tst().state_dict().items() if "num_batches" not in k}
    assert tstlens.convert(state, family="conv-tst", n_heads=2).parity.passed


@pytest.mark.parametrize(
    ("hints", "error", "words"),
    [
        ({}, ArgumentError, r"do not tell the head count; give n_heads="),
        ({"n_heads": 3}, ArgumentError, r"3 does not divide d_model=8"),
        ({"n_heads": 2, "strides": (1, 2)}, ArgumentError, r"give n_time="),
        ({"n_heads": 2, "strides": (1, 1, 1)}, ArgumentError, r"same length"),
        ({"n_heads": 2, "pooling": "median"}, UnknownNameError, r"'median'.*max, mean, last"),
        ({"n_heads": 2, "heads": 2}, ArgumentError, r"takes no heads; it takes n_heads, n_time"),
        ({"n_heads": 2, "class_names": ("a",)}, ArgumentError, r"expected 3 class names"),
        ({"n_heads": 2, "n_time": 99}, (StateDictError, ArgumentError), r"pos_enc|n_time"),
    ],
)
def test_hints_that_do_not_fit_are_refused(conv_tst, hints, error, words, no_shape_checks):
    with pytest.raises(error, match=words):
        tstlens.convert(conv_tst().state_dict(), family="conv-tst", **hints)


def test_a_live_source_knows_its_sizes_itself(conv_tst):
    with pytest.raises(ArgumentError, match="n_heads: a live ConvTST knows these itself"):
        tstlens.convert(conv_tst(), n_heads=2)


def test_a_subclass_with_another_forward_is_not_recognised(conv_tst):
    class Doubled(ConvTST):
        def forward(self, series, mask=None):
            return 2 * super().forward(series, mask)

    with pytest.raises(UnknownFamilyError, match="Doubled.*overrides forward is not recognised"):
        tstlens.convert(Doubled(conv_tst().config))


def test_what_the_config_does_not_say_fails_the_parity_check(conv_tst):
    source = conv_tst()
    for layer in source.transformer_encoder.layers:
        layer.activation = torch.nn.functional.silu
        layer.activation_relu_or_gelu = 0
    with pytest.raises(tstlens.errors.ParityError, match="does not match its source: DIFFERENT"):
        tstlens.convert(source)
