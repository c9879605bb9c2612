"""The index against the model's own code ids, on disk and back, and codes compared by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from tstlens.codebooks import CodebookScores, CodeIndex, CodeNotes
from tstlens.codebooks.scores import BookScore
from tstlens.data import TimeSeriesData
from tstlens.errors import (
    ArgumentError,
    ConfigVersionError,
    CorruptFileError,
    HookError,
    SeriesShapeError,
    StorageError,
    UnknownHookError,
)
from tstlens.model import HeadConfig, PerStepConfig
from tstlens.truth.regime import RegimeMachine

MLP_OUT, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


@pytest.fixture
def data(series, mask) -> TimeSeriesData:
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    return TimeSeriesData(series, labels, ("a", "b", "c", "d"), mask=mask, name="toy", split="test")


def built(model, data, **options) -> CodeIndex:
    return CodeIndex.build(model, data, progress=False, **options)


def listed(model, data, hook):
    """(table or head and group, code, row, position) of every activation, from the model's ids."""
    ids = model.code_ids(data.series, data.mask)[hook]
    ids = ids[:, :, None] if ids.ndim == 3 else ids  # [row, pos, table, k]
    found = [
        (int(table), int(code), int(row), int(pos))
        for row, pos, table, at in np.ndindex(*ids.shape)
        if (code := ids[row, pos, table, at]) >= 0
    ]
    return sorted(found)


@pytest.mark.parametrize("batch_size", [256, 4])
def test_rows_are_the_models_own_codes_without_padding(model, make_book, data, batch_size):
    model.add_codebook(make_book(k=2), MLP_OUT)
    model.add_codebook(make_book(n_groups=2, k=2), Z)
    frame = built(model, data, batch_size=batch_size).to_dataframe()
    assert list(frame.columns[:9]) == [
        *("hook", "group", "head", "code", "series", "channel", "pos", "start", "stop")
    ]
    for hook in (MLP_OUT, Z):
        part = frame[frame.hook == hook]
        rows = zip(part.group, part.code, part.series, part.pos, strict=True)
        assert sorted(rows) == listed(model, data, hook)
    assert (frame.start == frame.pos).all() and (frame.stop == frame.pos + 1).all()
    assert (frame[frame.hook == MLP_OUT]["head"] == -1).all()
    assert (frame[frame.hook == Z]["head"] == frame[frame.hook == Z].group).all()
    assert (frame.channel == -1).all()


def test_heads_that_share_a_table_and_rows_per_channel(
    make_model, per_channel_model, make_book, data
):
    model = make_model()
    model.add_codebook(make_book(d_in=4), Z)
    frame = built(model, data, neurons=False).to_dataframe()
    rows = zip(frame["head"], frame.code, frame.series, frame.pos, strict=True)
    assert sorted(rows) == listed(model, data, Z) and (frame.group == 0).all()

    per_channel_model.add_codebook(make_book(), MLP_OUT)
    whole = dataclasses.replace(data, mask=None)
    index = built(per_channel_model, whole)
    frame = index.to_dataframe()
    found = zip(frame.group, frame.code, 3 * frame.series + frame.channel, frame.pos, strict=True)
    assert sorted(found) == listed(per_channel_model, whole, MLP_OUT)
    windows = index.windows(MLP_OUT, int(frame.code[0]))
    for at in range(len(windows)):
        own = data.series[windows.series[at], windows.channel[at]].numpy()
        start = windows.first[at]
        expected = [own[t] if 0 <= t < 10 else np.nan for t in range(start, start + 8)]
        np.testing.assert_allclose(windows.values[at, 0], expected, rtol=1e-6)
        assert (windows.start[at], windows.stop[at]) == (
            2 * windows.pos[at],
            2 * windows.pos[at] + 2,
        )


def test_similarities_rank_windows_and_the_prototype_is_their_mean(model, make_book, data):
    model.add_codebook(make_book(k=2), MLP_OUT)
    index = built(model, data)
    book = index.book(MLP_OUT)
    code = int(book.support.argmax())
    windows = index.windows(MLP_OUT, code)
    assert len(windows) == windows.n_places == book.support[code]
    assert (np.diff(windows.similarity) <= 0).all()
    with model.watch_codes() as seen:
        model(data.series, mask=data.mask)
    likeness = seen[MLP_OUT].snap.similarities.detach().numpy()
    expected = likeness[windows.series, windows.pos, code]
    np.testing.assert_allclose(windows.similarity, expected, rtol=1e-5)
    one = index.windows(MLP_OUT, code, per_series=1, n=2)
    best = windows.to_dataframe().groupby("series").similarity.max().nlargest(2)
    np.testing.assert_allclose(one.similarity, best)
    raw = np.full((6, 3, 30), np.nan)  # ten samples of nothing on either side
    raw[:, :, 10:20] = np.where(data.mask[:, None], data.series, np.nan)
    cut = [
        raw[s, :, 10 + p - 3 : 10 + p + 5] for s, p in zip(windows.series, windows.pos, strict=True)
    ]
    np.testing.assert_allclose(windows.values, cut, rtol=1e-6)
    mean, spread = windows.prototype()
    np.testing.assert_allclose(mean, np.nanmean(cut, 0), rtol=1e-5)
    np.testing.assert_allclose(spread, np.nanstd(cut, 0), rtol=1e-5)


