"""Searches against counting by hand, planted codes, planted windows and shuffled data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from tstlens.codebooks import CodeIndex, SearchWindows
from tstlens.codebooks.book import IndexedBook
from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import of_window
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, UnknownNameError

HOOK, N_POS, N_CODES = "blocks.0.hook_mlp_out", 12, 8


def book_of(active: np.ndarray, observed: np.ndarray) -> IndexedBook:
    """From bool [slot, code]."""
    return IndexedBook(
        values=csc_matrix((active & observed[:, None]).astype(np.float32)),
        observed=observed,
        n_series=len(active) // N_POS,
        n_channels=1,
        n_pos=N_POS,
        hook=HOOK,
        n_codes=active.shape[1],
        n_groups=1,
        n_heads=None,
        shared=False,
        k=1,
        kind="cosine",
        table=np.random.default_rng(0).normal(size=(1, active.shape[1], 4)).astype(np.float32),
    )


def index_of(active, labels, mask=None, series=None, **options) -> CodeIndex:
    """An index with these activations, [series, pos, code], one sample per position."""
    n = len(labels)
    generator = torch.Generator().manual_seed(n)
    series = torch.randn(n, 2, N_POS, generator=generator) if series is None else series
    names = tuple("abcd"[: int(max(labels)) + 1])
    data = TimeSeriesData(series, torch.tensor(labels), names, mask=mask, name="toy")
    observed = np.ones((n, N_POS), dtype=bool) if mask is None else mask.numpy()
    spans = tuple((t, t + 1) for t in range(N_POS))
    book = book_of(active.reshape(n * N_POS, -1), observed.ravel())
    return CodeIndex({HOOK: book}, data, spans, spans, 1, N_POS, made={"model": "toy"}, **options)


def planted(n=40, seed=0, padded=False, **options) -> CodeIndex:
    """Code 5 at half of the positions of class 1 and few others; code 6 in every series of it."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    active = generator.random((n, N_POS, N_CODES)) < 0.1
    active[..., 5] = generator.random((n, N_POS)) < np.where(labels == 1, 0.5, 0.01)[:, None]
    active[:, :, 6] = False
    active[labels == 1, 1, 6] = True
    mask = None
    if padded:
        mask = torch.arange(N_POS) < torch.tensor(generator.integers(5, N_POS + 1, n))[:, None]
        active[~mask.numpy()] = True  # what is padded must not count
    return index_of(active, labels, mask, **options)


