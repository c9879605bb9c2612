"""Models with codebooks on disk: loaded as saved, and refused with a reason where damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tstlens
from tests.codebooks.test_fitting import MLP, Z, make_data, make_model
from tstlens import codebooks
from tstlens.errors import CorruptFileError, HookError, StorageError, UnknownCheckpointError
from tstlens.model import seal_checkpoint


@pytest.fixture
def saved(tmp_path):
    model, data = make_model(), make_data()
    codebooks.fit(model, data, [MLP, Z], n_codes=6, k=2, train_model=True, epochs=2, progress=False)
    return model, data, model.save_pretrained(tmp_path / "model")


def test_a_saved_model_has_the_same_codes_and_logits(saved):
    model, data, folder = saved
    again = codebooks.load(folder)
    assert list(again.acts_to_codebooks) == [MLP, Z] and not again.training
    assert torch.equal(again(data.series), model(data.series))
    ids, expected = again.code_ids(data.series), model.code_ids(data.series)
    assert all(torch.equal(ids[hook], expected[hook]) for hook in (MLP, Z))
    assert again.acts_to_codebooks[Z].cfg.metadata.tstlens_fit["n_codes"] == 6
    there = torch.device("cpu")
    assert codebooks.load(folder, device=there).acts_to_codebooks[MLP].table.device == there
    assert codebooks.load(folder, dtype=torch.float64).acts_to_codebooks[MLP].table.dtype == (
        torch.float64
    )


def test_another_process_finds_the_same_codes(saved, tmp_path, repository):
    model, data, folder = saved
    torch.save(data.series, tmp_path / "series.pt")
    code = (
        "import json, torch; from tstlens import codebooks; torch.set_num_threads(1)\n"
        f"model = codebooks.load(r'{folder}'); series = torch.load(r'{tmp_path / 'series.pt'}')\n"
        "print(json.dumps({k: v.tolist() for k, v in model.code_ids(series).items()}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {hook: ids.tolist() for hook, ids in model.code_ids(data.series).items()}


def test_without_codebooks_the_tuned_weights_are_left(saved):
    model, data, folder = saved
    again = codebooks.load(folder)
    again.reset_codebooks()
    with model.snapping(False):
        assert torch.equal(again(data.series), model(data.series))
    assert torch.equal(tstlens.HookedTST.from_pretrained(folder)(data.series), again(data.series))


def test_a_model_without_codebooks_is_refused(tmp_path):
    folder = make_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(UnknownCheckpointError, match="holds a model without codebooks; fit them"):
        codebooks.load(folder)
    with pytest.raises(UnknownCheckpointError, match="unknown checkpoint 'japanese-vowel'"):
        codebooks.load("japanese-vowel")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match=r"expected config\.json in .*, found none"):
        codebooks.load(tmp_path / "empty")


def damaged(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("sae_weights.safetensors", None, "expected sae_weights.safetensors in"),
        ("sae_weights.safetensors", b"no", "holds no SAE that sae-lens can load"),
        ("sae_weights.safetensors", "half", "holds no SAE that sae-lens can load"),
        ("cfg.json", b"{", "cfg.json is no JSON that can be read"),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_damaged_tables_are_refused(saved, name, content, said, sealed):
    folder = saved[2] / "saes" / MLP
    if content == "half":
        whole = (folder / name).read_bytes()
        content = whole[: len(whole) // 2]
    damaged(folder, name, content)
    if sealed:
        seal_checkpoint(saved[2])
    elif content is not None:
        said = f"{name} is truncated or was altered: its SHA-256 is"
    with pytest.raises(CorruptFileError, match=said):
        codebooks.load(saved[2])


def test_a_table_of_another_size_than_its_config_is_refused(saved):
    path = saved[2] / "saes" / MLP / "cfg.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "n_codes": 7, "d_sae": 7}))
    seal_checkpoint(saved[2])
    with pytest.raises(CorruptFileError, match="holds no SAE that sae-lens can load"):
        codebooks.load(saved[2])


def test_damaged_weights_of_the_model_are_refused(saved):
    damaged(saved[2], "model.safetensors", b"no")
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        codebooks.load(saved[2])


def test_a_codebook_in_another_hook_points_folder_is_refused(saved):
    saes = saved[2] / "saes"
    shutil.copytree(saes / MLP, saes / "blocks.1.hook_mlp_out")
    with pytest.raises(HookError, match=f"this codebook belongs to {MLP}, so at blocks.1"):
        codebooks.load(saved[2])


def test_the_shipped_model_scores_what_its_folder_says_and_its_codes_act():
    model = codebooks.load("japanese-vowels")
    train, test = (tstlens.load_dataset("JapaneseVowels", split=s) for s in ("train", "test"))
    folder = tstlens.model.folders.find_checkpoint("japanese-vowels") / "codebooks"
    recorded = json.loads((folder / "scores.json").read_text())["task"]
    with torch.no_grad():
        right = model(test.series, mask=test.mask).argmax(1) == test.labels
    assert float(right.double().mean()) == pytest.approx(
        recorded["codebooks"]["accuracy"], abs=2 / 370
    )
    assert recorded["original"]["accuracy"] - recorded["codebooks"]["accuracy"] <= 0.02
    assert recorded["random tables"]["accuracy"] < 0.5  # the task does need these activations
    label, hook = 3, "blocks.1.hook_normalized_resid_post"
    ids = model.code_ids(train.series, mask=train.mask)[hook][..., 0]
    counts = torch.stack([torch.bincount(ids[train.labels == c].flatten(), minlength=64)
                          for c in range(9)])  # fmt: skip
    share = counts[label] / counts.sum(0).clamp(min=20)
    found = codebooks.effects(
        model,
        test[test.labels != label],
        {hook: int(share.argmax())},
        label=label,
        doses=[12],
        n_controls=5,
        reference=train,
        progress=False,
    )
    row = found.summary().iloc[0]
    assert row["effect"] > row["control"] + 0.05 and row["p_series"] < 1e-6 and row["d"] > 0
    assert tstlens.list_checkpoints().count("japanese-vowels") == 1
    assert "codebooks" not in tstlens.list_checkpoints()
