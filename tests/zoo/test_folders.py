"""Source models from folders and files: found by their config, loaded safely, refused in words."""

from __future__ import annotations

import json

import pytest
import torch

import tstlens
from tests.test_cli import run
from tstlens import HookedTST
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    DownloadError,
    SourcePackageError,
    StorageError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.training import ConvTST


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.PatchTSTConfig(
        num_input_channels=2,
        context_length=24,
        patch_length=6,
        patch_stride=6,
        d_model=16,
        num_attention_heads=2,
        ffn_dim=16,
        num_hidden_layers=2,
        num_targets=3,
    )
    path = tmp_path_factory.mktemp("patchtst")
    transformers.PatchTSTForClassification(config).save_pretrained(path)
    return path


def test_a_folder_of_another_library_is_converted(folder, tmp_path, monkeypatch, capsys):
    series = torch.randn(3, 2, 24)
    model = tstlens.convert(folder)
    assert model.info["family"] == "patchtst" and model.parity.passed
    loaded = HookedTST.from_pretrained(folder, dtype=torch.float64)
    assert loaded.cfg.dtype == torch.float64
    assert torch.allclose(loaded(series.double()).float(), model(series), atol=1e-6)
    status, printed, _ = run(
        monkeypatch, capsys, "convert", str(folder), "--out", str(tmp_path / "converted")
    )
    assert not status and "parity  equal within tolerance" in printed
    again = HookedTST.from_pretrained(tmp_path / "converted")
    assert torch.equal(again(series), model(series))
    with pytest.raises(ArgumentError, match="holds a converted model already"):
        tstlens.convert(tmp_path / "converted")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_of_weights_is_converted(tmp_path, ending, monkeypatch, capsys):
    source = ConvTST(n_channels=2, n_time=12, n_classes=3)
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    model = tstlens.convert(path, "conv-tst", n_heads=8)
    series = torch.randn(3, 2, 12)
    assert torch.allclose(model(series), source.eval()(series), atol=1e-5)
    out = tmp_path / "out"
    given = ["convert", str(path), "--family", "conv-tst", "--out", str(out), "--hint"]
    status, _, _ = run(monkeypatch, capsys, *given, "n_heads=8")
    assert not status and HookedTST.from_pretrained(out).parity.passed
    status, _, printed = run(monkeypatch, capsys, *given, "n_heads=8", "--overwrite", "--hint", "x")
    assert status and "--hint takes name=value" in printed


def test_what_is_no_source_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="found no config.json; for weights alone"):
        tstlens.convert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match="is no JSON"):
        tstlens.convert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "informer"}))
    with pytest.raises(UnsupportedSourceError, match="informer is not converted: Informer draws"):
        HookedTST.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnknownFamilyError, match="'bert'"):
        HookedTST.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedSourceError, match="not of a 'conv-tst' model; families with"):
        tstlens.convert(folder, "conv-tst")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(CorruptFileError, match="no weights that can be loaded safely"):
        tstlens.convert(tmp_path / "bad.pth", "conv-tst")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CorruptFileError, match="holds no state dict"):
        tstlens.convert(tmp_path / "list.pth", "conv-tst")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="fetching it from the hub failed"):
        tstlens.convert("nobody/no-such-model-of-tstlens")


def test_a_missing_package_is_named(folder, monkeypatch):
    import dataclasses

    from tstlens.zoo import registry

    def load(folder):
        raise ImportError("No module named 'somewhere'")

    family = dataclasses.replace(registry.known()["patchtst"], load=load)
    monkeypatch.setitem(registry.known(), "patchtst", family)
    with pytest.raises(SourcePackageError, match="needs the package .*No module named 'somewhere'"):
        tstlens.convert(folder)
