"""Shares of samples against closed forms and a serial loop."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from sklearn.linear_model import Ridge

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig
from tstlens.patching import logit, mse, window_sweep
from tstlens.patching.windows import shares, window_places

N_TIME = 12


def tiny(**changes) -> HookedTST:
    options = {
        "embed": LinearPatchesConfig(2, 2),
        "head": HeadConfig("mean", n_classes=3),
        "seed": 3,
    } | changes
    return HookedTST(
        HookedTSTConfig(
            n_layers=1, d_model=8, n_heads=2, d_mlp=8, n_channels=2, n_time=N_TIME, **options
        )
    ).to(torch.float64)


def pairs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    clean, corrupted = torch.randn(2, n, 2, N_TIME, dtype=torch.float64)
    return clean, corrupted


TARGET = torch.tensor([0, 2, 1])


def additive() -> HookedTST:
    """Attention and MLP write nothing, so samples' effects add up."""
    model = tiny()
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if name.endswith(("W_O", "W_out", "b_O", "b_out")):
                parameter.zero_()
    return model


def test_windows_of_a_length_hold_every_sample_equally_often():
    for length in (1, 2, 3, 8, 12):
        held = window_places(N_TIME, [length])
        assert held.sum(1).max() == length and held.any(1).all()
        step = max(1, length // 4)
        starts = [range(start, start + length) for start in range(step - length, N_TIME, step)]
        expected = [[sample in window for sample in range(N_TIME)] for window in starts]
        assert held.tolist() == expected
    assert (window_places(N_TIME, [1]) == torch.eye(N_TIME, dtype=torch.bool)).all()
    assert set(window_places(N_TIME, [8]).sum(0).tolist()) == {4}


def test_where_effects_add_up_shares_are_the_effects_of_single_samples():
    model, (clean, corrupted) = additive(), pairs()
    metric = logit(TARGET)
    found = window_sweep(model, clean, corrupted, metric, ridge=1e-9, progress=False)
    weight = torch.autograd.functional.jacobian(lambda x: metric(model(x)[None]).sum(), corrupted)
    torch.testing.assert_close(found.effect(), weight * (clean - corrupted), atol=1e-7, rtol=1e-6)
    assert found.made["r2"] == pytest.approx([1, 1, 1])
    total = found.clean - found.baseline
    torch.testing.assert_close(found.effect().sum((1, 2)), total, atol=1e-7, rtol=1e-6)


def test_shares_are_scikit_learns_ridge_of_the_effects_of_a_loop():
    model, (clean, corrupted) = tiny(), pairs()
    found = window_sweep(
        model, clean, corrupted, logit(TARGET), lengths=(1, 4), ridge=0.5, progress=False
    )
    held = window_places(N_TIME, (1, 4))
    strength = 0.5 * float(held.sum(0).double().mean())
    for pair in range(3):
        scores = []
        for channel in range(2):
            effects = []
            for window in held:
                changed = corrupted[pair].clone()
                changed[channel, window] = clean[pair, channel, window]
                both = model(torch.stack([changed, corrupted[pair]]))[:, TARGET[pair]]
                effects.append(float((both[0] - both[1]).detach()))
            fitted = Ridge(strength, fit_intercept=False).fit(held.double().numpy(), effects)
            expected = torch.from_numpy(fitted.coef_)
            torch.testing.assert_close(
                found.effect()[pair, channel], expected, atol=1e-9, rtol=1e-6
            )
            left = torch.tensor(effects) - held.double() @ expected
            scores.append((left.square().sum(), torch.tensor(effects).square().sum()))
        (a, b), (c, d) = scores
        assert found.made["r2"][pair] == pytest.approx(float(1 - (a + c) / (b + d)), abs=1e-6)


def test_chunks_and_blocks_change_nothing():
    model, (clean, corrupted) = tiny(), pairs()
    whole = window_sweep(model, clean, corrupted, logit(TARGET), progress=False)
    parts = window_sweep(model, clean, corrupted, logit(TARGET), memory_mb=1e-3, progress=False)
    torch.testing.assert_close(whole.values, parts.values)
    alone = window_sweep(model, clean[1], corrupted[1], logit(TARGET[1:2]), progress=False)
    torch.testing.assert_close(alone.values[0], whole.values[1])
    own = window_sweep(
        model, clean, corrupted, lambda out: out[torch.arange(3), TARGET], progress=False
    )
    torch.testing.assert_close(own.values, whole.values)


def test_rows_of_channel_independent_models_count_as_rows(monkeypatch):
    embed = LinearPatchesConfig(2, 2, channel_independent=True)
    model = tiny(embed=embed, head=HeadConfig("flatten", horizon=4))
    clean, corrupted = pairs()
    metric = mse(torch.randn(3, 2, 4, dtype=torch.float64))
    options = {"lengths": (4,), "ridge": 0.5, "progress": False}
    whole = window_sweep(model, clean, corrupted, metric, **options)
    rows = []
    model.blocks[0].register_forward_hook(lambda module, given, out: rows.append(len(out)))
    monkeypatch.setattr("tstlens.patching.windows.rows_that_fit", lambda *given: 12)
    parts = window_sweep(model, clean, corrupted, metric, **options)
    torch.testing.assert_close(parts.values, whole.values)
    assert max(rows) == 12  # two worlds of three pairs of two channels
    held, effects = window_places(N_TIME, (4,)), []
    for window in held:
        changed = corrupted.clone()
        changed[:, 0, window] = clean[:, 0, window]
        effects.append(metric(model(changed)[None])[0] - metric(model(corrupted)[None])[0])
    solved = Ridge(0.5 * float(held.sum(0).double().mean()), fit_intercept=False).fit(
        held.double().numpy(), torch.stack(effects).detach().numpy()
    )
    torch.testing.assert_close(
        whole.effect()[:, 0], torch.from_numpy(solved.coef_), atol=1e-9, rtol=1e-6
    )


def test_padding_is_never_replaced_and_has_no_share():
    model, (clean, corrupted) = tiny(), pairs()
    clean_mask = torch.ones(3, N_TIME, dtype=torch.bool)
    corrupted_mask = clean_mask.clone()
    clean_mask[0, 8:], corrupted_mask[1, 6:] = False, False
    clean, corrupted = (
        torch.where(mask[:, None], series, 0)
        for mask, series in ((clean_mask, clean), (corrupted_mask, corrupted))
    )
    masks = {"clean_mask": clean_mask, "corrupted_mask": corrupted_mask}
    found = window_sweep(model, clean, corrupted, logit(TARGET), progress=False, **masks)
    effect = found.effect()
    assert (effect[0, :, 8:] == 0).all() and (effect[1, :, 6:] == 0).all()
    assert (effect[0, :, :8] != 0).all() and (effect[2] != 0).all()
    # What stands in the padding of the clean series does not matter.
    changed = clean.clone()
    changed[0, :, 8:] = 5.0
    again = window_sweep(model, changed, corrupted, logit(TARGET), progress=False, **masks)
    torch.testing.assert_close(again.values, found.values)


def test_an_effect_that_nothing_explains_has_a_low_r2():
    inside = window_places(4, [1, 2])
    effects = torch.zeros(1, 1, len(inside), dtype=torch.float64)
    effects[0, 0, -1] = 1.0  # one window of two, whose samples do nothing alone
    found, r2 = shares(effects, inside, torch.ones(1, 4, dtype=torch.bool), 0.1)
    assert 0 < float(r2) < 0.7 and found[0, 0, 0].abs() < 0.1


def test_what_cannot_be_asked_is_refused(no_shape_checks):
    model, (clean, corrupted) = tiny(), pairs()
    ask = {"model": model, "clean": clean, "corrupted": corrupted, "metric": logit(TARGET)}
    with pytest.raises(ArgumentError, match=r"each from 1 to 12, got \[1, 13\]"):
        window_sweep(**ask, lengths=(1, 13), progress=False)
    with pytest.raises(ArgumentError, match=r"each from 1 to 12, got \[\]"):
        window_sweep(**ask, lengths=(), progress=False)
    with pytest.raises(ArgumentError, match="ridge: expected more than 0, got 0"):
        window_sweep(**ask, ridge=0.0, progress=False)
    with pytest.raises(SeriesShapeError, match="must have the same shape"):
        window_sweep(**ask | {"clean": clean[:2]}, progress=False)


def test_the_example_in_the_documentation_runs():
    results = doctest.testmod(importlib.import_module("tstlens.patching.windows"))
    assert results.attempted and not results.failed
