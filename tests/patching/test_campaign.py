"""A campaign against single sweeps, killed half way, and in folders that are not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.patching.conftest import CONFIGS, randomised
from tstlens import patching
from tstlens.data import Pairs
from tstlens.errors import ArgumentError, CorruptFileError, StorageError, UnknownNameError
from tstlens.model import HookedTST

GRIDS = [("z", ("layer", "head")), ("mlp_out", ("layer", "pos")), ("series", ("channel",))]


def model_and_pairs():
    model = randomised(CONFIGS["pre-norm per step, max"])
    generator = torch.Generator().manual_seed(5)
    clean, corrupted = torch.randn(2, 6, 4, 10, generator=generator)
    pairs = Pairs(
        clean,
        corrupted,
        torch.tensor([0, 1, 2, 3, 4, 0]),
        corrupted_index=torch.tensor([7, 8, 9, 9, 10, 11]),
        predicted=torch.tensor([1, 2, 3, 4, 0, 1]),
    )
    return model, pairs


def test_a_campaign_holds_what_single_sweeps_give(tmp_path):
    model, pairs = model_and_pairs()
    names = ("log_prob", "prob", "logit", "logit_diff")
    found = patching.run_campaign(
        model, pairs, tmp_path, grids=GRIDS, metrics=names, figures=False, progress=False
    )
    metrics = {
        "log_prob": patching.log_prob(pairs.target),
        "prob": patching.prob(pairs.target),
        "logit": patching.logit(pairs.target),
        "logit_diff": patching.logit_diff(pairs.target, pairs.predicted),
    }
    for direction, turned in (("denoise", pairs), ("noise", pairs.swap())):
        for site, axes in GRIDS:
            for name, metric in metrics.items():
                single = patching.sweep(
                    model, turned.clean, turned.corrupted, site, axes, metric, progress=False
                )
                mine = found.result(site, axes, name, direction)
                assert torch.equal(mine.values, single.values)
                assert torch.equal(mine.baseline, single.baseline)
                assert torch.equal(mine.clean, single.clean)
                for part in ("axes", "coords", "metric", "unit", "site", "source", "time_cells"):
                    assert getattr(mine, part) == getattr(single, part)
                assert mine.made == single.made and mine.n_pairs == 6
    with pytest.raises(UnknownNameError, match="The campaign holds these sweeps"):
        found.result("q", ("layer",))


def test_every_site_of_a_model_is_swept_by_default(case):
    grids = patching.campaign_grids(case.model)
    silent = {"result", "pos_embed"}
    assert {site for site, _ in grids} == set(patching.site_names(case.model)) - silent
    by_channel = ("channel",) if case.model.cfg.channel_independent else ()
    assert dict(grids)["z"] == ("layer", *by_channel, "head", "pos")


def test_the_table_has_intervals_for_all_pairs_and_classes(tmp_path):
    model, pairs = model_and_pairs()
    found = patching.run_campaign(
        model, pairs, tmp_path, grids=GRIDS[:1], metrics=["logit"], figures=False, progress=False
    )
    table = pd.read_csv(tmp_path / "summary.csv")
    rows = table[(table["class"] == "all") & (table["direction"] == "noise")]
    assert len(rows) == 6 and (rows["n_clusters"] == 5).all()
    expected = found.summary("z", ("layer", "head"), "logit", "noise")
    assert rows["effect"].tolist() == pytest.approx(expected.effect.ravel().tolist())
    assert rows["low"].tolist() == pytest.approx(expected.low.ravel().tolist())
    assert set(table["class"]) == {"all", "0", "1", "2", "3", "4"}
    assert len(found.to_dataframe()) == 12


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.npz"))}


SCRIPT = """
import sys, time
import torch
from tests.patching.test_campaign import GRIDS, model_and_pairs
from tstlens import patching
from tstlens.patching import campaign
torch.set_num_threads(1)
slowly = campaign._sweeps
def sweeps(*arguments):
    found = slowly(*arguments)
    time.sleep(0.15)
    return found
