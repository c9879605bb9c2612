"""What users get wrong is named: no error of torch or sae-lens reaches them."""

from __future__ import annotations

import pytest
import torch

from tests.saes import hand_made as made
from tstlens import patching, saes, truth
from tstlens.errors import ArgumentError, InputError, StorageError

HOOK, Z = "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"


@pytest.fixture(scope="module")
def model():
    return made.per_step(n_layers=2)


@pytest.fixture(scope="module")
def data():
    return made.labelled(n=12)


@pytest.fixture(scope="module")
def sae(model, data):
    options = {"steps": 3, "batch_size": 16, "d_sae": 8, "k": 2, "progress": False}
    return saes.train(model, data, HOOK, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps as an integer of at least 1, got 0"),
        ({"steps": 2.5}, "steps as an integer of at least 1, got 2.5"),
        ({"batch_size": 0}, "batch_size as an integer of at least 1, got 0"),
        ({"seed": "x"}, "seed as an integer of at least 0, got 'x'"),
        ({"lr": -1.0}, "lr as a positive number, got -1.0"),
        ({"lr": "x"}, "lr as a positive number, got 'x'"),
        ({"checkpoint_every": 0}, "checkpoint_every as an integer of at least 1, got 0"),
        ({"hook": Z, "head": "foo"}, "head as 'joined', 'each' or an integer, got 'foo'"),
        ({"hook": Z, "head": 5}, r"a head in 0..1, got 5"),
        ({"hook_out": "blocks.1.hook_mlp_out"}, "'topk' gives back what it reads"),
        ({"memory_mb": -1}, "memory_mb as a positive number, got -1"),
    ],
)
def test_bad_arguments_of_training(model, data, no_shape_checks, options, message):
    with pytest.raises(ArgumentError, match=message):
        saes.train(model, data, **{"hook": HOOK, "progress": False, **options})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((5, 4), float("nan")), "finite activations .* with NaN or infinity"),
        (torch.ones(5, 4, dtype=torch.long), "floating point, got torch.int64"),
        (torch.zeros(0, 4), r"\[row, width\], got \[0, 4\]"),
        (torch.zeros(4), r"\[row, width\], got \[4\]"),
    ],
)
def test_rows_that_cannot_be_fitted(no_shape_checks, rows, message):
    with pytest.raises(ArgumentError, match=message):
        saes.fit(rows, steps=1, progress=False)


def test_streams(model, data, tmp_path, no_shape_checks):
    for options, message in (
        ({"shard_mb": 0.0}, "shard_mb as a positive number"),
        ({"series_per_pass": 0}, "series_per_pass as an integer of at least 1 or None, got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            saes.ActivationStream(model, data, HOOK, **options)
    file = tmp_path / "file"
    file.write_text("here")
    with pytest.raises(StorageError, match="expected a folder at .*, found a file"):
        next(saes.ActivationStream(model, data, HOOK, cache=file))


def test_a_pass_leaves_every_module_in_its_mode(model, data):
    model.blocks[0].train()
    try:
        modes = [module.training for module in model.modules()]
        next(saes.ActivationStream(model, data, HOOK, batch_size=8))
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_a_pass_holds_a_quarter_of_the_memory_at_most(model):
    series = torch.randn(200, 2, 16)
    stream = saes.ActivationStream(model, series, HOOK, memory_mb=0.05)
    rows, places = stream.rows(torch.arange(stream.series_per_pass))
    held = rows[HOOK].nbytes + places.nbytes
    assert 0.05 * 2**20 / 8 < held <= 0.05 * 2**20 / 4
    assert saes.ActivationStream(model, series, HOOK).series_per_pass == 200


def test_readers(model, data, sae, no_shape_checks):
    calls = {
        "data as a TimeSeriesData, got Tensor": lambda: saes.score(model, sae, data.series),
        "at least one series, got none": lambda: saes.score(model, sae, data[:0]),
        "batch_size as an integer of at least 1": lambda: saes.score(
            model, sae, data, batch_size=0
        ),
        "got Tensor float32 .*; wrap series": lambda: saes.features(model, sae, data.series),
        "effect_series as an integer of at least 0, got -1": lambda: saes.features(
            model, sae, data, effect_series=-1
        ),
        "max_series as an integer of at least 1 or None, got 0": lambda: saes.ablate_latent(
            model, sae, data, 0, max_series=0
        ),
        "max_series as an integer of at least 1 or None, got -1": lambda: saes.steer_latent(
            model, sae, data, 0, max_series=-1
        ),
        r"expected activations \[row, width=8\]": lambda: saes.random_dictionary(
            sae, torch.randn(5, 7), 2
        ),
        "k as an integer of at least 1, got 0": lambda: saes.random_dictionary(
            sae, torch.randn(5, 8), 0
        ),
        r"feature_activations \[row=3, feature=8\]": lambda: truth.recovery(
            sae, torch.randn(8, 8), torch.randn(3, 8), torch.randn(4, 8)
        ),
        "baseline as a string or a tensor of floats": lambda: saes.feature_graph(
            model, [sae], data, patching.logit(data.labels), baseline=3
        ),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
