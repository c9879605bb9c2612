"""Fitting against hand-made cases: starts, revivals, averages, accumulation, padding, resuming."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tstlens import codebooks
from tstlens.codebooks.fitting import FitRun, Usage, activations, perplexity
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, CorruptFileError, HookError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig

MLP, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


def make_model(**changes) -> HookedTST:
    return HookedTST(
        HookedTSTConfig(
            **{
                "n_layers": 2,
                "d_model": 8,
                "n_heads": 2,
                "d_mlp": 12,
                "n_channels": 2,
                "embed": PerStepConfig(),
                "head": HeadConfig("mean", n_classes=3),
                "final_norm": True,
                **changes,
            }
        )
    )


def make_data(n: int = 24, lengths: bool = False, n_time: int = 10) -> TimeSeriesData:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n) % 3
    series = torch.randn(n, 2, n_time, generator=generator)
    series = series + labels[:, None, None] * torch.tensor([1.0, -1.0])[:, None]
    mask = None
    if lengths:
        mask = torch.arange(n_time)[None] < (4 + torch.arange(n) % (n_time - 4))[:, None]
        series = series * mask[:, None]
    return TimeSeriesData(series, labels, mask=mask, class_names=("a", "b", "c"))


def fit(model, data, hooks=(MLP, Z), **options):
    options = {"n_codes": 6, "epochs": 3, "batch_size": 8, "progress": False, **options}
    return codebooks.fit(model, data, list(hooks), **options)


def test_kmeans_puts_centroids_of_the_activations_in_every_group():
    model, data = make_model(), make_data()
    config = codebooks.CodebookConfig(n_codes=5, k=2, n_groups=0, similarity="euclidean")
    book = codebooks.start(model, data, [Z], config, "kmeans")[Z]
    assert book.n_groups == 2 and not model.acts_to_codebooks
    rows = activations(model, data, Z).view(-1, 2, 4)
    for group in range(2):
        centroids = book.k * book.table[group].detach()
        nearest = torch.cdist(rows[:, group], centroids).argmin(1)
        assert len(nearest.unique()) == 5
        means = torch.stack([rows[nearest == code, group].mean(0) for code in range(5)])
        error = (rows[:, group] - centroids[nearest]).square().sum()
        assert error < 0.7 * (rows[:, group] - rows[:, group].mean(0)).square().sum()
        assert (means - centroids).abs().max() < 0.5 * rows.std()
    drawn = codebooks.start(model, data, [Z], config, "sample")[Z]
    for group in range(2):
        distance = torch.cdist(drawn.k * drawn.table[group], rows[:, group]).amin(1)
        assert distance.max() < 1e-3


def test_a_frozen_model_stays_as_it_was_and_its_tables_get_better():
    model, data = make_model(), make_data()
    before = copy.deepcopy(model.state_dict())
    books = fit(model, data, n_codes=4, begin_from="normal", epochs=30, codebook_lr=0.05)
    assert list(books) == list(model.acts_to_codebooks) == [MLP, Z]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    errors = books.to_dataframe()["reconstruction"]
    assert errors.iloc[-1] < 0.6 * errors.iloc[0]


@pytest.mark.parametrize("gradient", ["task", "reconstruction", "both"])
def test_together_model_and_codes_learn_the_task(gradient):
    model, data = make_model(), make_data(48)
    books = fit(model, data, train_model=True, gradient=gradient, epochs=25, lr=0.01, seed=1)
    task = books.to_dataframe()["task"]
    assert task.iloc[-1] < 0.5 * task.iloc[0]
    right = model(data.series).argmax(-1) == data.labels
    assert right.float().mean() > 0.9


@pytest.mark.parametrize("together", [False, True])
def test_the_same_seed_gives_the_same_and_another_does_not(together):
    tables = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(tables))
        books = fit(make_model(), make_data(), train_model=together, seed=seed)
        tables.append(books[Z].table.detach())
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("lengths", [False, True])
def test_accumulated_parts_are_one_step(lengths):
    data = make_data(24, lengths)
    fitted = []
    for accumulate in (1, 3):
        model = make_model()
        books = fit(model, data, train_model=True, accumulate=accumulate, revive=False)
        fitted.append((books[MLP].table.detach(), model.W_Q.detach()))
    for one, other in zip(*fitted, strict=True):
        assert (one - other).abs().max() <= 2e-5


def test_mixed_precision_keeps_the_tables_in_full_precision():
    model, data = make_model(), make_data()
    books = fit(model, data, train_model=True, precision="bfloat16", epochs=1)
    assert books[MLP].table.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(50, 8)
        assert torch.equal(books[MLP].encode(x), books[MLP].encode(x.float()))


def test_more_padding_changes_nothing():
    data = make_data(24, lengths=True)
    padded = TimeSeriesData(
        torch.cat([data.series, torch.full((24, 2, 7), 9.0)], 2),
        data.labels,
        mask=torch.cat([data.mask, torch.zeros(24, 7, dtype=torch.bool)], 1),
        class_names=data.class_names,
    )
    runs = []
    for given in (data, padded):
        model = make_model()
        books = fit(model, given, train_model=True, epochs=2, begin_from="sample")
        ids = model.code_ids(given.series, mask=given.mask)[MLP][:, :10]
        runs.append((books, ids, model(given.series, mask=given.mask)))
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.allclose(runs[0][2], runs[1][2], atol=1e-5)
    one, other = (run[0].to_dataframe() for run in runs)
    assert np.allclose(one["task"], other["task"], atol=1e-5)
    assert (one["dead"] == other["dead"]).all() and np.allclose(
        one["perplexity"], other["perplexity"]
    )


def test_dead_codes_come_back_to_life():
    model, data = make_model(), make_data()
    config = codebooks.CodebookConfig(n_codes=8, k=1, similarity="euclidean")
    book = codebooks.start(model, data, [MLP], config, "sample")[MLP]
    with torch.no_grad():
        book.table[0, 3:] = 1e3  # nobody is near
    rows = activations(model, data, MLP)
    used = Usage(book, seed=0)
    used.see(book.trace(rows), None)
    assert used.dead == 5 and int(used.counts.sum()) == len(rows)  # counts are positions
    optimizer = torch.optim.Adam([book.table])
    book.losses(book.trace(rows))["reconstruction"].backward()
    optimizer.step()
    assert used.revive(optimizer) == 5
    assert float(optimizer.state[book.table]["exp_avg"][0, 3:].abs().max()) == 0
    used.begin()
    used.see(book.trace(rows), None)
    assert used.dead == 0


def test_without_revival_the_dead_stay_dead():
    shares = {}
    for revive in (False, True):
        books = fit(
            make_model(),
            make_data(),
            [MLP],
            n_codes=40,
            epochs=6,
            begin_from="normal",
            revive=revive,
            similarity="euclidean",
        )
        shares[revive] = books.history[-1]["dead"]
    assert shares[True] < shares[False]


def test_moving_averages_find_the_means():
    model, data = make_model(), make_data(60)
    books = fit(
        model,
        data,
        [MLP],
        n_codes=3,
        ema=0.5,
        gradient="reconstruction",
        epochs=12,
        similarity="euclidean",
        batch_size=60,
        revive=False,
    )
    book = books[MLP]
    rows = activations(make_model(), data, MLP)
    ids = book.ids(book.encode(rows))[:, 0]
    means = torch.stack([rows[ids == code].mean(0) for code in range(3)])
    assert (means - book.table[0]).abs().max() <= 1e-2 * rows.std()


def test_tables_decay_by_a_share_of_their_learning_rate_in_every_step():
    """Codes that nobody uses have no gradient, so their entries shrink by a known factor."""
    options = {"begin_from": "normal", "n_codes": 60, "similarity": "euclidean", "revive": False}
    options |= {"codebook_lr": 0.05, "epochs": 3, "batch_size": 8}
    start = codebooks.CodebookConfig(n_codes=60, similarity="euclidean")
    before = codebooks.start(make_model(), make_data(), [MLP], start, "normal")[MLP].table
    plain = fit(make_model(), make_data(), [MLP], **options)[MLP]
    model = make_model()
    decayed = fit(model, make_data(), [MLP], weight_decay=0.4, **options)[MLP]
    ids = model.code_ids(make_data().series)[MLP]
    unmoved = (plain.table == before)[0].all(1)  # never used: no step moved it
    unmoved[ids.unique()] = False
    assert 5 < unmoved.sum() < 60
    n_steps = 3 * 3  # 24 series, 8 a step
    expected = before[0, unmoved] * (1 - 0.05 * 0.4) ** n_steps
    torch.testing.assert_close(decayed.table[0, unmoved], expected)


def test_k_falls_from_large_to_small():
    model, data = make_model(), make_data()
    books = fit(model, data, [MLP], k=1, k_start=4, epochs=6, k_epochs=4)
    assert [entry["k"] for entry in books.history] == [4, 3, 2, 1, 1, 1]
    assert books[MLP].cfg.k == 1
    assert model.code_ids(data.series)[MLP].shape == (24, 10, 1)


@pytest.mark.parametrize(
    "options", [{"train_model": True}, {"ema": 0.9, "gradient": "reconstruction"}]
)
def test_an_interrupted_fit_goes_on_and_ends_the_same(tmp_path, monkeypatch, options):
    whole = fit(make_model(), make_data(), **options)
    epoch = "_epoch_together" if options.get("train_model") else "_epoch_frozen"
    run_epoch, runs = getattr(FitRun, epoch), []

    def stop_in_the_last(self):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(run_epoch(self))
        return runs[-1]

    monkeypatch.setattr(FitRun, epoch, stop_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), make_data(), folder=tmp_path, **options)
    monkeypatch.setattr(FitRun, epoch, run_epoch)
    resumed = fit(make_model(), make_data(), folder=tmp_path, **options)
    assert torch.equal(whole[Z].table, resumed[Z].table)
    assert whole.history == resumed.history
    with pytest.raises(ArgumentError, match="holds a run with other settings .seed: 0 then, 5 now"):
        fit(make_model(), make_data(), folder=tmp_path, seed=5, **options)
    kept = torch.load(tmp_path / "progress.pt", weights_only=True)
    kept["state"]["tables!"] = kept["state"].pop("tables")
    torch.save(kept, tmp_path / "progress.pt")
    with pytest.raises(CorruptFileError, match="no whole progress of this fit"):
        fit(make_model(), make_data(), folder=tmp_path, **options)


def test_a_forecaster_is_fitted_to_its_targets():
    model = make_model(head=HeadConfig("mean", horizon=4))
    data = make_data()
    target = data.series[:, :, :4]
    unlabelled = TimeSeriesData(data.series)
    books = fit(model, unlabelled, train_model=True, target=target, epochs=20, lr=0.01)
    task = books.to_dataframe()["task"]
    assert task.iloc[-1] < task.iloc[0]
    with pytest.raises(ArgumentError, match="expected data with labels, or target="):
        fit(make_model(), unlabelled, train_model=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hooks": MLP}, "expected hooks as a sequence of names, got"),
        ({"hooks": [MLP, MLP]}, "expected one or more different hook points"),
        ({"gradient": "task"}, "gradient='task' is for train_model=True"),
        ({"ema": 0.9}, "give gradient='reconstruction'; got ema=0.9"),
        ({"k": 3, "k_start": 2}, "expected k_start >= 3, got 2"),
        ({"epochs": 0}, "epochs as an integer of at least 1, got 0"),
        ({"precision": "float16"}, "precision as 'float32' or 'bfloat16', got 'float16'"),
        ({"begin_from": "zeros"}, "begin_from as 'kmeans', 'sample' or 'normal'"),
        (
            {"ema": 0.9, "gradient": "reconstruction", "weight_decay": 0.1},
            "no step to decay in: weight_decay=0",
        ),
        ({"restore": False}, "leaves out what normalize=True takes off"),
        ({"n_codes": 500}, "expected at least n_codes=500 activations"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words, no_shape_checks):
    options = {"hooks": [MLP], "n_codes": 4, "epochs": 1, "progress": False, **options}
    with pytest.raises(ArgumentError, match=words):
        codebooks.fit(make_model(), make_data(), **options)


def test_a_model_with_codebooks_is_not_fitted_again():
    model, data = make_model(), make_data()
    fit(model, data, epochs=1)
    with pytest.raises(HookError, match="codebooks are on the model already, at blocks.0.hook_mlp"):
        fit(model, data, epochs=1)


def test_perplexity_counts_codes_used_evenly():
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]])
    assert torch.allclose(perplexity(counts), torch.tensor([4.0, 1.0, 2.0]).double())
