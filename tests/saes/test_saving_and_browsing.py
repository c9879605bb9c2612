"""``saes.save`` writes what sae-lens reads, ``saes.browse`` the page that ``features`` writes."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class

from tstlens import saes
from tstlens.errors import ArgumentError, CorruptFileError, StorageError
from tstlens.model import HookedTST
from tstlens.saes.reading import features

HOOK = "blocks.0.hook_mlp_out"


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(0)
    linear = torch.nn.ModuleDict(
        {"encoder": torch.nn.Linear(8, 12), "decoder": torch.nn.Linear(12, 8)}
    )
    return saes.from_linear(linear.state_dict(), HOOK, model_name="small")


def test_a_saved_sae_is_what_sae_lens_saves(sae, tmp_path):
    folder = saes.save(sae, tmp_path / "new" / "ours")
    sae.save_model(tmp_path / "theirs")
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    sums = json.loads(written.pop("sha256.json"))["sha256"]
    assert sums == {name: sha256(content).hexdigest() for name, content in written.items()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    x = torch.randn(5, 8)
    for read in (saes.load(folder), SAE.load_from_disk(folder)):
        assert torch.equal(read(x), sae(x)) and read.cfg.metadata.hook_name == HOOK


def test_an_sae_in_training_is_written_as_the_one_for_use(tmp_path):
    config = saes.training_config("topk", 8, d_sae=12, k=3)
    training = get_sae_training_class("topk")[0](config)
    training.save_inference_model(tmp_path / "theirs")
    ours = saes.load(saes.save(training, tmp_path / "ours"))
    theirs, x = SAE.load_from_disk(tmp_path / "theirs"), torch.randn(5, 8)
    assert type(ours) is type(theirs) and torch.equal(ours(x), theirs(x))


def test_a_models_folder_knows_an_sae_that_is_saved_into_it(model, sae, tmp_path):
    model.add_sae(sae)
    model.save_pretrained(tmp_path)
    other = saes.from_linear(
        {"encoder.weight": torch.randn(12, 8), "decoder.weight": torch.randn(8, 12)}, HOOK
    )
    other.save_model(tmp_path / "saes" / HOOK)
    with pytest.raises(CorruptFileError, match="truncated or was altered"):
        saes.load(tmp_path, HOOK)
    saes.save(other, tmp_path / "saes" / HOOK)
    assert torch.equal(saes.load(tmp_path, HOOK).W_enc, other.W_enc)
    assert HookedTST.from_pretrained(tmp_path).cfg.n_layers == 2


def test_places_that_cannot_hold_an_sae_are_refused(sae, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="expected a folder at .*found a file"):
        saes.save(sae, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ArgumentError, match="expected sae as an? SAE, got"):
        saes.save("blocks.0", tmp_path / "x")  # type: ignore[arg-type]


def test_the_page_is_the_one_that_features_write(model, sae, data, tmp_path):
    options = {"effect_series": 2, "n_permutations": 100, "progress": False}
    path = saes.browse(
        model, sae, data, tmp_path / "a.html", title="Toy", n_windows=4, seed=3, **options
    )
    found = features(model, sae, data, seed=3, **options)
    expected = found.to_html(tmp_path / "b.html", title="Toy", n_windows=4, seed=3)
    assert path == tmp_path / "a.html" and path.read_bytes() == expected.read_bytes()


def test_a_page_that_cannot_be_written_is_refused_before_the_work(model, sae, data, tmp_path):
    def work(*_: object) -> None:
        raise RuntimeError("the model ran")

    model.add_hook("hook_series", work)
    with pytest.raises(StorageError, match="found a folder; name a file in it"):
        saes.browse(model, sae, data, tmp_path)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"n_steps": 5}, "'topk' has no option 'n_steps'; did you mean 'steps'. it has .*decoder"),
        ({"learning_rate": 0.1}, "did you mean 'lr'"),
        ({"batchsize": 8}, "did you mean 'batch_size'"),
        ({"aux_loss_coeff": 1.0}, "did you mean 'aux_loss_coefficient'"),
        ({"d_in": 8}, "d_in is the width of the activations at hook=, which saes.train reads off"),
        ({"d_out": 8}, "d_out is the width of the activations at hook_out="),
        ({"device": "cpu"}, r"device is the model's: model.to\(device\)"),
        ({"metadata": {}}, "leave metadata= out"),
        ({"source": {}}, "leave source= out"),
    ],
)
def test_options_of_train_that_do_not_exist_name_the_one_that_is_meant(model, data, option, words):
    with pytest.raises(ArgumentError, match=words):
        saes.train(model, data, HOOK, steps=2, progress=False, **option)
