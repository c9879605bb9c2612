"""The report: its numbers against sweeps made afresh, its page in a browser, its refusals."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import tstlens
from tstlens import patching, report
from tstlens.data import TimeSeriesData
from tstlens.errors import (
    ArgumentError,
    LabelError,
    SeriesShapeError,
    StorageError,
    UnknownCheckpointError,
)
from tstlens.report.account import Finding, _times_claim
from tstlens.training import evaluate


def pairs_of(part, data):
    """The clean and corrupted series that the JSON names, and their targets."""
    rows = part["pairs"]
    clean = data.series[[row["clean_index"] for row in rows]]
    corrupted = data.series[[row["corrupted_index"] for row in rows]]
    target = torch.tensor([data.class_names.index(row["target"]) for row in rows])
    return clean, corrupted, target


def test_the_evaluation_is_that_of_evaluate(numbers, model, data):
    fresh = evaluate(model, data)
    assert 0 < fresh.n_correct < fresh.n  # the planted model is right often, not always
    assert numbers["evaluation"]["n_correct"] == fresh.n_correct
    assert numbers["evaluation"]["confusion"] == fresh.confusion.tolist()
    assert numbers["evaluation"]["accuracy"] == fresh.accuracy


@pytest.mark.parametrize("key", ["errors", "classes"])
def test_head_effects_equal_a_serial_loop(numbers, model, data, key):
    part = numbers["sets"][key]
    clean, corrupted, target = pairs_of(part, data)
    metric = patching.log_prob(target)
    _, cache = model.run_with_cache(clean)
    baseline = metric(model(corrupted))
    expected = torch.zeros(len(clean), 2, 4)
    for layer in range(2):
        for head in range(4):
            name = f"blocks.{layer}.attn.hook_z"

            def restore(z, hook, head=head, name=name):
                z[:, :, head] = cache[name][:, :, head]
                return z

            patched = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, restore)]))
            expected[:, layer, head] = patched - baseline
    sweep = part["sweeps"]["heads"]
    np.testing.assert_allclose(sweep["effect_by_pair"], expected.detach(), atol=1e-5)
    np.testing.assert_allclose(sweep["effect"], expected.mean(0).detach(), atol=1e-5)


def test_the_strongest_head_and_its_sentence_say_the_same_numbers(numbers):
    for part in numbers["sets"].values():
        effect = np.array(part["sweeps"]["heads"]["effect"])
        layer, head = np.unravel_index(np.abs(effect).argmax(), effect.shape)
        top = part["strongest"]["heads"][0]
        assert top["label"] == f"L{layer}H{head}"
        assert top["mean"] == pytest.approx(effect[layer, head])
        assert top["share"] == pytest.approx(effect[layer, head] / part["gap"], rel=1e-4)
        sentence = part["sentences"]["heads"]
        assert sentence.startswith(f"Restoring head L{layer}H{head} moves log p of the target")
        assert f"{effect[layer, head]:+.2f}".replace("-", "−") + " nats" in sentence
        assert f"{part['n_pairs']} pairs" in sentence


def test_all_heads_together_do_what_patching_them_together_does(numbers, model, data):
    part = numbers["sets"]["classes"]
    clean, corrupted, target = pairs_of(part, data)
    sites = [patching.Site("z", layer=layer) for layer in range(2)]
    metric = patching.log_prob(target)
    patched = metric(patching.patch(model, clean, corrupted, sites))
    expected = float((patched - metric(model(corrupted))).mean().detach())
    assert part["together"][-1]["n"] == 8
    assert part["together"][-1]["effect"] == pytest.approx(expected, abs=1e-5)


def test_pairs_are_what_they_are_said_to_be(numbers, model, data):
    predicted = evaluate(model, data).predictions
    for row in numbers["sets"]["errors"]["pairs"]:
        clean, corrupted = row["clean_index"], row["corrupted_index"]
        assert predicted[corrupted] != data.labels[corrupted] == data.labels[clean]
        assert data.class_names[predicted[corrupted]] == row["seen_as"]
    for row in numbers["sets"]["classes"]["pairs"]:
        clean, corrupted = row["clean_index"], row["corrupted_index"]
        assert predicted[corrupted] == data.labels[corrupted] != data.labels[clean]
        assert predicted[clean] == data.labels[clean]
    assert len(numbers["sets"]["classes"]["pairs"]) == 8


def test_the_control_patches_in_the_class_that_is_seen_already(model, data):
    from tstlens.report.study import choose

    evaluation = evaluate(model, data)
    sets, _ = choose(model, data, evaluation, 8, 3)
    for entry in sets:
        assert entry.control is not None
        donors = data.labels[entry.control.clean_index]
        assert torch.equal(donors, entry.control.predicted)
        assert (evaluation.predictions[entry.control.clean_index] == donors).all()
        assert (entry.control.clean_index != entry.control.corrupted_index).all()
        assert (donors != entry.control.target).all()


def test_restoring_the_whole_stream_gives_the_clean_run(numbers):
    assert all(part["whole_stream_deviation"] < 1e-5 for part in numbers["sets"].values())


def test_the_same_seed_gives_the_same_numbers_and_another_seed_other_pairs(
    numbers, model, data, tmp_path
):
    def again(seed):
        out = report.build(
            model, tmp_path / "again.html", data=data, max_pairs=8, seed=seed, progress=False
        )
        return json.loads(out.with_suffix(".json").read_text())

    assert again(3)["sets"] == numbers["sets"]
    assert again(4)["sets"]["classes"]["pairs"] != numbers["sets"]["classes"]["pairs"]


def test_the_page_prints_the_numbers_of_the_json(numbers, page):
    html = page.read_text()
    body = html[html.rindex("</script>\n</head>") :]
    assert f"{numbers['evaluation']['n_correct']} of {numbers['evaluation']['n']}" in body
    for claim in numbers["headline"]:
        assert claim["claim"] in body
    for part in numbers["sets"].values():
        for row in part["strongest"]["heads"]:
            assert f"<td>{row['label']}</td>" in body
    assert "What can mislead" in body and "saturate" in body
    assert f"seed {numbers['made']['seed']}" in body


def test_time_steps_that_are_level_are_named_together():
    def claim(means, first, few=False):
        top = [
            Finding(f"sample {pos}", {"pos": pos}, mean, 0.9 * mean, 1.1 * mean, 0.5, 9, 9, 0.1,
                    0.2, 0.5, None, first)
            for pos, mean in means
        ]  # fmt: skip
        cells = [(pos, pos + 1) for pos in range(30)]
        return _times_claim(
            {
                "strongest": {"inputs": [one.to_dict() for one in top]},
                "sweeps": {"inputs": {"time_cells": cells}},
                "sentences": {"inputs": ""},
                "few": few,
                "n_pairs": 9,
            }
        )

    level = claim([(20, 0.93), (21, 0.93), (17, 0.87), (19, 0.87), (18, 0.86)], 0, few=True)
    assert "restoring samples 17–21 helps" in level["claim"]
    assert "In no single pair is it the strongest" in level["evidence"]
    alone = claim([(4, 3.0), (12, 0.4), (9, 0.3)], 7)
    assert alone["claim"] == "The evidence enters most strongly at sample 4."
    assert "strongest in 7 of 9 pairs" in alone["evidence"]


def test_class_names_are_text_and_never_markup(page):
    tables = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.S)
    assert "slow &lt;b&gt;&amp;" in tables
    assert "slow <b>" not in tables


def test_the_page_loads_nothing(page):
    html = page.read_text()
    markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", html, flags=re.S)
    assert not re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=[\"'](?!data:)", markup)
    assert "http:" not in markup and "https:" not in markup
    assert "@import" not in markup and "url(" not in markup
    assert html.count("plotly.js v") == 1  # the library is inside, once
    assert "default-src 'none'" in html


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on the path")
@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_drawn_in_a_browser_without_errors(page, tmp_path, width):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--enable-logging=stderr",
        "--virtual-time-budget=10000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    wanted = set(re.findall(r'<div id="(fig-[^"]+)"', page.read_text()))
    drawn = set(
        re.findall(r'id="(fig-[^"]+)" class="plotly-graph-div[^"]*js-plotly-plot', run.stdout)
    )
    assert wanted and drawn == wanted


def test_a_model_without_errors_is_reported_between_classes_only(model, data, tmp_path):
    right = evaluate(model, data)
    easy = data[(right.predictions == right.labels).nonzero()[:, 0]]
    out = report.build(model, tmp_path / "easy.html", data=easy, max_pairs=6, progress=False)
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert list(numbers["sets"]) == ["classes"]
    assert "no errors to explain" in numbers["missing"][0]
    assert "no errors to explain" in out.read_text()


def test_few_errors_are_called_too_few(model, data, tmp_path):
    right = evaluate(model, data)
    wrong = (right.predictions != right.labels).nonzero()[:2, 0]
    kept = torch.cat([(right.predictions == right.labels).nonzero()[:, 0], wrong])
    out = report.build(model, tmp_path / "few.html", data=data[kept], max_pairs=6, progress=False)
    part = json.loads(out.with_suffix(".json").read_text())["sets"]["errors"]
    assert part["few"] and part["strongest"]["heads"][0]["low"] is None
    assert "too few for an interval" in part["sentences"]["heads"]
    assert "Very few series" in out.read_text()


def test_a_shipped_univariate_checkpoint_is_reported_from_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = report.build("gunpoint", max_pairs=4, progress=False)
    assert out.name == "gunpoint-report.html" and out.exists()
    numbers = json.loads((tmp_path / "gunpoint-report.json").read_text())
    assert numbers["data"]["name"] == "GunPoint"
    measured = numbers["card"]["accuracy"]["test"]["n_correct"]
    assert numbers["evaluation"]["n_correct"] == measured
    assert "channels" not in numbers["sets"]["classes"]["sweeps"]  # there is but one


def test_what_cannot_be_reported_is_refused(model, data, tmp_path):
    out = tmp_path / "no.html"
    with pytest.raises(ArgumentError, match="does not say which data set.*--data"):
        report.build(model, out)
    with pytest.raises(LabelError, match="needs the true classes"):
        report.build(model, out, data=TimeSeriesData(data.series), progress=False)
    with pytest.raises(SeriesShapeError, match=r"channel=2, time=24\], got \[1, 1, 24\]"):
        report.build(model, out, data="ItalyPowerDemand", progress=False)
    with pytest.raises(ArgumentError, match="max_pairs of at least 2, got 1"):
        report.build(model, out, data=data, max_pairs=1, progress=False)
    with pytest.raises(ArgumentError, match=r"end in \.html"):
        report.build(model, tmp_path / "report.pdf", data=data, progress=False)
    with pytest.raises(UnknownCheckpointError, match="japanese-vowels"):
        report.build("japanese-vowel", out)
    one = data[(data.labels == 0).nonzero()[:, 0]]
    with pytest.raises(ArgumentError, match="expected two classes"):
        report.build(model, out, data=one, progress=False)
    assert not out.exists()


def test_an_interrupted_write_leaves_the_old_report(page, tmp_path, monkeypatch):
    from tstlens.storage import write_text

    place = write_text(tmp_path / "a.html", "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(StorageError, match="No space left"):
        write_text(place, "new")
    assert place.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.html"]


def test_a_masked_data_set_is_reported_too(model, data, tmp_path):
    from tstlens.report.study import study

    lengths = torch.full((len(data),), 24)
    lengths[::2] = 16
    mask = torch.arange(24) < lengths[:, None]
    padded = dataclasses.replace(data, series=data.series * mask[:, None], mask=mask)
    found = study(model, padded, 4, 0, False)
    pairs = found.sets[-1].pairs.pairs
    expected = patching.log_prob(pairs.target)(model(pairs.corrupted, mask=pairs.corrupted_mask))
    torch.testing.assert_close(found.sets[-1].sweeps["heads"].baseline, expected.detach())


@pytest.mark.parametrize("name", ["wording", "build", "card"])
def test_the_examples_in_the_documentation_run(name):
    assert doctest.testmod(importlib.import_module(f"tstlens.report.{name}")).failed == 0


def test_building_a_report_leaves_the_model_as_it_was(model, data, tmp_path):
    before = copy.deepcopy(model.state_dict())
    report.build(model, tmp_path / "a.html", data=data[:40], max_pairs=4, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert tstlens.report.build is report.build
