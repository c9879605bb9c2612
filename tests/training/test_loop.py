"""The training loop: seeded, resumable bit for bit, choosing on held-out training series."""

from __future__ import annotations

import json

import pytest
import torch

import tstlens.training.loop as run
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    LabelError,
    SeriesValueError,
)
from tstlens.training import Augment, evaluate, stratified_split, train

QUICK = {"epochs": 4, "batch_size": 8, "progress": False}


def assert_same_weights(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, n_epochs):
    """Make the run die just after its n-th checkpoint was written."""
    real, written = run.save_progress, []

    def save(*args):
        real(*args)
        written.append(1)
        if len(written) == n_epochs:
            raise Interrupted

    monkeypatch.setattr(run, "save_progress", save)


def test_a_planted_difference_is_learnt(make_data, fresh):
    model = fresh()
    result = train(model, make_data(n=60), epochs=20, batch_size=8, lr=2e-3, progress=False)
    assert evaluate(model, make_data(n=60, seed=9)).accuracy > 0.9
    frame = result.to_dataframe()
    assert frame.train_loss.iloc[-1] < 0.5 * frame.train_loss.iloc[0]
    assert not model.training


@pytest.mark.parametrize(
    ("schedule", "masked"), [("constant", False), ("cosine", True), ("onecycle", False)]
)
@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    make_data, fresh, monkeypatch, tmp_path, schedule, stop_after, masked
):
    data = make_data(masked=masked)
    kwargs = {"schedule": schedule, "refit": True, "augment": Augment(jitter=0.1, scale=0.1)}
    straight, resumed = fresh(), fresh()
    expected = train(straight, data, **QUICK, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, min(stop_after, len(expected.history)))
        train(fresh(), data, **QUICK, **kwargs, checkpoint=tmp_path)
    torch.randn(7)  # the global random state in between does not matter
    came = train(resumed, data, **QUICK, **kwargs, checkpoint=tmp_path)
    assert_same_weights(straight, resumed)
    assert came.history == expected.history
    assert came.best_epoch == expected.best_epoch


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "radam", "nadam", "sgd"])
def test_every_optimiser_resumes_and_a_finished_run_is_not_trained_further(
    fresh, data, tmp_path, optimizer, monkeypatch
):
    first, again = fresh(), fresh()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 2)
        train(fresh(), data, **QUICK, optimizer=optimizer, checkpoint=tmp_path)
    train(first, data, **QUICK, optimizer=optimizer, checkpoint=tmp_path)
    result = train(again, data, **QUICK, optimizer=optimizer, checkpoint=tmp_path)
    straight = fresh()
    train(straight, data, **QUICK, optimizer=optimizer)
    assert_same_weights(first, again)
    assert_same_weights(first, straight)
    assert len(result.history) == QUICK["epochs"]


@pytest.mark.parametrize("entry", ["epoch", "history", "model", "optimizer", "generator", "random"])
@pytest.mark.parametrize("inside", [False, True])
def test_progress_whose_entries_are_damaged_is_no_progress(
    fresh, data, tmp_path, monkeypatch, entry, inside
):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        train(fresh(), data, **QUICK, checkpoint=tmp_path)
    kept = torch.load(tmp_path / "progress.pt", weights_only=True)
    part, name = kept["state"], entry
    if inside and isinstance(part[entry], dict):
        part, name = part[entry], next(iter(part[entry]))
    part[f"{name}!"] = part.pop(name)
    torch.save(kept, tmp_path / "progress.pt")
    with pytest.raises(CorruptFileError, match="no whole progress of this run"):
        train(fresh(), data, **QUICK, checkpoint=tmp_path)


