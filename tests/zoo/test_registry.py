"""Families are found by name or by module, and a wrong conversion never gets out."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import tstlens
from tstlens.errors import (
    ArgumentError,
    ConversionError,
    ParityError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.training import ConvTST
from tstlens.zoo import registry
from tstlens.zoo.parity import Trial, check_parity


@pytest.fixture
def register(monkeypatch):
    """Registers a family until the test ends."""

    def add(name, **changes):
        family = dataclasses.replace(registry.known()["conv-tst"], name=name, **changes)
        monkeypatch.setitem(registry.known(), name, family)
        return family

    return add


def test_families_say_what_they_cover():
    known = tstlens.families()
    assert list(known) == sorted(known) and {"conv-tst", "torch-encoder"} <= set(known)
    assert all("\n" not in summary and summary for summary in known.values())


def test_an_unknown_family_names_the_closest(conv_tst):
    with pytest.raises(UnknownFamilyError, match="'conv_tst'; did you mean 'conv-tst'"):
        tstlens.convert(conv_tst().state_dict(), family="conv_tst")
    with pytest.raises(UnknownFamilyError, match="'lstm'; known: chronos"):
        tstlens.convert(conv_tst(), family="lstm")


@pytest.mark.parametrize("name", ["informer", "Autoformer", "patch-tsmixer", "TiRex"])
def test_what_is_known_and_not_converted_says_why(name):
    with pytest.raises(UnsupportedSourceError, match=f"{name} is not converted: .{{30}}"):
        tstlens.convert({}, family=name)


def test_a_live_informer_is_refused_with_the_reason():
    transformers = pytest.importorskip("transformers")
    config = transformers.InformerConfig(
        prediction_length=2,
        context_length=6,
        lags_sequence=[1],
        num_time_features=1,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    with pytest.raises(UnsupportedSourceError, match="draws the keys .* at random, in eval mode"):
        tstlens.convert(transformers.InformerModel(config))


def test_an_unknown_module_lists_what_is_known(conv_tst):
    with pytest.raises(UnknownFamilyError, match=r"torch.nn.modules.linear.Linear.*conv-tst"):
        tstlens.convert(torch.nn.Linear(2, 2))


def test_a_state_dict_needs_its_family(conv_tst, no_shape_checks):
    with pytest.raises(ArgumentError, match="does not tell its family; give family=, one of"):
        tstlens.convert(conv_tst().state_dict())
    with pytest.raises(ArgumentError, match="'torch-encoder' converts live modules only"):
        tstlens.convert(conv_tst().state_dict(), family="torch-encoder")
    with pytest.raises(ArgumentError, match="source as a Module, a dict, .* a path, got 3"):
        tstlens.convert(3, family="conv-tst")


def test_a_family_refuses_a_module_of_another(conv_tst):
    with pytest.raises(UnsupportedSourceError, match="ConvTST is not a 'torch-encoder' model"):
        tstlens.convert(conv_tst(), family="torch-encoder")


def test_a_family_registers_once():
    family = registry.known()["conv-tst"]
    with pytest.raises(ArgumentError, match="'conv-tst' is registered already"):
        registry.register(family)


@pytest.mark.parametrize(
    "harm",
    [
        lambda model: model.blocks[1].attn.W_V.mul_(1.001),
        lambda model: model.blocks[0].attn.b_Q.add_(0.01),
        lambda model: model.ln_final.b.add_(1e-3),
        lambda model: model.pos_embed.W_pos.copy_(model.pos_embed.W_pos.flip(0)),
        lambda model: model.embed.stages[0].norm.running_var.mul_(1.01),
        lambda model: model.head.b_U.add_(1e-3),
        lambda model: model.head.W_U.mul_(float("nan")),
        lambda model: setattr(model.blocks[0].attn, "causal", True),
    ],
    ids=["values", "query bias", "norm", "positions", "batch norm", "head", "nan", "causal"],
)
def test_a_wrong_conversion_is_refused(register, conv_tst, harm):
    real = registry.known()["conv-tst"].build

    def build(source):
        built = real(source)
        with torch.no_grad():
            harm(built.model)
        return built

    register("wrong", build=build)
    with pytest.raises(ParityError, match="DIFFERENT to tstlens.training.ConvTST: float32") as e:
        tstlens.convert(conv_tst(norm_first=True), family="wrong")
    assert isinstance(e.value, ConversionError)


def test_masks_that_are_ignored_are_noticed(register, conv_tst):
    real = registry.known()["conv-tst"].build

    def build(source):
        built = real(source)
        trials = tuple(
            dataclasses.replace(t, run_model=lambda model, x, mask=None: model(x))
            for t in built.trials
        )
        return dataclasses.replace(built, trials=trials)

    register("maskless", build=build)
    with pytest.raises(ParityError, match="padded"):
        tstlens.convert(conv_tst(), family="maskless")


def test_parity_measures_the_difference_that_is_there(conv_tst):
    source = conv_tst()
    model = tstlens.convert(source)
    series = torch.randn(4, 2, 14, dtype=torch.float64)

    def shifted(by):
        trial = Trial("shifted", (series,), lambda m, x: m(x) + by, lambda s, x: s(x))
        return check_parity(model, source, [trial], "a source")

    scale = float(copy.deepcopy(source).eval().double()(series).detach().abs().max())
    for by in (1e-3, 1.0):
        parity = shifted(by)
        assert parity.max_abs_float64 == pytest.approx(by)
        assert parity.max_rel_float64 == pytest.approx(by / scale)
        assert parity.max_abs == pytest.approx(by, rel=1e-2)
        assert not parity.passed and "DIFFERENT to a source" in str(parity)
    assert shifted(0.0).passed and "equal within tolerance" in str(shifted(0.0))
    assert model.cfg.dtype == torch.float32 and source.training  # copies are compared


def test_outputs_of_another_shape_never_match(conv_tst):
    source = conv_tst()
    model = tstlens.convert(source)
    trial = Trial("x", (torch.randn(2, 2, 14),), lambda m, x: m(x)[:, :1], lambda s, x: s(x))
    assert check_parity(model, source, [trial], "s").max_abs == float("inf")


def test_conversion_is_repeatable(conv_tst):
    source = conv_tst()
    one, other = tstlens.convert(source), tstlens.convert(source)
    assert one.parity == other.parity
    series = torch.randn(2, 2, 14)
    assert torch.equal(one(series), other(series))
    assert isinstance(source, ConvTST)