def test_bypassed_positions_are_left_out(model, make_book, data):
    model.add_codebook(make_book(), MLP_OUT, bypass=[0, -1])
    index = built(model, data)
    assert not set(index.to_dataframe().pos) & {0, 9}
    assert not index.book(MLP_OUT).observed.reshape(6, 10)[:, [0, 9]].any()


def test_neurons_are_what_the_codebook_and_the_head_of_the_mlp_saw(model, make_book, data):
    model.add_codebook(make_book(), MLP_OUT)
    index = built(model, data, batch_size=4)
    hidden = "blocks.0.mlp.hook_post"
    assert set(index.neurons) == {MLP_OUT, hidden}
    _, cache = model.run_with_cache(data.series, mask=data.mask)
    for name, key in ((MLP_OUT, f"{MLP_OUT}.hook_sae_input"), (hidden, hidden)):
        expected = cache[key].flatten(0, 1).detach().numpy()
        np.testing.assert_allclose(index.neurons[name], expected, atol=1e-6)
    with pytest.raises(ArgumentError, match="more than memory=1e-06; give neurons=False"):
        built(model, data, memory=1e-6)
    assert built(model, data, neurons=False).neurons == {}


def test_an_index_comes_back_as_it_was_saved(model, make_book, data, tmp_path):
    model.add_codebook(make_book(k=2), MLP_OUT)
    model.add_codebook(make_book(n_groups=2), Z)
    states = np.arange(60).reshape(6, 10) % 3
    index = built(
        model, data, test=data[:4], columns={"state": states}, test_columns={"state": states[:4]}
    )
    index.save(tmp_path / "codes")
    index.save(tmp_path / "codes")  # replaced as a whole
    assert sorted(one.name for one in tmp_path.iterdir()) == ["codes"]
    again = CodeIndex.load(tmp_path / "codes")
    pd.testing.assert_frame_equal(index.to_dataframe(), again.to_dataframe())
    assert again.test is not None and index.test is not None
    pd.testing.assert_frame_equal(index.test.to_dataframe(), again.test.to_dataframe())
    for name, values in index.neurons.items():
        np.testing.assert_array_equal(values, again.neurons[name])
    np.testing.assert_array_equal(again.columns["state"], states)
    assert torch.equal(again.data.series, index.data.series)
    assert again.data.class_names == data.class_names and again.made == index.made
    own = pd.read_parquet(tmp_path / "codes" / "codes.parquet")  # by anybody's reader
    pd.testing.assert_frame_equal(own, index.to_dataframe(), check_dtype=False)
    options = {"min_support": 1, "min_recall": 0.0, "n_permutations": 100}
    first, second = (one.search(label="b", **options) for one in (index, again))
    pd.testing.assert_frame_equal(first.to_dataframe(), second.to_dataframe())


@pytest.mark.parametrize("name", ["codes.parquet", "arrays.safetensors"])
def test_a_file_that_was_altered_or_cut_is_noticed(model, make_book, data, tmp_path, name):
    model.add_codebook(make_book(), MLP_OUT)
    folder = built(model, data).save(tmp_path / "codes")
    content = (folder / name).read_bytes()
    altered = bytearray(content)
    altered[len(content) // 2] ^= 1
    for broken in (bytes(altered), content[:-7]):
        (folder / name).write_bytes(broken)
        with pytest.raises(CorruptFileError, match="truncated or was altered"):
            CodeIndex.load(folder)
    (folder / name).unlink()
    with pytest.raises(CorruptFileError, match=f"expected {name}"):
        CodeIndex.load(folder)


def test_what_is_no_index_is_refused(model, make_book, data, tmp_path, monkeypatch):
    model.add_codebook(make_book(), MLP_OUT)
    index = built(model, data, neurons=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="holds something else than an index"):
        index.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(StorageError, match="found a file"):
        index.save(tmp_path / "mine" / "thesis.txt")
    with pytest.raises(StorageError, match="expected index.json"):
        CodeIndex.load(tmp_path / "mine")
    folder = index.save(tmp_path / "codes")
    record = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**record, "format_version": 2}))
    with pytest.raises(ConfigVersionError, match="format version 2"):
        CodeIndex.load(folder)
    index.save(folder)
    before = (folder / "codes.parquet").read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tstlens.codebooks.index._fill", broken)
    with pytest.raises(StorageError, match="could not write the index"):
        index.save(folder)
    assert (folder / "codes.parquet").read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["codes", "mine"]


