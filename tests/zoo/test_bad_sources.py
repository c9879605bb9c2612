"""Sources and series of the wrong kind: said in words of ours, and nothing is loaded unsafely."""

from __future__ import annotations

import pickle

import pytest
import torch

import tstlens
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    SeriesShapeError,
    SeriesValueError,
    StateDictError,
)
from tstlens.training import ConvTST
from tstlens.zoo.comparing import compare

pytestmark = pytest.mark.usefixtures("no_shape_checks")


@pytest.fixture(scope="module")
def source() -> ConvTST:
    sizes = {"conv_channels": (4,), "kernel_sizes": (3,), "strides": (1,), "n_heads": 1}
    return ConvTST(n_channels=2, n_time=8, n_classes=2, d_mlp=4, n_layers=1, **sizes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: {k: v.numpy() for k, v in w.items()},
            "by name, got ndarray for 'pos_enc'",
        ),
        (
            lambda w: {"state_dict": w},
            "got .*Dict for 'state_dict'.*the inner dict",
        ),
        (lambda w: {1: torch.ones(2)}, "tensors by name, got Tensor for 1"),
        (lambda w: {**w, "pos_enc": None}, "got NoneType for 'pos_enc'"),
    ],
)
def test_state_dicts_of_something_else(source, change, words):
    with pytest.raises(StateDictError, match=words):
        tstlens.convert(change(source.state_dict()), family="conv-tst", n_heads=1)


@pytest.mark.parametrize("held", ["module", "pickle", "text", "nothing"])
def test_a_file_that_is_not_weights_alone_is_never_advised_to_be_loaded_unsafely(
    source, tmp_path, held
):
    place = tmp_path / "weights.pt"
    if held == "module":
        torch.save(source, place)
    else:
        content = {"pickle": pickle.dumps({"a": 1}), "text": b"hello", "nothing": b""}
        place.write_bytes(content[held])
    with pytest.raises(
        CorruptFileError, match=r"torch.save\(source.state_dict\(\), path\)"
    ) as caught:
        tstlens.convert(place, family="conv-tst")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x.double(), SeriesValueError, "expected torch.float32 series"),
        (lambda x: x.transpose(1, 2), SeriesShapeError, "series are channel-first"),
        (lambda x: x[:0], ArgumentError, "at least one series to compare on, got none"),
        (lambda x: x.numpy(), ArgumentError, "series as a Tensor.*try torch.as_tensor"),
    ],
)
def test_series_to_compare_on(source, change, error, words):
    with pytest.raises(error, match=words):
        compare(source, tstlens.convert(source), change(torch.randn(3, 2, 8)))


def test_a_source_that_is_neither_module_nor_weights():
    with pytest.raises(ArgumentError, match="source as a Module, a dict, .* a path, got 3"):
        tstlens.convert(3)
