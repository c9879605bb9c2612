"""Codes, tables and indexes from arguments of the wrong kind: never rounded or broadcast."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tstlens import codebooks
from tstlens.codebooks import Codebook, CodebookConfig, CodeIndex
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, CorruptFileError, TstlensError

pytestmark = pytest.mark.usefixtures("no_shape_checks")

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def data(series) -> TimeSeriesData:
    return TimeSeriesData(series, torch.arange(6) % 4)


@pytest.mark.parametrize(
    ("codes", "where", "words"),
    [
        (1.5, {}, "codes at .* as an integer or several, got 1.5"),
        (np.array([1.5]), {}, "codes at .* as an integer or several"),
        ("3", {}, "as an integer or several, got '3'"),
        (True, {}, "as an integer or several, got True"),
        ([], {}, "at least one code"),
        (16, {}, r"codes in 0\.\.15"),
        (3, {"pos": [0.5]}, "pos as an integer, a slice"),
        (3, {"group": "x"}, "group as an? "),
    ],
)
def test_codes_are_not_rounded(model, series, codes, where, words):
    model.add_codebooks(CodebookConfig(n_codes=16, k=2), [HOOK])
    with pytest.raises(TstlensError, match=words), model.force_codes({HOOK: codes}, **where):
        model(series)
    with model.force_codes({HOOK: np.array([1, 2])}):
        assert torch.isfinite(model(series)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_codes": "8"}, "CodebookConfig.n_codes as an integer of at least 1, got '8'"),
        ({"k": 1.5}, "CodebookConfig.k as an integer of at least 1, got 1.5"),
        ({"normalize": "no"}, "CodebookConfig.normalize as True or False, got 'no'"),
        ({"dtype": "half precision"}, "the name of a floating point dtype.*got 'half precision'"),
        ({"device": "gpu"}, "device as one that this machine has"),
        ({"normalize_activations": "zz"}, "normalize_activations as .none., "),
    ],
)
def test_configs(options, words):
    with pytest.raises(ArgumentError, match=words):
        Codebook(CodebookConfig(**{"d_in": 8, "n_codes": 8, **options}))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: b.encode(np.zeros((5, 8))), "x as a tensor of floats.*try torch.as_tensor"),
        (lambda b: b.encode(torch.zeros(5, 7)), r"activations \[..., d_in=8\], got \[5, 7\]"),
        (lambda b: b.sample(torch.zeros(50, 7)), r"activations \[..., d_in=8\], got \[50, 7\]"),
        (lambda b: b.decode(torch.zeros(5, 7)), r"k-hot vector \[..., latent=16\], got \[5, 7\]"),
        (lambda b: b.ids(torch.zeros(5, 16), keep=torch.ones(5).bool()[:4]), r"keep as bool \[5\]"),
        (lambda b: b.usage(torch.zeros(5, 16), torch.ones(2, 5).bool()), r"keep as bool \[5\]"),
        (
            lambda b: b.usage(torch.zeros(5, 16), torch.ones(5)),
            r"keep, .* got Tensor float32 \[5\].*keep.bool",
        ),
    ],
)
def test_tables(make_book, call, words):
    with pytest.raises(TstlensError, match=words):
        call(make_book())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr as a positive number, got -1.0"),
        ({"codebook_lr": 0.0}, "codebook_lr as a positive number, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm as a positive number or None, got -1.0"),
        ({"reconstruction": -1.0}, "reconstruction as a finite number of at least 0, got -1.0"),
        ({"commitment": -1.0}, "commitment as a finite number of at least 0"),
        ({"target": torch.zeros(6, 3, 2)}, "for train_model=True; got 6 with train_model=False"),
        ({"target": torch.zeros(9, 3, 2), "train_model": True}, "of the 6 series.*got 9"),
        ({"n_codes": "8"}, "n_codes as an integer"),
    ],
)
def test_fits(model, data, options, words):
    with pytest.raises(ArgumentError, match=words):
        codebooks.fit(model, data, [HOOK], epochs=1, progress=False, **{"n_codes": 4, **options})
    assert not model.acts_to_codebooks


def test_models_splices_and_indexes(model, data, series, tmp_path):
    with pytest.raises(ArgumentError, match="at least one hook point, got none"):
        model.add_codebooks(CodebookConfig(), [])
    with pytest.raises(ArgumentError, match="hooks as a sequence of names, got 'blocks"):
        model.add_codebooks(CodebookConfig(), HOOK)
    model.add_codebooks(CodebookConfig(n_codes=8), [HOOK])
    with pytest.raises(ArgumentError, match="data: expected at least one series, got none"):
        codebooks.score(model, data[[]])
    with pytest.raises(ArgumentError, match="model as a HookedTST, got 'gunpoint'; load one with"):
        CodeIndex.build("gunpoint", data)
    with pytest.raises(ArgumentError, match="neurons as True or False, got 'no'"):
        CodeIndex.build(model, data, neurons="no", progress=False)
    with pytest.raises(ArgumentError, match="a name of their own that can follow a dot, got 1"):
        CodeIndex.build(model, data, neurons=False, progress=False, columns={1: np.zeros(6)})
    folder = CodeIndex.build(model, data, neurons=False, progress=False).save(tmp_path / "index")
    record = json.loads((folder / "index.json").read_text())
    for name, value in (("saes", 3), ("spans", "ab"), ("cells", [1])):
        (folder / "index.json").write_text(json.dumps({**record, name: value}))
        with pytest.raises(CorruptFileError, match="was altered"):
            CodeIndex.load(folder)
        unsealed = {k: v for k, v in record.items() if k != "record_sha256"}
        (folder / "index.json").write_text(json.dumps({**unsealed, name: value}))
        with pytest.raises(CorruptFileError, match="holds no whole index"):
            CodeIndex.load(folder)