def test_similar_codes_by_places_and_by_angle(model, make_book, data):
    book = make_book(k=3)
    model.add_codebook(book, MLP_OUT)
    index = built(model, data)
    ids = model.code_ids(data.series, data.mask)[MLP_OUT].reshape(60, 3)
    places = {code: set(np.flatnonzero((ids == code).any(1))) for code in range(16)}
    code = max(places, key=lambda one: len(places[one]))
    frame = index.similar(MLP_OUT, code, n=15).to_dataframe()
    for row in frame.itertuples():
        both, either = places[code] & places[row.code], places[code] | places[row.code]
        assert row.overlap == pytest.approx(len(both) / len(either))
        expected = len(places[code]) * len(places[row.code]) / int(data.mask.sum())
        if expected:
            assert row.lift == pytest.approx(len(both) / expected)
    assert frame.overlap.is_monotonic_decreasing and code not in set(frame.code)
    by_angle = index.similar(MLP_OUT, code, by="cosine", n=15).to_dataframe()
    table = book.table.detach()[0]
    expected = torch.nn.functional.cosine_similarity(table, table[code][None])
    np.testing.assert_allclose(by_angle.cosine, expected[by_angle.code.tolist()], atol=1e-6)
    assert by_angle.cosine.is_monotonic_decreasing


def test_codes_that_change_and_codes_in_common(model, make_book, data):
    model.add_codebook(make_book(k=2), MLP_OUT)
    index = built(model, data)
    ids = model.code_ids(data.series, data.mask)[MLP_OUT]
    has = np.stack([(ids == code).any(-1).numpy() for code in range(16)])  # [code, series, pos]
    seen = data.mask.numpy()
    frame = index.changes(0, 1).to_dataframe().set_index("code")
    assert set(frame.index) == set(np.flatnonzero(has[:, :2].any((1, 2))))
    for code, row in frame.iterrows():
        first, second = has[code, 0], has[code, 1]
        assert row.share == pytest.approx(first.sum() / 10)
        assert row.share_other == pytest.approx(second.sum() / 6)
        assert row.only == (first & ~second & seen[1]).sum()
        assert row.only_other == (second & ~first & seen[0]).sum()
        assert row.both == (first & second).sum()
    assert frame.difference.abs().is_monotonic_decreasing
    anywhere = has.any(2)
    for options, members in (({"label": "a"}, [0, 4]), ({"series": [1, 2, 5]}, [1, 2, 5])):
        rest = [one for one in range(6) if one not in members]
        for at_least in (1.0, 0.5):
            frame = index.common(**options, at_least=at_least).to_dataframe()
            inside = anywhere[:, members].mean(1)
            assert set(frame.code) == set(np.flatnonzero(inside >= at_least))
            np.testing.assert_allclose(frame.inside, inside[frame.code])
            np.testing.assert_allclose(frame.outside, anywhere[:, rest].mean(1)[frame.code])


def test_states_of_a_regime_series_come_with_the_index(make_model, make_book):
    machine = RegimeMachine(seed=0)
    series = machine.sample(4, 6, seed=1)
    model = make_model(
        n_channels=1, n_time=series.n_time, embed=PerStepConfig(), head=HeadConfig("mean", 2)
    )
    model.add_codebook(make_book(), MLP_OUT)
    states = series.states.repeat_interleave(series.patch_len, 1)
    index = built(model, series, columns={"state": states}, neurons=False)
    np.testing.assert_array_equal(index.columns["state"], states)
    assert type(index.data) is TimeSeriesData