def dense(index) -> np.ndarray:
    book = index.books[HOOK]
    return (book.matrix().toarray() > 0).reshape(len(index.data), N_POS, -1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("unit", ["position", "series"])
def test_precision_recall_and_support_are_those_counted_by_hand(padded, unit):
    index = planted(padded=padded, test=planted(31, seed=1, padded=padded))
    found = index.search(label="b", unit=unit, min_recall=0.0, min_support=1, n=99)
    for side, kind in ((index, "train"), (index.test, "test")):
        active = dense(side)
        seen = np.ones(active.shape[:2], dtype=bool)
        if side.data.mask is not None:
            seen = side.data.mask.numpy()
        hits = np.broadcast_to((side.data.labels.numpy() == 1)[:, None], seen.shape) & seen
        if unit == "series":
            active, hits, seen = active.any(1), hits.any(1), seen.any(1)
        for one in found.codes:
            on = active[..., one.code] & seen
            score = getattr(one, kind)
            assert score.support == on.sum()
            assert score.precision == pytest.approx((on & hits).sum() / max(on.sum(), 1))
            assert score.recall == pytest.approx((on & hits).sum() / hits.sum())
        base = found.base_rate if kind == "test" else found.train_base_rate
        assert base == pytest.approx(hits.sum() / seen.sum())
    precisions = [one.train.precision for one in found.codes]
    assert precisions == sorted(precisions, reverse=True) and found.n_candidates == len(found)
    limited = index.search(label=1, unit=unit, min_recall=0.3, min_support=15, n=99)
    expected = {c.code for c in found.codes if c.train.recall >= 0.3 and c.train.support >= 15}
    assert {one.code for one in limited.codes} == expected


def test_a_planted_code_is_found_and_beats_shuffled_labels_and_others_do_not():
    index = planted(seed=2, test=planted(30, seed=7))
    found = index.search(label="b")
    assert found.best.code in (5, 6)
    by_code = {one.code: one for one in found.codes}
    assert by_code[5].p == pytest.approx(1 / 201) and by_code[5].test.precision > 0.85
    assert by_code[5].null < 0.7 < by_code[5].train.precision
    assert all(one.p > 0.05 for one in found.codes if one.code not in (5, 6))
    assert index.search(label="b", seed=3).best == index.search(label="b", seed=3).best


def test_p_values_hold_their_level_where_there_is_nothing_to_find():
    """Whole series of one code each, so that positions of a series are as alike as can be."""
    generator, small = np.random.default_rng(0), 0
    for run in range(60):
        own = generator.integers(0, N_CODES, 24)
        active = np.zeros((24, N_POS, N_CODES), dtype=bool)
        active[np.arange(24), :, own] = True
        index = index_of(active, generator.permutation(np.arange(24) % 2))
        found = index.search(label=0, n_permutations=100, seed=run, n=99)
        small += bool(found.codes) and min(one.p for one in found.codes) <= 0.1
    assert small <= 14  # P(more of 60 at level 0.1) < 0.1 %


def test_without_a_test_split_the_other_half_of_the_series_reports():
    index = planted(60)
    found = index.search(label="b", min_recall=0.0, min_support=1, n=99, seed=2)
    assert (found.made["n_train"], found.made["n_test"]) == (30, 30)
    active, whole = dense(index), index.data.labels.numpy() == 1
    for one in found.codes:
        on = active[..., one.code]
        assert one.train.support + one.test.support == on.sum()
        right = one.train.precision * one.train.support + one.test.precision * one.test.support
        assert right == pytest.approx((on & whole[:, None]).sum())


def test_the_best_neuron_is_the_one_that_trying_all_finds():
    generator = np.random.default_rng(0)
    index = planted(40)
    other = planted(30, seed=5)
    for one in (index, other):
        label = np.repeat(one.data.labels.numpy() == 1, N_POS)
        noise = generator.normal(size=(len(label), 5)).astype(np.float32)
        noise[:, 3] -= 1.5 * label  # low where the class is
        one.neurons["mlp"] = noise
    index = dataclasses.replace(index, test=other)
    code = next(one for one in index.search(label="b", n=9).codes if one.code == 5)
    hits = np.repeat(index.data.labels.numpy() == 1, N_POS)
    best = (-1.0, 0, 0, 0.0)
    for neuron in range(5):
        for sign in (1, -1):
            values = sign * index.neurons["mlp"][:, neuron]
            for limit in np.unique(values[hits]):
                on = values >= limit
                if (on & hits).sum() / hits.sum() >= code.train.recall - 1e-9:
                    best = max(best, ((on & hits).sum() / on.sum(), neuron, sign, sign * limit))
                    # The highest threshold with this recall is the code's fair rival.
    rival = code.neuron
    assert (rival.place, rival.index, rival.sign) == ("mlp", 3, -1)
    assert rival.train.recall >= code.train.recall - 1e-9
    assert rival.train.precision <= best[0] + 1e-9
    on = index.neurons["mlp"][:, 3] <= rival.threshold
    assert rival.train.precision == pytest.approx((on & hits).sum() / on.sum())
    assert (on & hits).sum() == int(np.ceil(code.train.recall * hits.sum() - 1e-9))
    on = other.neurons["mlp"][:, 3] <= rival.threshold
    test_hits = np.repeat(other.data.labels.numpy() == 1, N_POS)
    assert rival.test.precision == pytest.approx((on & test_hits).sum() / on.sum())
    assert code.latent is None


def test_a_latent_that_is_the_class_itself_is_the_best_latent():
    index, other = planted(40), planted(30, seed=5)
    for one in (index, other):
        label = np.repeat(one.data.labels.numpy() == 1, N_POS)
        noise = np.random.default_rng(1).random((len(label), 3))
        latents = np.stack([noise[:, 0], label * (1 + noise[:, 1]), noise[:, 2]], 1)
        one.saes[HOOK] = csc_matrix(latents.astype(np.float32))
    found = dataclasses.replace(index, test=other).search(label="b", unit="series")
    for one in found.codes:
        assert one.latent.index == 1 and one.latent.train.precision == 1
        assert one.latent.test.precision == 1
    frame = found.to_dataframe()
    assert set(frame["latent"]) == {f"{HOOK}[1]"} and frame["neuron"].isna().all()


def test_a_mask_of_a_regime_marks_positions_and_whole_series_are_dealt_out():
    generator = np.random.default_rng(0)
    states = (np.arange(N_POS)[None] + generator.integers(0, 4, 30)[:, None]) // 3 % 2 == 1
    active = np.zeros((30, N_POS, 3), dtype=bool)
    active[..., 1] = states
    active[..., 2] = generator.random((30, N_POS)) < 0.2
    index = index_of(active, np.zeros(30, dtype=int), columns={"state": states.astype(int)})
    by_mask = index.search(mask=states)
    by_column = index.search(lambda window: window.state == 1)
    assert by_mask.best.code == by_column.best.code == 1
    assert by_mask.best.test.precision == by_mask.best.test.recall == 1
    assert by_mask.to_dataframe().equals(by_column.to_dataframe())
    with pytest.raises(ArgumentError, match="test_mask="):
        dataclasses.replace(index, test=index).search(mask=states)


def test_dealing_out_keeps_series_whole_and_starts_over_where_one_is_longer():
    from tstlens.codebooks.search import Dealer

    lengths = np.array([12, 5, 7, 12])
    observed = np.arange(N_POS) < lengths[:, None]
    holds = np.zeros((4, N_POS), dtype=bool)
    for row, length in enumerate(lengths):
        holds[row, : row + 1] = True  # so many at the start: tells who gave
        holds[row, length:] = True  # padding, which must not be dealt
    index = index_of(np.zeros((4, N_POS, 1), dtype=bool), [0] * 4)
    dealer = Dealer(index, holds.ravel(), observed.ravel(), np.arange(4))
    generator, again = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(5):
        given, giver = dealer.one(generator).reshape(4, N_POS), again.permutation(4)
        for row in range(4):
            whole = holds[giver[row], : lengths[giver[row]]]
            expected = np.resize(whole, N_POS)[: lengths[row]]
            np.testing.assert_array_equal(given[row, : lengths[row]], expected)


def windows_of(series, mask=None, spans=None, **options) -> SearchWindows:
    data = TimeSeriesData(series, mask=mask)
    spans = spans or tuple((t, t + 8) for t in range(0, series.shape[2], 8))
    return SearchWindows(data, spans, options.pop("rows", 1), options.pop("columns", {}), **options)


def test_properties_of_windows_are_those_of_their_formulas():
    t = np.arange(8.0)
    parabola = 0.5 * t**2 - 2 * t + 3
    wave = 2 * np.sin(2 * np.pi * 0.25 * t) + 1
    series = torch.tensor(np.stack([np.concatenate([parabola, wave])[None]]), dtype=torch.float64)
    window = windows_of(series.float())
    np.testing.assert_allclose(window.curvature, [1, np.polyfit(t, wave, 2)[0] * 2], atol=1e-5)
    for name, at in (("slope", 0), ("level", 1)):
        expected = [np.polyfit(t, one, 1)[at] for one in (parabola, wave)]
        if name == "level":
            expected = [parabola.mean(), wave.mean()]
        np.testing.assert_allclose(getattr(window, name), expected, atol=1e-5)
    np.testing.assert_allclose(window.peak, [parabola.max(), 3], atol=1e-5)
    np.testing.assert_allclose(window.trough, [1, -1], atol=1e-5)
    np.testing.assert_allclose(window.range, window.peak - window.trough)
    assert window.frequency[1] == 0.25 and window.middle[1] == pytest.approx(2)
    np.testing.assert_allclose(window.variance, [parabola.var(), wave.var()], rtol=1e-5)
    np.testing.assert_allclose(window.low + window.middle + window.high, window.variance, rtol=1e-5)


def test_channels_are_seen_by_themselves_or_as_their_mean_and_padding_takes_no_part():
    series = torch.randn(5, 3, 24, dtype=torch.float32)
    mask = torch.arange(24) < torch.tensor([24, 17, 12, 24, 20])[:, None]
    window = windows_of(series, mask)
    for seen, own in ((window, series.mean(1, keepdim=True)), (window.of(2), series[:, [2]])):
        alone = windows_of(own.contiguous(), mask)
        for name in ("level", "slope", "curvature", "peak", "frequency", "high"):
            np.testing.assert_allclose(getattr(seen, name), getattr(alone, name), atol=1e-5)
    values, seen = series[1, :, 16:24].numpy().mean(0), mask[1, 16:24].numpy()
    assert window.peak[5] == pytest.approx(values[seen].max())
    other = series.clone()
    other[~mask[:, None].expand_as(series)] = 99
    for name in ("level", "slope", "curvature", "peak", "trough", "frequency"):
        np.testing.assert_array_equal(getattr(windows_of(other, mask), name), getattr(window, name))
    independent = windows_of(series, rows=3)
    slope = of_window(series[:, :, 8:16].double().numpy(), np.ones((5, 8)))[..., 1]
    np.testing.assert_allclose(independent.slope.reshape(5, 3, 3)[..., 1], slope)
    assert (independent.channels.reshape(5, 3, 3) == np.arange(3)[None, :, None]).all()


def test_distance_to_a_motif_is_zero_where_it_was_planted():
    generator = np.random.default_rng(0)
    motif = generator.normal(size=(2, 8))
    series = generator.normal(size=(4, 2, 32))
    series[2, :, 16:24] = motif
    series[3, :, 8:16] = 5 * motif + np.array([[1], [-2]])
    mask = torch.ones(4, 32, dtype=torch.bool)
    mask[0, 28:] = False
    window = windows_of(torch.tensor(series).float(), mask)
    plain = window.distance(motif).reshape(4, 4)
    assert plain[2, 2] < 1e-6 and np.isnan(plain[0, 3]) and np.nanargmin(plain) == 10
    shape = window.distance(motif, normalize=True).reshape(4, 4)
    assert shape[3, 1] < 1e-6 and shape[2, 2] < 1e-6 and np.sort(shape.ravel())[2] > 0.3
    by_hand = np.sqrt(((series[1, :, :8] - motif) ** 2).mean())
    assert plain[1, 0] == pytest.approx(by_hand, rel=1e-5)
    one = window.of(1).distance(motif[1]).reshape(4, 4)
    assert one[2, 2] < 1e-6
    with pytest.raises(SeriesShapeError, match=r"finite numbers, at least 2 samples, got \[1\]"):
        window.distance([1.0])
    with pytest.raises(SeriesShapeError, match="a motif of 2 channels, got 3"):
        window.distance(np.zeros((3, 8)))


def test_predicates_made_for_one_window_give_what_those_for_all_give():
    index = planted(12)
    pairs = [
        (
            lambda w: (w.slope > 0.02) & (w.of(1).level < 0.3),
            lambda w: w.slope > 0.02 and w.of(1).level < 0.3,
        ),
        (lambda w: w.peak > 0.8, lambda w: bool(np.nanmax(w.values.mean(0)) > 0.8)),
        (lambda w: w.label == 1, lambda w: {1: True}.get(int(w.label), False)),
        (
            lambda w: w.distance(np.arange(4.0)) < 2.2,
            lambda w: True if w.distance(np.arange(4.0)) < 2.2 else False,  # noqa: SIM210
        ),
    ]
    options = {"min_recall": 0.0, "min_support": 1, "n_permutations": 100, "min_samples": 6}
    for vectorised, single in pairs:
        at_once, one_by_one = (index.search(p, **options) for p in (vectorised, single))
        assert at_once.made["at_once"] and not one_by_one.made["at_once"]
        assert at_once.to_dataframe().equals(one_by_one.to_dataframe())


def test_what_cannot_be_searched_for_is_refused(no_shape_checks):
    index = planted()
    cases = [
        ({}, "one of a predicate, label= and mask="),
        ({"label": 1, "mask": np.zeros(3)}, "none or several"),
        ({"label": 1, "n_permutations": 10}, "at least 100, got 10"),
        ({"label": 1, "unit": "patch"}, "unit as 'position' or 'series'"),
        ({"label": 1, "min_recall": 2}, "at most 1, got 2"),
        ({"predicate": lambda w: w.slope > 1e9}, "nothing among 240 observed positions"),
        ({"predicate": lambda w: w.slope < 1e9}, "everything among"),
        ({"predicate": lambda w: 3}, "True or False for a window, got 3"),
    ]
    for options, message in cases:
        with pytest.raises(ArgumentError, match=message):
            index.search(**options)
    with pytest.raises(LabelError, match="class 7 is outside"):
        index.search(label=7)
    with pytest.raises(SeriesShapeError, match=r"mask as bool \[series=40, pos=12\]"):
        index.search(mask=np.zeros((40, 3), dtype=bool))
    with pytest.raises(UnknownNameError, match="did you mean 'slope'"):
        index.search(lambda w: w.slop > 1)
    bare = dataclasses.replace(index, data=TimeSeriesData(index.data.series))
    with pytest.raises(LabelError, match="have no labels"):
        bare.search(label=1)
    nothing = index.search(label=1, min_support=10**6)
    assert len(nothing) == 0 and nothing.to_dataframe().empty
    with pytest.raises(ArgumentError, match="no code is active at enough places with class b"):
        nothing.best  # noqa: B018


def test_the_figure_holds_precisions_of_codes_and_rivals():
    index = planted()
    index.neurons["mlp"] = np.random.default_rng(0).normal(size=(480, 3)).astype(np.float32)
    found = index.search(label="b", n=4)
    traces = {one.name: one for one in found.figure().data}
    np.testing.assert_allclose(traces["code"].x, [c.test.precision for c in found.codes])
    np.testing.assert_allclose(
        traces["best neuron"].x, [c.neuron.test.precision for c in found.codes]
    )


def test_found_codes_name_themselves_to_interventions(model, make_book, series):
    model.add_codebook(make_book(n_groups=2, k=1), "blocks.1.attn.hook_z")
    model.add_codebook(make_book(k=1), HOOK)
    data = TimeSeriesData(series, torch.tensor([0, 1, 2, 3, 0, 1]))
    index = CodeIndex.build(model, data, progress=False)
    for hook in index.hooks:
        best = index.search(label=0, hooks=hook, min_support=1, min_recall=0.0).best
        with model.force_codes(**best.where()):
            ids = model.code_ids(series)[hook]
        ids = ids if ids.ndim == 3 else ids[:, :, best.group]
        assert (ids[..., 0] == best.code).all()
