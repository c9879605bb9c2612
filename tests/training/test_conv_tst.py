"""ConvTST: the published architecture, and padding that cannot be seen."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError, UnknownNameError
from tstlens.training import ConvTST, ConvTSTConfig


def test_the_published_state_dict_loads_strictly_and_gets_361_of_370(reference_folder):
    from aeon.datasets import load_classification

    state = torch.load(reference_folder / "TST_japanesevowels.pth", weights_only=True)
    model = ConvTST(n_channels=12, n_time=25, n_classes=10).eval()
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        series, labels = load_classification("JapaneseVowels", split="test", load_equal_length=True)
    with torch.no_grad():
        predicted = model(torch.tensor(series).float()).argmax(dim=1)
    assert int((predicted == torch.tensor(labels.astype(int))).sum()) == 361


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
def test_what_padding_holds_never_changes_the_logits(fresh, pooling, norm_first):
    model = fresh(pooling=pooling, norm_first=norm_first)
    series = torch.randn(5, 2, 20)
    mask = torch.arange(20) < torch.tensor([20, 13, 8, 1, 19])[:, None]
    other = torch.where(mask[:, None], series, 1e3 * torch.randn(5, 2, 20))
    for training in (False, True):  # batch statistics of the norms are touched while training
        model.train(training)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = model(series, mask=mask)
            torch.manual_seed(0)
            torch.testing.assert_close(model(other, mask=mask), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("length", [7, 18])
def test_a_padded_series_equals_a_shorter_model_on_what_was_observed(
    fresh, pooling, norm_first, strides, length
):
    model = fresh(pooling=pooling, norm_first=norm_first, strides=strides).double().eval()
    shorter = fresh(pooling=pooling, norm_first=norm_first, strides=strides, n_time=length).double()
    state = model.state_dict()
    state["pos_enc"] = state["pos_enc"][:, : shorter.config.n_pos]
    shorter.load_state_dict(state)
    series = torch.randn(4, 2, 20, dtype=torch.float64)
    mask = (torch.arange(20) < length).expand(4, 20)
    expected = shorter.eval()(series[..., :length])
    torch.testing.assert_close(model(series, mask=mask), expected, rtol=1e-10, atol=1e-10)


def test_a_mask_of_everything_observed_changes_nothing(fresh):
    model, series = fresh().double().eval(), torch.randn(3, 2, 20, dtype=torch.float64)
    everything = torch.ones(3, 20, dtype=torch.bool)
    torch.testing.assert_close(model(series, mask=everything), model(series))


@settings(max_examples=40, deadline=None)
@given(
    n_time=st.integers(1, 60),
    strides=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    kernels=st.lists(st.sampled_from([1, 3, 5, 9]), min_size=3, max_size=3),
)
def test_n_pos_is_the_number_of_positions_that_the_convolutions_make(n_time, strides, kernels):
    n_stages = len(strides)
    config = ConvTSTConfig(
        n_channels=1,
        n_time=n_time,
        n_classes=2,
        conv_channels=(4,) * n_stages,
        kernel_sizes=tuple(kernels[:n_stages]),
        strides=tuple(strides),
        n_heads=1,
        d_mlp=4,
        n_layers=1,
    )
    hidden = torch.zeros(1, 1, n_time)
    model = ConvTST(config)
    for number in range(1, n_stages + 1):
        hidden = model.get_submodule(f"conv{number}")(hidden)
    assert hidden.shape[2] == config.n_pos
    assert model.eval()(torch.zeros(2, 1, n_time)).shape == (2, 2)


def test_only_pre_norm_models_have_a_final_norm(fresh):
    assert fresh().transformer_encoder.norm is None
    assert "transformer_encoder.norm.weight" in fresh(norm_first=True).state_dict()


def test_a_config_survives_json(small):
    assert ConvTSTConfig.from_dict(json.loads(json.dumps(small.to_dict()))) == small


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: torch.zeros(4, 20, 2), SeriesShapeError, "series are channel-first, try"),
        (lambda: torch.zeros(4, 3, 20), SeriesShapeError, "3 channels where 2 are needed"),
        (lambda: torch.zeros(4, 2, 21), SeriesShapeError, r"got \[4, 2, 21\]"),
        (lambda: torch.zeros(2, 20), SeriesShapeError, "add the batch axis"),
        (lambda: torch.zeros(4, 2, 20, dtype=torch.int64), SeriesValueError, r"series\.float\(\)"),
    ],
)
def test_series_that_do_not_fit_are_refused_in_words(no_shape_checks, fresh, make, error, words):
    with pytest.raises(error, match=words):
        fresh()(make())


def test_masks_that_do_not_fit_are_refused_in_words(no_shape_checks, fresh):
    model, series = fresh(strides=(1, 2)), torch.zeros(2, 2, 20)
    with pytest.raises(SeriesShapeError, match=r"expected a mask \[batch=2, time=20\]"):
        model(series, mask=torch.ones(2, 19, dtype=torch.bool))
    with pytest.raises(SeriesShapeError, match=r"got torch.float32; .*try mask\.bool\(\)"):
        model(series, mask=torch.ones(2, 20))
    only_the_second = (torch.arange(20) == 1).expand(2, 20)
    with pytest.raises(ArgumentError, match="keeps no observed position"):
        model(series, mask=only_the_second)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n_heads": 5}, "5 does not divide d_model=16"),
        ({"kernel_sizes": (4, 3)}, "expected odd sizes, got 4"),
        ({"strides": (1,)}, "describe the same stages"),
        ({"n_layers": 0}, "n_layers: expected at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(fresh, sizes, words):
    with pytest.raises(ArgumentError, match=words):
        fresh(**sizes)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"pooling": "median"}, "'median'; .*known: max, mean, last"),
        ({"activation": "gelo"}, "did you mean 'gelu'"),
        ({"n_head": 4}, "did you mean 'n_heads'"),
    ],
)
def test_unknown_names_list_the_known_ones(fresh, sizes, words):
    with pytest.raises(UnknownNameError, match=words):
        fresh(**sizes)