def test_errors_of_an_index(model, make_model, make_book, data, no_shape_checks):
    with pytest.raises(HookError, match="no codebook is on the model"):
        built(model, data)
    model.add_codebook(make_book(n_groups=2), Z)
    model.add_codebook(make_book(), MLP_OUT)
    with pytest.raises(UnknownHookError, match="blocks.7"):
        built(model, data, hooks=["blocks.7.hook_mlp_out"])
    with pytest.raises(ArgumentError, match="with a name of their own .* got 'slope'"):
        built(model, data, columns={"slope": np.zeros((6, 10))})
    with pytest.raises(SeriesShapeError, match=r"\[series=6, pos=10\], got int64 \[6\]"):
        built(model, data, columns={"state": np.arange(6)})
    other = dataclasses.replace(data, class_names=("a", "b", "c", "e"))
    with pytest.raises(ArgumentError, match="data and test with the same classes"):
        built(model, data, test=other)
    index = built(model, data)
    with pytest.raises(UnknownHookError, match="Only these are in the index"):
        index.windows("blocks.1.hook_mlp_out", 3)
    with pytest.raises(
        ArgumentError, match="code 3 at .*hook_z names one code in each of 2 tables"
    ):
        index.windows(Z, 3)
    assert index.windows(Z, 3, head=1).group == 1
    with pytest.raises(ArgumentError, match=r"expected code in 0..15 at .* got 16"):
        index.windows(MLP_OUT, 16)
    with pytest.raises(ArgumentError, match="codes at blocks.0.hook_mlp_out have no head"):
        index.windows(MLP_OUT, 3, head=0)
    with pytest.raises(ArgumentError, match=r"expected a series in 0..5, got 6"):
        index.changes(0, 6)
    with pytest.raises(ArgumentError, match="either series or label="):
        index.common()
    model.set_snapping(False)
    with pytest.raises(HookError, match="switched off"):
        built(model, data)


def test_figures_hold_the_numbers(model, make_book, data):
    model.add_codebook(make_book(k=2), MLP_OUT)
    index = built(model, data)
    code = int(index.book(MLP_OUT).support.argmax())
    windows = index.windows(MLP_OUT, code)
    mean, _ = windows.prototype()
    lines = [one.y for one in windows.figure().data if one.line.width == 2.4]
    np.testing.assert_allclose(lines, mean)
    similar = index.similar(MLP_OUT, code, n=5)
    np.testing.assert_allclose(similar.figure().data[0].x, similar.overlap)
    changed = index.changes(0, 2)
    np.testing.assert_allclose(changed.figure(n=4).data[0].x, np.diff(changed.share)[:4, 0])
    common = index.common(series=[0, 2], at_least=0.5)
    np.testing.assert_allclose(common.figure(n=99).data[0].x, common.outside)
    used = np.sort(index.book(MLP_OUT).support / int(data.mask.sum()))[::-1]
    np.testing.assert_allclose(index.figure().data[0].y, used[used > 0])
    with pytest.raises(ArgumentError, match=r"channels in 0..2, got \[5\]"):
        windows.figure(channels=[5])


def test_the_figure_of_scores_has_a_bar_per_row_and_hook_point():
    books = {
        row: tuple(BookScore(hook, value, 16, 1, 9.0, 4.0, 3.5) for hook in (MLP_OUT, Z))
        for row, value in (("codebooks", 0.9), ("random tables", -2.5))
    }
    task = {"codebooks": {"accuracy": 0.8}, "original": {"accuracy": 0.9}}
    task["random tables"] = {"accuracy": 0.3}
    figure = CodebookScores(task, books, "toy test", 6).figure()
    accuracy, first, second = figure.data
    assert dict(zip(accuracy.y, accuracy.x, strict=True)) == {
        row: measures["accuracy"] for row, measures in task.items()
    }
    for bars in (first, second):  # the bar that would flatten the others is cut, its number is not
        assert list(bars.y) == ["codebooks", "random tables"] and list(bars.x) == [0.9, -0.1]
        assert bars.text[1] == "−2.50"
    titles = [one.text for one in figure.layout.annotations]
    assert titles[1:3] == ["explained variance at L0.mlp_out", "explained variance at L1.attn.z"]


def test_notes_are_kept_merged_and_refused_when_they_are_none(tmp_path):
    notes = CodeNotes().add("rising", MLP_OUT, 3).add("late é", Z, 4, group=1, head=1)
    again = CodeNotes.load(notes.save(tmp_path / "notes.json"))
    assert again == notes and again.get(Z, 4, group=1, head=1) == "late é"
    assert again.get(MLP_OUT, 4) is None and len(again.add("  ", MLP_OUT, 3)) == 1
    merged = notes.merge(CodeNotes().add("slow", MLP_OUT, 3).add("new", MLP_OUT, 9))
    assert merged.get(MLP_OUT, 3) == "rising\nslow" and merged.get(MLP_OUT, 9) == "new"
    assert notes.merge(notes) == notes
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="is not notes on codes"):
        CodeNotes.load(tmp_path / "other.json")
    with pytest.raises(StorageError, match="found no file"):
        CodeNotes.load(tmp_path / "none.json")
