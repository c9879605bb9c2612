"""The command line: what it writes, what it says, how it fails."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tstlens
from tstlens import cli
from tstlens.training import evaluate

REPOSITORY = Path(__file__).resolve().parents[1]


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """``tstlens ...`` in this process: exit code, what it printed, what it complained."""
    monkeypatch.setattr(sys, "argv", ["tstlens", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


def test_an_error_made_on_purpose_is_one_line_and_exit_code_1():
    command = [sys.executable, "-m", "tstlens.cli", "report", "japanese-vowles"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(
        "tstlens: unknown checkpoint 'japanese-vowles'; did you mean 'japanese-vowels'?"
    )
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "gunpoint", "--data", "NoSuchData"], "unknown data set 'NoSuchData'"),
        (["report", "gunpoint", "--out", "a.pdf"], "expected out to end in .html"),
        (["report", "gunpoint", "--out", f"{__file__}/a.html"], "cannot be written: "),
        (["sweep", "gunpoint", "--out", "s", "--split", "best"], "expected split in"),
        (["sweep", "gunpoint", "--out", "s", "--site", "zz"], "unknown site 'zz'"),
        (["sweep", "gunpoint", "--out", "s", "--site", "z", "--metric", "loss"], "unknown name"),
        (["sweep", "gunpoint", "--out", "s", "--data", "JapaneseVowels"], "channel"),
        (["train"], "give either a data set"),
        (["train", "GunPoint", "--recipe", "gunpoint"], "give either a data set"),
        (["train", "--recipe", "gun-point"], "unknown name 'gun-point'; did you mean 'gunpoint'"),
        (["train", "ItalyPowerDemand", "--heads", "7"], "n_heads: 7 does not divide d_model=128"),
        (["train", "ItalyPowerDemand", "--stride", "3"], "must be 1, 2, 4, 8, 16, 32 or 64"),
        (["train", "ItalyPowerDemand", "--scaling", "max"], "expected scaling in"),
    ],
)
def test_bad_arguments_are_named(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 1 and message in err and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [[], ["report"], ["train"], ["checkpoints"]])
def test_help_is_there(monkeypatch, capsys, command):
    code, out, _ = run(monkeypatch, capsys, *command, "--help")
    assert code == 0 and "Usage" in out


SETTINGS = {
    "train": ("training.TrainConfig", "models", {"augment", "clip_norm", "seed", "select"}),
    "sae train": (
        "saes.TrainConfig",
        "dictionaries",
        {"checkpoint", "options", "progress", "trainer"},
    ),
    "codebook fit": ("codebooks.FitConfig", "dictionaries", {"clip_norm", "train_model"}),
}


@pytest.mark.parametrize("command", SETTINGS)
def test_a_command_has_the_settings_of_its_config(monkeypatch, capsys, command):
    config, group, without = SETTINGS[command]
    room, kind = config.split(".")
    if room != "training":
        pytest.importorskip("sae_lens")
    config = getattr(importlib.import_module(f"tstlens.{room}"), kind)()
    function = getattr(getattr(cli, group), command.replace(" ", "_"))
    taken = inspect.signature(function).parameters
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = run(monkeypatch, capsys, *command.split(), "--help")
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("│ -")}
    for field in dataclasses.fields(config):
        if field.name in without:
            continue
        assert taken[field.name].default == getattr(config, field.name)
        line = lines[f"--{field.name.replace('_', '-')}"].lower()
        about = re.search(rf"\n +{field.name}: (.+)", type(config).__doc__)[1].split(".")[0]
        assert re.sub(r":\w+:|`", "", about).lower() in line


@pytest.mark.parametrize(
    ("option", "word", "said"),
    [("epochs", "0", "greater"), ("optimizer", "adamm", "'adam'"), ("lr", "fast", "number")],
)
def test_values_that_a_setting_cannot_have_are_refused(monkeypatch, capsys, option, word, said):
    code, out, err = run(monkeypatch, capsys, "train", "GunPoint", f"--{option}", word)
    assert code == 2 and f"--{option}" in err and said in err and not out


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"tstlens {tstlens.__version__}\n", "")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from tstlens import cli; "
        "heavy = {'torch', 'plotly', 'aeon', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_checkpoints_are_listed_with_data_and_accuracy(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "checkpoints")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert sorted(rows) == tstlens.list_checkpoints()
    assert "JapaneseVowels" in rows["japanese-vowels"]
    accuracy = tstlens.HookedTST.from_pretrained("gunpoint").info["accuracy"]["test"]["accuracy"]
    assert f"{accuracy:.2%}" in rows["gunpoint"]


def test_train_makes_a_checkpoint_that_can_be_reported_on(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "mine"
    sizes = ["--layers", "1", "--width", "16", "--heads", "2"]
    code, out, err = run(
        monkeypatch, capsys, "train", "ItalyPowerDemand", "--epochs", "10", "--lr", "0.005", *sizes,
        "--scaling", "per_channel", "--seed", "5", "--quiet", "--out", str(folder),
    )  # fmt: skip
    assert code == 0, err
    model = tstlens.HookedTST.from_pretrained(folder)
    info = model.info
    assert info["seed"] == 5 and info["recipe"]["training"]["epochs"] == 10
    assert info["command"].startswith("tstlens train ItalyPowerDemand --epochs 10")
    test = tstlens.load_dataset("ItalyPowerDemand", scaling="per_channel")
    measured = evaluate(model, test)
    assert f"{measured.n_correct} of 1029 right" in out
    assert info["accuracy"]["test"]["n_correct"] == measured.n_correct

    page = tmp_path / "mine.html"
    arguments = ["report", str(folder), "--out", str(page), "--max-pairs", "4", "--quiet"]
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert str(page) in out
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert numbers["name"] == "mine"
    assert numbers["evaluation"]["n_correct"] == measured.n_correct
    assert numbers["data"]["scaling"]["kind"] == "per_channel"


def test_the_same_seed_trains_the_same_weights(monkeypatch, capsys, tmp_path):
    for name in ("a", "b"):
        arguments = ["train", "ItalyPowerDemand", "--epochs", "1", "--layers", "1", "--width", "8"]
        arguments += ["--heads", "2", "--quiet", "--out", str(tmp_path / name)]
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("samples", "strides"), [(1, (1, 1, 1)), (2, (1, 1, 2)), (3, (1, 2, 2)), (8, (2, 2, 2))]
)
def test_strides_make_positions_of_about_the_samples_asked_for(samples, strides):
    assert cli.models._strides(samples) == strides


def test_training_does_not_replace_a_model_unasked(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    command = ["train", "ItalyPowerDemand", "--epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["tstlens", *command])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "holds a model already" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"
