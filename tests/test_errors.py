"""Errors of ours: they travel between processes, and say where gradients cannot be."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

from tests.model.conftest import build
from tstlens import errors, patching
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, TstlensError, UnknownNameError

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, TstlensError)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_an_error_survives_a_round_trip_with_all_that_it_says(kind, copied):
    error: Any = kind("hook_patern")
    if issubclass(kind, UnknownNameError):
        error = kind("hook_patern", ["hook_pattern", "hook_z"], "Look it up")
        assert "did you mean 'hook_pattern'" in str(error) and "Look it up" in str(error)
    error.found = {"layer": 3}
    twin = copied(error)
    assert type(twin) is kind
    assert (str(twin), twin.args, vars(twin)) == (str(error), error.args, vars(error))
    assert str(error).startswith(("hook_patern", "unknown"))  # no quotes


def test_nothing_that_needs_gradients_starts_in_inference_mode():
    from tstlens import probing, training

    model = build()
    clean, corrupted = torch.randn(2, 4, 3, 12, generator=torch.Generator().manual_seed(0))
    data = TimeSeriesData(clean, torch.tensor([0, 1, 2, 3]))
    metric = patching.log_prob(torch.tensor([0, 1, 2, 3]))
    calls: dict[str, Any] = {
        "attribution": lambda m, x: patching.attribution(
            m, x, corrupted, "z", ("layer", "head"), metric
        ),
        "edge_attribution": lambda m, x: patching.edge_attribution(m, x, corrupted, metric),
        "train": lambda m, x: training.train(m, TimeSeriesData(x, data.labels), epochs=1),
        "method='integrated_gradients'": lambda m, x: probing.attribute(
            m,
            x,
            torch.tensor([0, 1, 2, 3]),
            method="integrated_gradients",
            baseline="zero",
            n_steps=2,
        ),
    }
    try:
        from tstlens import codebooks, saes
    except ImportError:
        pass
    else:
        hook = "blocks.0.hook_mlp_out"
        calls["fit"] = lambda m, x: codebooks.fit(m, TimeSeriesData(x, data.labels), (hook,))
        calls["train of saes"] = lambda m, x: saes.train(
            m, TimeSeriesData(x, data.labels), hook, d_sae=8, k=2, steps=2
        )
    with torch.inference_mode():
        made_inside = build()
        series_inside = clean.clone()
    for name, call in calls.items():
        words = f"{name.split(' ')[0]} needs gradients, and torch.inference_mode"
        with torch.inference_mode(), pytest.raises(ArgumentError, match=words):
            call(model, clean)
        words = f"{name.split(' ')[0]} needs gradients, and a .* made under torch.inference_mode"
        for given in ((made_inside, clean), (model, series_inside)):
            with pytest.raises(ArgumentError, match=words):
                call(*given)


def test_training_goes_on_under_no_grad():
    """It asks for gradients by being called."""
    from tstlens import training

    generator = torch.Generator().manual_seed(0)
    data = TimeSeriesData(torch.randn(8, 3, 12, generator=generator), torch.arange(8) % 4)
    model, twin = build(), build()
    with torch.no_grad():
        training.train(model, data, val=data, epochs=1)
    training.train(twin, data, val=data, epochs=1)
    assert torch.equal(model.W_Q, twin.W_Q) and not torch.equal(model.W_Q, build().W_Q)
