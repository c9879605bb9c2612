"""``tstlens sae train`` and ``tstlens sae browse``: what they write, say and refuse."""

from __future__ import annotations

import json

import pytest
import torch
from sae_lens import SAE

from tests.test_cli import run
from tstlens import HookedTST, load_dataset, saes

HOOK = "blocks.0.hook_mlp_out"
TRAIN = ("sae", "train", "gunpoint", HOOK, "--d-sae", "24", "--k", "3", "--batch-size", "64")


@pytest.fixture
def trained(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *TRAIN, "--steps", "20", "--quiet")
    assert code == 0 and not err
    return tmp_path / f"sae-{HOOK}", out


def test_a_trained_sae_is_saved_with_its_scores(trained):
    folder, out = trained
    made = SAE.load_from_disk(folder)
    assert made.cfg.d_sae == 24 and made.cfg.metadata.hook_name == HOOK
    assert made.cfg.metadata.dataset_path == "GunPoint"
    record = json.loads((folder / "scores.json").read_text())
    model = HookedTST.from_pretrained("gunpoint")
    data = load_dataset("GunPoint", split="test", scaling=model.info["data"].get("scaling"))
    again = saes.score(model, made, data)
    assert [row["dictionary"] for row in record["dictionaries"]] == [
        "trained", "random, topk", "random, pursuit", "neurons",
    ]  # fmt: skip
    shown = again.to_dataframe()["explained_variance"].tolist()
    found = [row["explained_variance"] for row in record["dictionaries"]]
    torch.testing.assert_close(torch.tensor(shown), torch.tensor(found), atol=1e-5, rtol=1e-5)
    for word in ("trained", "random, topk", "neurons", f"{found[0]:.4f}", f"saved  sae-{HOOK}"):
        assert word in out
    command = record["command"]
    assert (
        command.startswith("tstlens sae train gunpoint")
        and command in (folder / "README.md").read_text()
    )


def test_the_page_of_a_trained_sae(trained, monkeypatch, capsys, tmp_path):
    folder, _ = trained
    arguments = ("sae", "browse", "gunpoint", str(folder), "--windows", "4", "--quiet")
    code, out, _ = run(monkeypatch, capsys, *arguments)
    page = tmp_path / "gunpoint-features.html"
    assert code == 0 and "gunpoint-features.html" in out
    text = page.read_text(encoding="utf-8")
    assert '"rowCount":24' in text.replace(" ", "") and HOOK in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "gunpoint", "blocks.0.hook_mlp_uot"), "did you mean 'blocks.0.hook_mlp_out'"),
        (("train", "gunpoint", HOOK, "--architecture", "topp"), "unknown"),
        (("train", "gunpoint", "blocks.0.attn.hook_pattern"), "no feature axis"),
        (("browse", "gunpoint"), "no SAE ships with 'gunpoint'; give the folder of one"),
        (("browse", "gunpoint", "nowhere"), "nowhere"),
    ],
)
def test_bad_arguments_of_the_sae_commands_are_named(
    monkeypatch, capsys, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, "sae", *arguments)
    assert code == 1 and message in err and not out
    assert not list(tmp_path.iterdir())


def test_a_training_does_not_replace_an_sae_that_is_there(trained, monkeypatch, capsys):
    folder, _ = trained
    before = (folder / "scores.json").read_bytes()
    code, _, err = run(monkeypatch, capsys, *TRAIN, "--steps", "5", "--quiet")
    assert code == 1 and "holds an SAE already" in err
    assert (folder / "scores.json").read_bytes() == before
