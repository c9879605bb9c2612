"""Autoencoders of others, shipped SAEs, and an SAE saved with its model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tstlens
from tstlens import saes
from tstlens.errors import CorruptFileError, StateDictError, UnknownCheckpointError
from tstlens.model import seal_checkpoint

MLP_OUT = "blocks.0.hook_mlp_out"


def test_a_device_may_be_torchs_own():
    there = torch.device("cpu")
    sae = saes.load("japanese-vowels", MLP_OUT, device=there)
    assert sae.W_dec.device == there and sae.cfg.device == "cpu"
    assert saes.training_config("topk", 8, device=there).device == "cpu"


def two_layers(d_in=6, d_sae=10, **options):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"encoder": nn.Linear(d_in, d_sae, **options), "decoder": nn.Linear(d_sae, d_in, **options)}
    )


@pytest.mark.parametrize("bias", [True, False])
def test_an_imported_autoencoder_gives_the_same(bias):
    layers, x = two_layers(bias=bias), torch.randn(20, 6)
    sae = saes.from_linear(layers.state_dict(), MLP_OUT)
    expected = layers["decoder"](layers["encoder"](x).relu())
    torch.testing.assert_close(sae(x), expected, atol=1e-6, rtol=0)
    assert sae.cfg.metadata.hook_name == MLP_OUT


def test_other_names_of_the_layers_tied_weights_and_a_subtracted_bias():
    layers, x = two_layers(), torch.randn(20, 6)
    names = {"encoder.weight": "module.enc.0.weight", "encoder.bias": "module.enc.0.bias"}
    names |= {"decoder.weight": "module.dec.weight", "decoder.bias": "module.dec.bias"}
    renamed = {names[key]: value for key, value in layers.state_dict().items()}
    assert torch.equal(
        saes.from_linear(renamed, MLP_OUT)(x), saes.from_linear(layers.state_dict(), MLP_OUT)(x)
    )
    encoder = layers["encoder"]
    tied = saes.from_linear({"encoder.weight": encoder.weight}, MLP_OUT)
    torch.testing.assert_close(tied(x), (x @ encoder.weight.T).relu() @ encoder.weight)
    centred = saes.from_linear(layers.state_dict(), MLP_OUT, subtract_decoder_bias=True)
    latents = layers["encoder"](x - layers["decoder"].bias).relu()
    torch.testing.assert_close(centred.encode(x), latents)


def test_the_reference_autoencoder_gives_the_same(reference_folder):
    state = torch.load(reference_folder / "sae_enc0lin2.pth", weights_only=True)
    weights = torch.load(reference_folder / "TST_japanesevowels.pth", weights_only=True)
    model = tstlens.convert(weights, family="conv-tst", n_heads=8)
    data = tstlens.load_dataset("JapaneseVowels", split="test")
    sae = saes.from_linear(state, MLP_OUT)
    _, cache = model.run_with_cache(data.series, names_filter=[MLP_OUT])
    x = cache[MLP_OUT].detach()
    latents = torch.relu(x @ state["encoder.weight"].T + state["encoder.bias"])
    expected = latents @ state["decoder.weight"].T + state["decoder.bias"]
    scale = float(expected.abs().max())
    assert float((sae.encode(x) - latents).abs().max()) <= 1e-6 * scale
    assert float((sae(x) - expected).abs().max()) <= 1e-6 * scale
    by_hook = model.run_with_hooks(data.series, fwd_hooks=[(MLP_OUT, lambda x, hook: expected)])
    torch.testing.assert_close(
        model.run_with_saes(data.series, saes=sae), by_hook, atol=1e-5, rtol=0
    )


def test_state_dicts_that_are_something_else_are_refused():
    state = two_layers().state_dict()
    with pytest.raises(StateDictError, match="expected an encoder's weight"):
        saes.from_linear({"w": torch.zeros(3, 3)}, MLP_OUT)
    with pytest.raises(StateDictError, match="got norm.weight beside them"):
        saes.from_linear({**state, "norm.weight": torch.zeros(6)}, MLP_OUT)
    with pytest.raises(StateDictError, match=r"\[width=6, latent=10\]"):
        saes.from_linear({**state, "decoder.weight": torch.zeros(6, 9)}, MLP_OUT)
    with pytest.raises(StateDictError, match=r"encoder.bias \[10\], got \[3\]"):
        saes.from_linear({**state, "encoder.bias": torch.zeros(3)}, MLP_OUT)


def test_an_sae_saved_with_its_model_loads_again(model, data, tmp_path):
    sae = saes.train(model, data, MLP_OUT, d_sae=16, steps=5, batch_size=64, progress=False)
    model.add_sae(sae)
    model.save_pretrained(tmp_path / "model")
    assert saes.list_saes(tmp_path / "model") == [MLP_OUT]
    again = saes.load(tmp_path / "model", MLP_OUT)
    x = torch.randn(5, 8)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(saes.load(tmp_path / "model" / "saes" / MLP_OUT).W_dec, sae.W_dec)
    with pytest.raises(UnknownCheckpointError, match=f"did you mean '{MLP_OUT}'"):
        saes.load(tmp_path / "model", "blocks.1.hook_mlp_out")
    (tmp_path / "model" / "saes" / MLP_OUT / "sae_weights.safetensors").write_bytes(b"no")
    seal_checkpoint(tmp_path / "model")
    with pytest.raises(CorruptFileError, match="holds no SAE"):
        saes.load(tmp_path / "model", MLP_OUT)


def test_a_dictionary_that_its_model_was_not_saved_with_is_refused(model, data, tmp_path):
    folder = tmp_path / "model"
    small = {"d_sae": 16, "k": 2, "steps": 2, "batch_size": 64, "progress": False}
    model.add_sae(saes.train(model, data, MLP_OUT, **small))
    model.save_pretrained(folder)
    own = folder / "saes" / MLP_OUT
    config = json.loads((own / "cfg.json").read_text())
    (own / "cfg.json").write_text(json.dumps({**config, "k": 3}))  # valid, and other results
    words = r"cfg.json is truncated or was altered: its SHA-256 is \w{12}…, .*config.json records"
    for given in ((folder, MLP_OUT), (own,)):
        with pytest.raises(CorruptFileError, match=words + ".*seal_checkpoint"):
            saes.load(*given)
    seal_checkpoint(folder)
    assert saes.load(folder, MLP_OUT).cfg.k == 3
    model.reset_saes()
    other = saes.train(model, data, MLP_OUT, seed=1, **small)
    other.save_model(own)
    with pytest.raises(CorruptFileError, match="is truncated or was altered"):
        saes.load(folder, MLP_OUT)
    seal_checkpoint(folder)
    assert torch.equal(saes.load(folder, MLP_OUT).W_dec, other.W_dec)
    other.save_model(tmp_path / "elsewhere")  # in no model's folder: nothing to compare with
    assert torch.equal(saes.load(tmp_path / "elsewhere").W_dec, other.W_dec)


@pytest.mark.parametrize("hook", [MLP_OUT, "blocks.1.hook_normalized_resid_post"])
def test_shipped_saes_score_what_their_folder_says(hook):
    """On the test split: L0 of 8, 90 % of the variance, at most a point of accuracy lost."""
    model = tstlens.HookedTST.from_pretrained("japanese-vowels")
    data = tstlens.load_dataset("JapaneseVowels", split="test")
    sae = saes.load("japanese-vowels", hook)
    scores = saes.score(model, sae, data)
    folder = tstlens.model.folders.find_checkpoint("japanese-vowels") / "saes" / hook
    recorded = json.loads((folder / "scores.json").read_text())
    for row, expected in zip(scores.rows, recorded["dictionaries"], strict=True):
        assert row.name == expected["dictionary"]
        for name in ("explained_variance", "l0"):
            assert getattr(row, name) == pytest.approx(expected[name], abs=1e-3)
        assert row.task["accuracy"] == pytest.approx(expected["accuracy"], abs=3 / 370)
    assert sae.cfg.d_sae == 4 * sae.cfg.d_in and scores.trained.l0 <= 16
    assert scores.trained.explained_variance >= 0.9
    lost = scores.task["original"]["accuracy"] - scores.trained.task["accuracy"]
    assert lost <= 0.01
    assert "saes" not in tstlens.list_checkpoints()