campaign._sweeps = sweeps
patching.run_campaign(*model_and_pairs(), sys.argv[1], grids=GRIDS, figures=False, progress=False)
"""


def test_a_killed_campaign_goes_on_to_the_same_numbers(tmp_path, repository):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(repository), "TSTLENS_TYPECHECK": "0"}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(killed)], cwd=repository, env=environment
    )
    deadline = time.time() + 300
    while len(list(killed.glob("results/[!.]*.npz"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = {path.name: path.stat().st_mtime_ns for path in killed.glob("results/[!.]*.npz")}
    assert 2 <= len(done) < 6 and not (killed / "summary.csv").exists()
    torch.set_num_threads(1)  # as the child had: sums in another order differ in the last bit
    model, pairs = model_and_pairs()
    options = {"grids": GRIDS, "figures": False, "progress": False}
    resumed = patching.run_campaign(model, pairs, killed, **options)
    fresh = patching.run_campaign(model, pairs, whole, **options)
    for path in killed.glob("results/*.npz"):
        assert done.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert resumed.results.keys() == fresh.results.keys()
    for key, result in fresh.results.items():
        assert torch.equal(resumed.results[key].values, result.values), key
    assert (killed / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()


def test_an_interrupt_leaves_no_half_written_file(tmp_path, monkeypatch):
    model, pairs = model_and_pairs()
    options = {"grids": GRIDS, "figures": False, "progress": False}
    before = os.fsync

    def interrupted(descriptor):
        if len(list(tmp_path.glob("results/[!.]*.npz"))) == 2:
            raise KeyboardInterrupt
        before(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patching.run_campaign(model, pairs, tmp_path, **options)
    assert len(list(tmp_path.glob("results/*"))) == 2
    half = patching.load_campaign(tmp_path)
    assert len(half.results) == 2 * 3
    monkeypatch.undo()
    assert len(patching.run_campaign(model, pairs, tmp_path, **options).results) == 6 * 3


def test_figures_are_written_with_their_script_beside_them(tmp_path):
    model, pairs = model_and_pairs()
    patching.run_campaign(
        model, pairs, tmp_path, grids=GRIDS[:1], directions=["denoise"], progress=False
    )
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    stem = "denoise.z.layer-head"
    assert names == [f"{stem}.map.html", f"{stem}.strongest.html", "plotly.min.js"]
    assert 'src="plotly.min.js"' in (tmp_path / "figures" / names[0]).read_text()


def test_folders_of_something_else_are_refused(tmp_path):
    model, pairs = model_and_pairs()
    options = {"grids": GRIDS[:1], "figures": False, "progress": False}
    patching.run_campaign(model, pairs, tmp_path / "one", **options)
    with pytest.raises(ArgumentError, match=r"another campaign \(differing in metrics\)"):
        patching.run_campaign(model, pairs, tmp_path / "one", metrics=["prob"], **options)
    with torch.no_grad():
        model.W_U.add_(1)
    with pytest.raises(ArgumentError, match="of other weights or series"):
        patching.run_campaign(model, pairs, tmp_path / "one", **options)
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(ArgumentError, match="and no campaign; give out= a new or an empty folder"):
        patching.run_campaign(model, pairs, tmp_path, **options)
    with pytest.raises(StorageError, match=r"expected campaign.json in .*, found none"):
        patching.load_campaign(tmp_path / "nowhere")


def test_a_campaign_goes_on_only_with_the_same_forward_pass_and_metrics(tmp_path):
    model, pairs = model_and_pairs()
    options = {"grids": GRIDS[:1], "figures": False, "progress": False}

    def first(pairs, function=lambda output: output[:, 0], better="higher"):
        return patching.Metric.of(function, "first", better=better)

    patching.run_campaign(model, pairs, tmp_path, metrics={"first": first}, **options)
    others = (
        lambda pairs: first(pairs, better="lower"),
        lambda pairs: first(pairs, lambda output: output.std(1)),
    )
    for other in others:
        with pytest.raises(ArgumentError, match="another campaign"):
            patching.run_campaign(model, pairs, tmp_path, metrics={"first": other}, **options)
    changed = HookedTST(replace(model.cfg, causal=not model.cfg.causal))
    changed.load_state_dict(model.state_dict())
    with pytest.raises(ArgumentError, match="another campaign"):
        patching.run_campaign(changed, pairs, tmp_path, metrics={"first": first}, **options)
    model.add_hook("blocks.0.hook_mlp_out", lambda activation, hook: activation * 0)
    with pytest.raises(ArgumentError, match="without hooks, got some at 'blocks.0.hook_mlp_out'"):
        patching.run_campaign(model, pairs, tmp_path, metrics={"first": first}, **options)


def test_results_under_another_name_are_not_taken_for_that_sweep(tmp_path):
    model, pairs = model_and_pairs()
    options = {"grids": GRIDS[:1], "figures": False, "progress": False}
    patching.run_campaign(model, pairs, tmp_path, **options)
    one, other = sorted((tmp_path / "results").glob("*.npz"))
    one.write_bytes(other.read_bytes())
    again = lambda folder: patching.run_campaign(model, pairs, folder, **options)  # noqa: E731
    for read in (patching.load_campaign, again):
        with pytest.raises(CorruptFileError, match="another campaign or grid"):
            read(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    model, pairs = model_and_pairs()
    options = {"grids": GRIDS[:1], "figures": False, "progress": False}
    patching.run_campaign(model, pairs, tmp_path, **options)
    damaged = tmp_path / "results" / "noise.z.layer-head.npz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(CorruptFileError, match=r"noise.z.layer-head.npz is damaged.*delete it"):
        patching.load_campaign(tmp_path)


def test_what_a_campaign_cannot_run_is_said_first(tmp_path):
    model, pairs = model_and_pairs()
    with pytest.raises(UnknownNameError, match="did you mean 'log_prob'"):
        patching.run_campaign(model, pairs, tmp_path, metrics=["logprob"])
    with pytest.raises(ArgumentError, match=r"expected directions among \('denoise', 'noise'\)"):
        patching.run_campaign(model, pairs, tmp_path, directions=["back"])
    with pytest.raises(ArgumentError, match="these pairs do not say which"):
        patching.run_campaign(
            model, replace(pairs, predicted=None), tmp_path, metrics=["logit_diff"]
        )
    assert not list(tmp_path.iterdir())
