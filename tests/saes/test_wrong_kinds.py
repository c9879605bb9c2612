"""What is no SAE, no device, no dtype or no state: refused in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tstlens import saes, truth
from tstlens.errors import ArgumentError, StateDictError, StorageError, TstlensError
from tstlens.saes.checks import check_dictionary

pytestmark = pytest.mark.usefixtures("no_shape_checks")

HOOK = "blocks.0.hook_resid_post"
ROWS = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
LAYERS = {"encoder.weight": torch.ones(4, 8), "decoder.weight": torch.ones(8, 4)}


@pytest.fixture(scope="module")
def sae():
    options = {"d_sae": 8, "k": 2, "steps": 1, "batch_size": 16, "progress": False}
    return saes.fit(ROWS, "topk", metadata={"hook_name": HOOK}, **options)


def resumed(state):
    saes.TensorStream(ROWS, 4).load_state_dict(state)


@pytest.mark.parametrize("wrong", [None, "topk", nn.Linear(8, 8), nn.Module])
def test_what_is_no_sae(model, data, sae, wrong):
    words = "expected .*SAE, got"
    for call in (
        lambda: saes.score(model, wrong, data),
        lambda: saes.ablate_latent(model, wrong, data, 0),
        lambda: saes.steer_latent(model, wrong, data, 0),
        lambda: saes.compare(sae, wrong),
        lambda: saes.random_dictionary(wrong, ROWS, 2),
        lambda: saes.neuron_dictionary(wrong, ROWS, 2),
        lambda: truth.recovery(wrong, ROWS),
        lambda: check_dictionary(wrong),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda m, d: saes.train("gunpoint", d, HOOK),
            ArgumentError,
            "model as a HookedTST, ",
        ),
        (lambda m, d: saes.train(m, d.series[:0], HOOK), ArgumentError, "at least one series"),
        (lambda m, d: saes.train(m, d, HOOK, hook_out=""), TstlensError, "unknown hook ''"),
        (lambda m, d: saes.fit(ROWS.numpy()), TstlensError, "activations"),
        (lambda m, d: saes.fit(ROWS, device="gpu"), ArgumentError, "this machine has"),
        (
            lambda m, d: saes.training_config("topk", 8, dtype="zz"),
            ArgumentError,
            "name of a fl",
        ),
        (lambda m, d: saes.load("nope", device="gpu"), ArgumentError, "this machine has"),
        (
            lambda m, d: saes.from_linear({**LAYERS, "decoder.bias": np.zeros(8)}, HOOK),
            StateDictError,
            "finite numbers for decoder.bias, got ndarray",
        ),
        (
            lambda m, d: saes.from_linear({**LAYERS, "decoder.bias": torch.ones(8) / 0}, HOOK),
            StateDictError,
            "got NaN or infinity",
        ),
        (
            lambda m, d: resumed({"seed": 0}),
            ArgumentError,
            r"what a stream's state_dict\(\) gave, got {'seed': 0}",
        ),
        (
            lambda m, d: resumed({"seed": 0, "batches_drawn": -1}),
            ArgumentError,
            "batches_drawn as an integer of at least 0, got -1",
        ),
        (
            lambda m, d: resumed({"seed": 1, "batches_drawn": 0}),
            ArgumentError,
            "expected the state of seed 0, got 1",
        ),
    ],
)
def test_training_and_loading(model, data, call, error, words):
    with pytest.raises(error, match=words):
        call(model, data)


def test_a_checkpoint_that_is_a_file_is_left_alone(tmp_path):
    place = tmp_path / "notes.txt"
    place.write_text("mine")
    with pytest.raises(StorageError, match="expected a folder at .*, found a file"):
        saes.fit(ROWS, steps=1, progress=False, checkpoint=place)
    assert place.read_text() == "mine"
