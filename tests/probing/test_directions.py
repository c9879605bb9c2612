"""Directions against planted answers and scikit-learn, and what pushing along them does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from tstlens import HookedTST, TimeSeriesData, load_dataset, probing
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HeadConfig, HookedTSTConfig, LinearPatchesConfig, PerStepConfig

SIZES = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 8, "n_channels": 2, "n_time": 6}


def tiny(**changes) -> HookedTST:
    options = {"embed": PerStepConfig(), "head": HeadConfig("mean", n_classes=3)} | changes
    return HookedTST(HookedTSTConfig(**SIZES, **options)).to(torch.float64)


def two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 30, 2, 6, generator=generator, dtype=torch.float32)
    b[:, 1] += 2.0
    return a, b


def test_the_mean_difference_at_the_embedding_is_the_embedded_difference():
    model, (a, b) = tiny(), two_sets()
    found = probing.direction(model, a, b, hook="hook_embed", method="mean")
    apart = (b.mean((0, 2)) - a.mean((0, 2))).double()  # the embedding is linear in the samples
    torch.testing.assert_close(found.vector, apart @ model.embed.W_E, rtol=1e-5, atol=1e-6)
    assert found.unit == "one difference of the means"
    back = probing.direction(model, b, a, hook="hook_embed", method="mean")
    torch.testing.assert_close(back.vector, -found.vector)


def test_padding_takes_no_part():
    model, (a, b) = tiny(), two_sets()
    lengths = torch.arange(30) % 5 + 2
    mask = torch.arange(6) < lengths[:, None]
    found = probing.direction(model, a, b, hook="hook_embed", b_mask=mask)
    spoiled = torch.where(mask[:, None], b, torch.tensor(1e4))
    same = probing.direction(model, a, TimeSeriesData(spoiled, mask=mask), hook="hook_embed")
    torch.testing.assert_close(found.vector, same.vector)
    each = [row[:, :n].mean(1) for row, n in zip(b, lengths, strict=True)]
    apart = (torch.stack(each).mean(0) - a.mean((0, 2))).double()
    torch.testing.assert_close(found.vector, apart @ model.embed.W_E, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="position 5 is padding in 24 of the series b"):
        probing.direction(model, a, b, hook="hook_embed", b_mask=mask, pos=5)


def test_the_median_is_not_moved_by_one_wild_series():
    model, (a, b) = tiny(), two_sets()
    wild = b.clone()
    wild[0] = 1e3
    clean, moved = (
        probing.direction(model, a, x, hook="hook_embed", method="median") for x in (b, wild)
    )
    assert float((clean.vector - moved.vector).norm()) < 0.2 * clean.norm


@pytest.mark.parametrize("method", ["lda", "probe"])
def test_separating_directions_have_the_length_of_the_means_apart(method):
    model, (a, b) = tiny(), two_sets()
    found = probing.direction(model, a, b, hook="blocks.0.hook_resid_post", method=method)
    mean = probing.direction(model, a, b, hook="blocks.0.hook_resid_post", method="mean")
    unit = found.vector / found.norm
    assert float(unit @ mean.vector) == pytest.approx(found.norm, rel=1e-9)
    held = {}
    for name, x in (("a", a), ("b", b)):
        _, cache = model.run_with_cache(x.double())
        held[name] = cache["resid_post", 0].mean(1) @ unit
    between = (held["a"].mean() + held["b"].mean()) / 2
    right = (held["b"] > between).double().mean() + (held["a"] < between).double().mean()
    assert float(right) / 2 > 0.9


def test_lda_is_scikit_learns():
    model, (a, b) = tiny(), two_sets()
    name = "blocks.0.hook_mlp_out"
    found = probing.direction(model, a, b, hook=name, method="lda")
    x = torch.cat([model.run_with_cache(s.double())[1][name].mean(1) for s in (a, b)]).detach()
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    normal = lda.fit(x.numpy(), np.repeat([0, 1], 30)).coef_[0]
    cosine = normal @ found.vector.numpy() / np.linalg.norm(normal) / found.norm
    assert cosine == pytest.approx(1, abs=1e-6)


def test_heads_keep_their_axis_and_one_head_is_its_slice():
    model, (a, b) = tiny(), two_sets()
    every = probing.direction(model, a, b, hook="blocks.0.attn.hook_z")
    assert every.vector.shape == (2, 4)
    one = probing.direction(model, a, b, hook="blocks.0.attn.hook_z", head=1)
    torch.testing.assert_close(one.vector, every.vector[1])
    with pytest.raises(HookError, match="no heads"):
        probing.direction(model, a, b, hook="hook_embed", head=0)
    assert list(every.to_dataframe().columns) == ["head", "feature", "value"]
    both = []
    for way in (every, one):
        with model.steer(way):
            both.append(model(a.double()))
    assert not torch.allclose(*both)


def test_channels_that_run_alone_are_averaged():
    model = tiny(embed=LinearPatchesConfig(2, 2, channel_independent=True))
    a, b = two_sets()
    found = probing.direction(model, a, b, hook="hook_embed")
    apart = (b - a).double().mean((0, 1)).unflatten(0, (3, 2)).mean(0)  # [patch_len]
    torch.testing.assert_close(found.vector, apart @ model.embed.W_E, rtol=1e-5, atol=1e-6)


def test_a_latents_direction_is_its_decoder_row_where_the_dictionary_writes():
    rows = torch.randn(5, 8)
    metadata = SimpleNamespace(
        hook_name="blocks.0.hook_resid_mid", hook_name_out="blocks.0.hook_mlp_out"
    )
    cfg = SimpleNamespace(metadata=metadata, normalize_activations="layer_norm")
    found = probing.latent_direction(SimpleNamespace(W_dec=rows, cfg=cfg), 3)
    assert found.hook == "blocks.0.hook_mlp_out" and torch.equal(found.vector, rows[3])
    assert "layer_norm" in found.unit
    with pytest.raises(ArgumentError, match="a latent in 0..4, got 5"):
        probing.latent_direction(SimpleNamespace(W_dec=rows, cfg=cfg), 5)
    with pytest.raises(ArgumentError, match="give hook="):
        probing.latent_direction(SimpleNamespace(W_dec=rows), 0)
    with pytest.raises(ArgumentError, match="W_dec"):
        probing.latent_direction(SimpleNamespace(), 0)


def test_random_directions_have_the_norm_and_the_seed():
    way = probing.Direction("hook_embed", torch.randn(2, 8), "mean", "one")
    first, again = (probing.random_directions(way, 200, seed=4) for _ in range(2))
    assert all(one.norm == pytest.approx(way.norm, rel=1e-5) for one in first)
    assert all(torch.equal(one.vector, two.vector) for one, two in zip(first, again, strict=True))
    unit = torch.stack([one.vector.flatten() for one in first]) / way.norm
    assert float((unit @ way.vector.flatten() / way.norm).mean().abs()) < 0.08


def test_sets_without_a_difference_and_unknown_methods_are_refused(no_shape_checks):
    model, (a, _) = tiny(), two_sets()
    with pytest.raises(ArgumentError, match="are they the same series"):
        probing.direction(model, a, a, hook="hook_embed")
    with pytest.raises(ArgumentError, match="'mean', 'median', 'lda' or 'probe', got 'pca'"):
        probing.direction(model, a, a, hook="hook_embed", method="pca")
    with pytest.raises(ArgumentError, match="at least 2 series in each set"):
        probing.direction(model, a, a[:1], hook="hook_embed", method="lda")


def test_dose_response_measures_what_a_loop_measures():
    model, (a, b) = tiny(), two_sets()
    way = probing.direction(model, a, b, hook="blocks.0.hook_resid_post")
    result = probing.dose_response(
        model,
        a.double(),
        way,
        [1.0, -0.5],
        target=2,
        n_random=3,
        seed=7,
        batch_size=8,
        progress=False,
    )
    assert result.strengths == (-0.5, 0.0, 1.0)
    for column, dose in enumerate(result.strengths):
        with model.steer(way, dose), torch.no_grad():
            expected = model(a.double()).softmax(-1)[:, 2]
        np.testing.assert_allclose(result.values[:, column], expected.numpy(), rtol=1e-9)
    third = probing.random_directions(way, 3, seed=7)[2]
    with model.steer(third, 1.0), torch.no_grad():
        expected = model(a.double()).softmax(-1)[:, 2]
    np.testing.assert_allclose(result.random[2, :, 2], expected.numpy(), rtol=1e-9)
    assert result.p[1] == 1 and result.change[1] == 0
    frame = result.to_dataframe()
    assert (frame["low"] <= frame["change"]).all() and (frame["change"] <= frame["high"]).all()


def test_a_forecasters_response_is_a_straight_line_in_closed_form():
    model = tiny(head=HeadConfig("mean", horizon=3))
    a, b = (x.double() for x in two_sets())
    way = probing.direction(model, a, b, hook="blocks.0.hook_resid_post")
    result = probing.dose_response(model, a, way, [1.0, 2.0, 3.0], n_random=2, progress=False)
    slope = float((way.vector @ model.head.W_U).detach().mean())
    np.testing.assert_allclose(result.change, slope * np.array([0, 1, 2, 3]), rtol=1e-9)
    assert result.monotone and result.measure == "mean of the forecast"
    with pytest.raises(ArgumentError, match="does not read them"):
        probing.dose_response(model, a, way, target=1, progress=False)
    with pytest.raises(ArgumentError, match="is for classifiers"):
        probing.dose_response(model, a, way, measure="logit", progress=False)


def test_few_series_have_no_interval_and_no_doses_are_refused():
    model, (a, b) = tiny(), two_sets()
    way = probing.direction(model, a, b, hook="hook_embed")
    result = probing.dose_response(
        model, a[:4].double(), way, [1.0], target=0, n_random=1, progress=False
    )
    assert np.isnan(result.low).all()
    for doses in ([], [0.0]):
        with pytest.raises(ArgumentError, match="strengths other than 0"):
            probing.dose_response(model, a.double(), way, doses, target=0, progress=False)
    with pytest.raises(ArgumentError, match="needs a target"):
        probing.dose_response(model, a.double(), way, progress=False)


@pytest.mark.parametrize(("a", "b"), [(0, 3), (5, 2)])
def test_on_japanese_vowels_the_mean_difference_moves_the_class_and_random_does_not(a, b):
    model = HookedTST.from_pretrained("japanese-vowels")
    train, test = (load_dataset("JapaneseVowels", split=split) for split in ("train", "test"))
    way = probing.direction(
        model, train[train.labels == a], train[train.labels == b], hook="blocks.1.hook_resid_post"
    )
    result = probing.dose_response(
        model,
        test[test.labels == a][:20],
        way,
        [0.25, 0.5, 0.75, 1.0],
        target=b,
        n_random=6,
        progress=False,
    )
    assert result.monotone and result.change[-1] > 0.7
    assert result.change[-1] > 10 * result.random_change[:, -1].max()
    assert result.p[-1] == pytest.approx(1 / 7) and result.above_low[-1] > 0.5
