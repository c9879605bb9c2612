"""A trunk with mirrored rows: dictionaries take both passes, places and effects want one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import tstlens
from tests.zoo.claims import scrambled
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST

pytestmark = pytest.mark.saes
pytest.importorskip("sae_lens")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "TimesFm2_5ModelForPrediction"):
    pytest.skip("this transformers has no TimesFM 2.5", allow_module_level=True)

HOOK, WIDTH, CHANNELS, N = "blocks.0.hook_mlp_out", 16, 2, 12


@pytest.fixture(scope="module")
def source() -> Any:
    torch.manual_seed(0)
    config = transformers.TimesFm2_5Config(
        patch_length=4,
        context_length=24,
        horizon_length=5,
        hidden_size=WIDTH,
        intermediate_size=24,
        head_dim=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=2,
        quantiles=[0.1, 0.5, 0.9],
        decode_index=2,
        output_quantile_len=8,
    )
    return scrambled(transformers.TimesFm2_5ModelForPrediction(config))


@pytest.fixture(scope="module")
def both(source) -> HookedTST:
    return tstlens.convert(source, n_channels=CHANNELS, output="point")


@pytest.fixture(scope="module")
def one(source) -> HookedTST:
    return tstlens.convert(source, n_channels=CHANNELS, output="point", both_signs=False)


@pytest.fixture(scope="module")
def data() -> TimeSeriesData:
    """Two classes; every third series is shorter, padded at the start."""
    generator = torch.Generator().manual_seed(1)
    walk = torch.randn(N, CHANNELS, 24, generator=generator).cumsum(-1) + 5
    mask = torch.ones(N, 24, dtype=torch.bool)
    mask[::3, :10] = False
    labels = torch.arange(N) % 2
    return TimeSeriesData(walk, labels, ("falls", "rises"), mask=mask, name="walks", split="all")


@pytest.fixture
def target() -> torch.Tensor:
    return torch.zeros(N, CHANNELS, 5)


@torch.no_grad()
def by_pass(model, data) -> torch.Tensor:
    """[pass, series, channel, pos, width]."""
    found = model.run_with_cache(data.series, mask=data.mask)[1][HOOK]
    return found.unflatten(0, (N, -1, CHANNELS)).transpose(0, 1)


def observed(data) -> torch.Tensor:
    """[series, channel, pos]: a patch counts once its last sample does."""
    seen = data.mask.unflatten(1, (-1, 4))[..., -1]
    return seen[:, None].expand(N, CHANNELS, -1)


def test_the_rows_are_the_run_of_the_series_and_that_of_its_mirror_image(both, one, data):
    assert (both.cfg.n_passes, one.cfg.n_passes) == (2, 1)
    assert (both.cfg.rows_per_series, one.cfg.rows_per_series) == (2 * CHANNELS, CHANNELS)
    first, second = by_pass(both, data)
    seen = observed(data)
    mirrored = TimeSeriesData(-data.series, mask=data.mask)
    for found, given in ((first, data), (second, mirrored)):
        (alone,) = by_pass(one, given)
        torch.testing.assert_close(found[seen], alone[seen], rtol=1e-4, atol=1e-5)
    assert (first[seen] - second[seen]).abs().mean() > 0.1 * first[seen].abs().mean()


def test_a_stream_gives_the_observed_rows_of_both_passes_with_their_places(both, data):
    from tstlens import saes

    stream = saes.ActivationStream(both, data, HOOK, batch_size=7, remember=True)
    passes, seen = by_pass(both, data), observed(data)
    n_rows = 2 * int(seen.sum())
    drawn = {}
    while len(drawn) < n_rows:
        rows = next(stream)
        for row, place in zip(rows, stream.last_places.tolist(), strict=True):
            series, channel, pos, head = place
            assert head == -1 and seen[series, channel % CHANNELS, pos]
            expected = passes[channel // CHANNELS, series, channel % CHANNELS, pos]
            torch.testing.assert_close(row, expected)
            drawn[series, channel, pos] = True
    assert len(drawn) == n_rows


def test_an_sae_of_both_passes_is_scored_on_both_and_fits_the_model_of_one(both, one, data, target):
    from tstlens import saes

    sae = saes.train(
        both, data, hook=HOOK, sae="topk", d_sae=24, k=4, steps=30, batch_size=64, progress=False
    )
    found = saes.score(both, sae, data, target=target)
    rows = by_pass(both, data)[:, observed(data)].flatten(0, 1)
    assert found.n_activations == len(rows)
    left = (rows - sae(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    own = found.to_dataframe().set_index("dictionary").explained_variance["trained"]
    assert own == pytest.approx(1 - float(left.detach()), abs=1e-4)
    with both.saes([sae]), one.saes([sae]):
        name = f"{HOOK}.hook_sae_acts_post"
        twice = both.run_with_cache(data.series, mask=data.mask, names_filter=name)[1][name]
        once = one.run_with_cache(data.series, mask=data.mask, names_filter=name)[1][name]
    first = twice.unflatten(0, (N, 2, CHANNELS))[:, 0].flatten(0, 1)
    torch.testing.assert_close(first, once, rtol=1e-3, atol=1e-4)
    features = saes.features(one, sae, data, n_permutations=100, effect_series=0, progress=False)
    assert features.activity.n_channels == CHANNELS


def test_codebooks_are_fitted_and_scored_on_both_passes(both, data, target):
    from tstlens import codebooks

    model = copy.deepcopy(both)
    before = model(data.series, mask=data.mask)
    codebooks.fit(model, data, [HOOK], n_codes=6, k=1, train_model=False, epochs=3, progress=False)
    found = codebooks.score(model, data, target=target).books["codebooks"][0]
    book = model.acts_to_codebooks[HOOK]
    rows = by_pass(both, data)[:, observed(data)].flatten(0, 1)
    left = (rows - book(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert found.explained_variance == pytest.approx(1 - float(left.detach()), abs=1e-4)
    counts = (book.encode(rows) != 0).sum(0)
    assert counts.sum() == 2 * observed(data).sum() and found.dead == (counts == 0).sum()
    changed = model(data.series, mask=data.mask)
    assert (changed - before).abs().max() > 1e-3
    model.reset_codebooks()
    assert torch.equal(model(data.series, mask=data.mask), before)


def test_what_needs_a_place_or_a_sign_refuses_and_says_what_to_do(both, one, data):
    from tstlens import codebooks, probing, saes

    sae = saes.train(both, data, hook=HOOK, d_sae=8, k=2, steps=2, batch_size=8, progress=False)
    way = probing.Direction(HOOK, torch.ones(WIDTH), "by hand", "ones")
    steps = {"strengths": [1.0], "n_random": 2, "progress": False}
    book = codebooks.Codebook(codebooks.CodebookConfig(d_in=WIDTH, n_codes=6))
    two, single = copy.deepcopy(both), copy.deepcopy(one)
    two.add_codebook(book, HOOK)
    single.add_codebook(copy.deepcopy(book), HOOK)
    quiet = {"progress": False}
    effects = {"codes": {HOOK: 1}, "n_controls": 2, "doses": [1], **quiet}
    asked = {
        "to read its features": lambda model: saes.features(
            model, sae, data, n_permutations=100, effect_series=0, **quiet
        ),
        "to probe it": lambda model: probing.activations(model, data, HOOK),
        "to measure what a push does": lambda model: probing.dose_response(
            model, data, way, **steps
        ),
    }
    of_codes = {
        "to index its codes": lambda model: codebooks.CodeIndex.build(model, data, **quiet),
        "to measure what codes do": lambda model: codebooks.effects(model, data, **effects),
    }
    for pair, questions in (((both, one), asked), ((two, single), of_codes)):
        for words, ask in questions.items():
            with pytest.raises(ArgumentError, match=f"mirror image.*both_signs=False {words}"):
                ask(pair[0])
            assert ask(pair[1]) is not None


def test_an_index_of_one_pass_holds_the_windows_of_its_channels(one, data):
    from tstlens import codebooks

    model = copy.deepcopy(one)
    whole = TimeSeriesData(data.series, data.labels, data.class_names, name="walks")
    codebooks.fit(model, whole, [HOOK], n_codes=6, train_model=False, epochs=2, progress=False)
    index = codebooks.CodeIndex.build(model, whole, saes="fit", sae_steps=5, progress=False)
    assert (index.n_channels, index.n_pos) == (CHANNELS, 6)
    code = int(index.book(HOOK).support.argmax())
    windows = index.windows(HOOK, code, n=5)
    for at in range(len(windows)):
        stretch = slice(windows.start[at], windows.stop[at])
        own = whole.series[windows.series[at], windows.channel[at], stretch].numpy()
        inside = np.arange(windows.start[at], windows.stop[at]) - windows.first[at]
        np.testing.assert_allclose(windows.values[at, 0, inside], own, rtol=1e-6)
    found = index.search(label="rises", test="split", min_support=2, n_permutations=100)
    assert all(code.latent is not None for code in found.codes)