def test_a_write_that_dies_leaves_the_previous_checkpoint_whole(fresh, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        train(fresh(), data, **QUICK, checkpoint=tmp_path)
    before = (tmp_path / "progress.pt").read_bytes()

    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        train(fresh(), data, **QUICK, checkpoint=tmp_path)
    assert (tmp_path / "progress.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["progress.pt"]


def test_the_seed_repeats_and_another_seed_differs(fresh, data):
    first, same, other = fresh(), fresh(), fresh()
    random_state = torch.get_rng_state()
    train(first, data, **QUICK, seed=5, augment=Augment(mixup=0.3, shift=0.1))
    assert torch.equal(torch.get_rng_state(), random_state)  # the caller's is put back
    torch.randn(3)
    train(same, data, **QUICK, seed=5, augment=Augment(mixup=0.3, shift=0.1))
    train(other, data, **QUICK, seed=6, augment=Augment(mixup=0.3, shift=0.1))
    assert_same_weights(first, same)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_best_val_keeps_the_weights_of_the_best_epoch(fresh, data):
    model = fresh()
    result = train(model, data, epochs=10, batch_size=8, lr=3e-3, progress=False)
    rows = result.history
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert result.best_epoch == best["epoch"]
    _, held = stratified_split(data.labels, 0.2, seed=0)
    checked = evaluate(model, data[held])
    assert checked.accuracy == best["val_accuracy"]
    assert checked.cross_entropy == pytest.approx(best["val_loss"], abs=1e-12)


def test_a_refit_equals_training_on_everything_for_the_chosen_epochs(fresh, data):
    refitted, direct = fresh(), fresh()
    result = train(refitted, data, epochs=6, batch_size=8, refit=True, progress=False, seed=2)
    train(
        direct,
        data,
        epochs=result.best_epoch,
        batch_size=8,
        select="last",
        val_fraction=0.0,
        progress=False,
        seed=2,
    )
    assert_same_weights(refitted, direct)


def test_the_result_is_plain_json(fresh, data):
    result = train(fresh(), data, **QUICK, augment=Augment(jitter=0.1))
    assert json.loads(json.dumps(result.to_dict()))["settings"]["augment"]["jitter"] == 0.1


def test_the_bar_shows_loss_and_accuracy(fresh, data, capsys):
    train(fresh(), data, epochs=2, batch_size=8, progress=True)
    shown = capsys.readouterr().err
    assert "loss=" in shown and "accuracy=" in shown and "val_accuracy=" in shown


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"optimizer": "adanw"}, ArgumentError, "did you mean 'adamw'"),
        ({"schedule": "linear"}, ArgumentError, "'cosine', 'onecycle' or 'constant'"),
        ({"select": "best"}, ArgumentError, "did you mean 'best_val'"),
        ({"epochs": 0}, ArgumentError, "epochs as an integer of at least 1, got 0"),
        ({"lr": 0.0}, ArgumentError, "lr as a positive number"),
        ({"val_fraction": 0.0}, ArgumentError, "give val or a val_fraction above 0"),
        ({"val_fraction": 1.5}, ArgumentError, "val_fraction: expected between 0 and 1, got 1.5"),
        (
            {"val_fraction": 0.0, "select": "last", "refit": True},
            ArgumentError,
            "refit: expected a val_fraction above 0",
        ),
        ({"lr": 1e30, "clip_norm": None}, ArgumentError, "no longer finite in epoch .* lower lr"),
    ],
)
def test_arguments_that_are_not_possible_are_refused_in_words(fresh, data, kwargs, error, words):
    with pytest.raises(error, match=words):
        train(fresh(), data, **{**QUICK, **kwargs})


def test_data_that_do_not_fit_are_refused_in_words(make_data, fresh, data):
    data.series[3, 0, 4] = torch.nan
    with pytest.raises(SeriesValueError, match="finite series, got NaN or infinity"):
        train(fresh(), data, **QUICK)
    data.series[3, 0, 4] = 0.0
    data.labels[0] = 3
    with pytest.raises(LabelError, match=r"all in 0\.\.2, got \[0, 1, 2, 3\]"):
        train(fresh(), data, **QUICK)
    with pytest.raises(ArgumentError, match="which the data's mask would not follow"):
        train(fresh(), make_data(masked=True), **QUICK, augment=Augment(shift=0.1))


def test_a_checkpoint_of_another_run_or_half_a_one_is_refused(make_data, fresh, data, tmp_path):
    train(fresh(), data, **QUICK, checkpoint=tmp_path)
    with pytest.raises(ArgumentError, match=r"other settings \(seed: 0 then, 1 now\)"):
        train(fresh(), data, **QUICK, seed=1, checkpoint=tmp_path)
    with pytest.raises(ArgumentError, match=r"data: .*crc32"):
        train(fresh(), make_data(seed=1), **QUICK, checkpoint=tmp_path)
    with pytest.raises(ArgumentError, match=r"model: .*'n_parameters'"):
        train(fresh(n_layers=1), data, **QUICK, checkpoint=tmp_path)
    path = tmp_path / "progress.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match="not whole.*; delete it to start anew"):
        train(fresh(), data, **QUICK, checkpoint=tmp_path)
