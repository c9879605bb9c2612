"""What pyvene's users do: interchange, zero and add interventions, and collect activations."""

from __future__ import annotations

import pytest
import torch

from tstlens import HookedTST

pyvene = pytest.importorskip("pyvene", reason="pip install 'tstlens[peers]'")
known = pytest.importorskip("pyvene.models.modeling_utils")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """As pyvene asks for any model that is not its own."""
    monkeypatch.setitem(known.type_to_dimension_mapping, HookedTST, {})
    monkeypatch.setitem(known.type_to_module_mapping, HookedTST, {})


def intervened(model, name, kind, series, **options):
    layer, rest = name.removeprefix("blocks.").split(".", 1)
    path = f"blocks[{layer}].{rest}.output"
    config = pyvene.IntervenableConfig([{"component": path, "intervention_type": kind}])
    return pyvene.IntervenableModel(config, model)({"series": series}, **options)


@pytest.mark.parametrize("name", ["blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"])
@pytest.mark.parametrize("pos", [0, 5])
def test_an_interchange_at_one_position_is_a_patch_there(model, series, other, name, pos):
    _, cache = model.run_with_cache(other)

    def patch(value, hook):
        value[:, pos] = cache[name][:, pos]
        return value

    expected = model.run_with_hooks(series, fwd_hooks=[(name, patch)])
    _, found = intervened(
        model,
        name,
        pyvene.VanillaIntervention,
        series,
        sources=[{"series": other}],
        unit_locations={"sources->base": pos},
    )
    torch.testing.assert_close(found, expected)
    assert (found - model(series)).abs().max() > 1e-3


def test_collected_activations_are_the_caches(model, series):
    _, cache = model.run_with_cache(series)
    (_, collected), _ = intervened(
        model,
        "blocks.1.hook_attn_out",
        pyvene.CollectIntervention,
        series,
        unit_locations={"base": 3},
    )
    torch.testing.assert_close(collected[0][:, 0], cache["attn_out", 1][:, 3])


def test_the_model_is_as_before_afterwards(model, series):
    before = model(series)
    intervened(
        model,
        "blocks.1.hook_attn_out",
        pyvene.ZeroIntervention,
        series,
        unit_locations={"base": 2},
    )
    assert torch.equal(model(series), before)
