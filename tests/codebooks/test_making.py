"""From a model to a folder with codebooks and their scores."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from tests.codebooks.test_fitting import MLP, make_data, make_model
from tstlens import codebooks
from tstlens.codebooks import making
from tstlens.errors import ArgumentError, StorageError

OPTIONS = {"n_codes": 6, "epochs": 2, "train_model": True, "progress": False, "sae_steps": 5}


@pytest.fixture
def splits(monkeypatch):
    """Two splits in the place of a data set's."""
    found = {"train": make_data(24), "test": make_data(30)}
    monkeypatch.setattr(making, "load_described", lambda described, split: found[split])
    return found


@pytest.fixture
def model():
    made = make_model(model_name="tiny")
    made.info = {"data": {"name": "tiny", "scaling": None}}
    return made


def test_the_folder_holds_the_tuned_model_its_codes_and_its_scores(model, splits, tmp_path):
    before = copy.deepcopy(model.state_dict())
    books, scores = codebooks.make_codebooks(
        model, [MLP], tmp_path / "made", command="tstlens codebook make tiny", **OPTIONS
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.acts_to_codebooks
    again = codebooks.load(tmp_path / "made")
    assert torch.equal(again.acts_to_codebooks[MLP].table, books[MLP].table)
    test = splits["test"]
    right = float((again(test.series).argmax(1) == test.labels).double().mean())
    assert scores.task["codebooks"]["accuracy"] == right
    assert not torch.equal(again.W_Q, model.W_Q) and again.parity is None
    record = json.loads((tmp_path / "made" / "scores.json").read_text())
    assert record["task"] == scores.task and record["history"] == books.history
    assert again.info["data"] == model.info["data"]
    assert again.info["codebooks"]["fit"]["n_codes"] == 6
    readme = (tmp_path / "made" / "README.md").read_text()
    assert readme.startswith("# tiny with codebooks\n")
    assert f"| codebooks | {right:.2%} |" in readme
    assert f'codebooks.load("{(tmp_path / "made").as_posix()}")' in readme
    assert "tstlens codebook make tiny" in readme


def test_fitted_on_the_training_split_and_scored_on_the_other(model, splits, tmp_path):
    _, scores = codebooks.make_codebooks(model, [MLP], tmp_path / "made", **OPTIONS)
    tuned = make_model(model_name="tiny")
    fit = {name: value for name, value in OPTIONS.items() if name != "sae_steps"}
    codebooks.fit(tuned, splits["train"], [MLP], **fit)
    by_hand = codebooks.score(tuned, splits["test"], sae_steps=0)
    assert scores.task["codebooks"] == by_hand.task["codebooks"]
    assert scores.n_series == 30 and scores.made["sae_steps"] == 5
    assert {"original", "original, codebooks untuned", "SAEs"} <= set(scores.task)


def test_no_saes_where_none_are_asked_for(model, splits, tmp_path):
    options = {**OPTIONS, "sae_steps": 0}
    _, scores = codebooks.make_codebooks(model, [MLP], tmp_path / "made", **options)
    assert "SAEs" not in scores.task


def test_a_model_that_is_there_is_replaced_only_when_asked(model, splits, tmp_path):
    folder = tmp_path / "tiny" / "codebooks"  # where a checkpoint keeps them
    codebooks.make_codebooks(model, [MLP], folder, **OPTIONS)
    assert 'codebooks.load("tiny")' in (folder / "README.md").read_text()
    before = (folder / "scores.json").read_text()
    with pytest.raises(ArgumentError, match=r"holds a model already; .* overwrite=True"):
        codebooks.make_codebooks(model, [MLP], folder, **OPTIONS)
    assert (folder / "scores.json").read_text() == before
    assert list(codebooks.load(tmp_path / "tiny").acts_to_codebooks) == [MLP]
    later = "blocks.1.hook_mlp_out"
    codebooks.make_codebooks(model, [later], folder, overwrite=True, **OPTIONS)
    assert list(codebooks.load(folder).acts_to_codebooks) == [later]  # nothing is left of the other


def test_what_cannot_be_made_is_refused(model, splits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("here")
    with pytest.raises(StorageError):
        codebooks.make_codebooks(model, [MLP], tmp_path / "file", **OPTIONS)
    monkeypatch.undo()
    model.info = {}
    with pytest.raises(ArgumentError, match="data"):
        codebooks.make_codebooks(model, [MLP], tmp_path / "made", **OPTIONS)
    assert not (tmp_path / "made").exists()
