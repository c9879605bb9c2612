"""The suite at a size that says nothing about methods, but everything about how it counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sklearn.metrics import roc_auc_score

import tstlens.truth.training as recipes
from tstlens import truth
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig
from tstlens.patching import logit, window_sweep
from tstlens.patching.circuits import edge_sweep
from tstlens.truth import questions as components
from tstlens.truth import questions as where
from tstlens.truth.components import component_task
from tstlens.truth.questions import Explained
from tstlens.truth.tasks import planted

TINY = {"names": ["same-trend", "marked-sample"], "n_pairs": 12}


@pytest.fixture(scope="module")
def explained():
    task = planted("low-var", n_train=4, n_time=48)
    generator = torch.Generator().manual_seed(0)
    model = HookedTST(
        HookedTSTConfig(
            n_layers=1, d_model=8, n_heads=2, d_mlp=16, n_channels=2, n_time=48,
            embed=LinearPatchesConfig(4, 4), positions="learned",
            head=HeadConfig("mean", n_classes=4), seed=2,
        )
    )  # fmt: skip
    references, held_out = torch.randn(2, 2, 4, 2, 48, generator=generator)
    return Explained(model, task, references, held_out, seed=1)


def of_class(model, series, labels):
    return model(series)[torch.arange(len(series)), labels]


@pytest.mark.parametrize("away", [True, False])
def test_windows_are_a_mean_over_references_and_positive_where_the_class_gains(explained, away):
    model, task = explained.model, explained.task
    total = torch.zeros(task.series.shape)
    for reference in explained.references:
        clean, corrupted = (reference, task.series) if away else (task.series, reference)
        found = window_sweep(model, clean, corrupted, logit(task.labels), progress=False)
        total += found.effect() / 2 * (-1 if away else 1)
    torch.testing.assert_close(where.windows(explained, away), total, rtol=1e-4, atol=1e-5)


def test_every_map_is_of_channel_and_time_and_occlusion_is_patching(explained):
    found = where.maps(explained)
    assert {kind for kind, _ in found.values()} == {"method", "trivial", "random", "answer"}
    for name, (_, values) in found.items():
        assert values.shape == explained.task.series.shape, name
        assert values.isfinite().all(), name
    # A patch replaced by the reference, whoever replaces it.
    model, task = explained.model, explained.task
    changed = task.series.clone()
    fall = torch.zeros(4)
    for reference in explained.references:
        changed[:, 1, 8:12] = reference[:, 1, 8:12]
        fall += of_class(model, task.series, task.labels) - of_class(model, changed, task.labels)
    occluded = found["occlusion, patches"][1][:, 1, 8:12]
    torch.testing.assert_close(occluded, (fall / 2)[:, None].expand(-1, 4), rtol=1e-4, atol=1e-5)


def test_the_prediction_difference_replaces_as_many_entries_as_decide(explained):
    task = explained.task
    found = torch.rand(task.series.shape, generator=torch.Generator().manual_seed(3))
    falls = []
    for reference in explained.held_out:
        for row in range(len(task)):
            top = found[row].flatten().topk(int(task.mask[row].sum())).indices
            changed = task.series[row].flatten().clone()
            changed[top] = reference[row].flatten()[top]
            both = torch.stack([task.series[row], changed.view(2, -1)])
            probabilities = explained.model(both).softmax(1)[:, task.labels[row]]
            falls.append((probabilities[0] - probabilities[1]).item())
    expected = sum(falls) / len(falls)
    assert where.lost_probability(explained, found) == pytest.approx(expected, abs=1e-6)


def test_a_model_that_has_not_learned_is_not_scored(explained, monkeypatch):
    monkeypatch.setattr(where, "explained", lambda *_: (explained, 0.94))
    scores, checks = where.where_scores(["low-var"], [0], progress=False)
    assert scores == [] and checks == {"accuracy, low-var, seed 0": 0.94}
    with pytest.raises(ArgumentError, match="no model passed its check"):
        truth.truth("small", ["where"], where={"names": ["low-var"]}, progress=False)


@pytest.fixture(scope="module")
def found():
    return truth.truth("small", ["component"], seeds=[0, 1], component=TINY, progress=False)


def test_the_answer_has_full_marks_and_random_rows_are_at_chance(found):
    table = found["component"]
    for measure in ("edge AUROC", "node AUROC"):
        assert table.values("the graph itself", measure).tolist() == [1, 1]
        assert 0.2 < table.values("random", measure).mean() < 0.8
    assert table.values("the graph itself", "faithfulness").mean() > 0.85
    assert abs(table.values("random", "faithfulness").mean()) < 0.2
    assert table.values("edge patching, exact", "edge AUROC").mean() > 0.99
    assert min(table.checks.values()) >= 0.99


def test_a_seed_says_the_same_whatever_else_is_asked(found):
    one = {**TINY, "names": ["same-trend"]}
    again = truth.truth("small", ["component"], seeds=[1], component=one, progress=False)
    before = found.to_dataframe().query("task == 'same-trend' and seed == 1")
    assert again.to_dataframe().equals(before.reset_index(drop=True))


def test_every_part_repeats_with_its_seed_and_another_seed_says_something_else(monkeypatch):
    pytest.importorskip("sae_lens")
    recipe = recipes.PLANTED_RECIPES["low-var"]
    short = {"n_train": 64, "training": {**recipe.training, "epochs": 1}}
    shortened = dataclasses.replace(recipe, **short)
    monkeypatch.setitem(recipes.PLANTED_RECIPES, "low-var", shortened)
    monkeypatch.setattr(where, "LEARNED", 0.0)
    options = {
        "where": {"names": ["low-var"], "n_series": 3, "n_references": 2},
        "component": {"names": ["same-trend"], "n_pairs": 4},
        "feature": {"n_train": 400, "steps": 10},
        "state": {"steps": 4, "n_fit": 40, "n_score": 40, "sae_steps": 10},
    }
    runs = []
    for seed in (3, 3, 4):
        torch.rand(7)  # what was drawn before must not matter
        found = truth.truth("small", seeds=[seed], progress=False, **options)
        runs.append(found.to_dataframe().drop(columns="seed"))
    one, again, other = runs
    assert set(one["question"]) == set(truth.QUESTIONS)
    assert again.equals(one)
    for question, part in one.groupby("question"):
        assert not part.equals(other[other["question"] == question]), question


def test_the_smoothing_control_is_what_windows_make_of_effects_that_add_up(explained, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2, 48, generator=generator)

    def forward(self, series, mask=None):
        return (series * weight).sum((1, 2))[:, None].expand(-1, 4)

    monkeypatch.setattr(HookedTST, "forward", forward)
    effects = (explained.task.series - explained.references.mean(0)) * weight
    expected = where.over_windows(effects)
    torch.testing.assert_close(where.windows(explained, True), expected, rtol=1e-4, atol=1e-4)


def test_auroc_and_edges_are_those_of_a_direct_call():
    task = component_task("same-trend")
    what = components.asked(task, 12, 0)
    metric = components.metric_of(what.pairs)
    effects = edge_sweep(task.model, *what.runs, metric, progress=False).effect().mean(0)
    kind, edges, nodes = components.edge_scores(what)["edge patching, exact"]
    torch.testing.assert_close(edges, effects)
    names = [edge.name for edge in what.graph.edges]
    truth = [name in task.graph.edges for name in names]
    expected = roc_auc_score(truth, effects.abs().numpy())
    assert components.score_edges(what, edges, nodes)["edge AUROC"] == pytest.approx(expected)
    by_sender = {
        node.name: max(
            abs(value)
            for name, value in zip(names, effects.tolist(), strict=True)
            if name.startswith(f"{node.name}->")
        )
        for node in what.graph.senders
    }
    assert nodes.tolist() == pytest.approx(list(by_sender.values()))
    assert kind == "method"


def test_edges_without_parts_take_the_strongest_part():
    task = component_task("same-trend")
    what = components.asked(task, 2, 0)
    coarse = components.Asked(
        components.ComponentTask(
            task.name, task.model, type(task.graph)(task.graph.nodes, ("pos1->L0H1",), False),
            task.program, "", "", task.draw,
        ),
        what.graph, what.pairs, what.judged, 0,
    )  # fmt: skip
    names = [edge.name for edge in what.graph.edges]
    scores = torch.zeros(len(names))
    scores[names.index("pos1->L0H1.k")] = -3.0
    scores[names.index("pos1->L0H1.v")] = 2.0
    sizes, group = coarse.collapsed(scores)
    assert sizes[group[names.index("pos1->L0H1.q")]] == 3
    assert coarse.true_edges.sum() == 3


def test_the_page_says_who_leads_and_is_written_with_its_numbers(found, tmp_path):
    path = found.save(tmp_path / "docs" / "truth.md")
    text = path.read_text()
    assert "## Which component does it?" in text
    assert "- edge AUROC: " in text and "The best control is" in text
    assert "### marked-sample" in text and "none left out" in text
    assert "Lowest accuracy under interchange interventions: 1.000 to 1.000." in text
    assert ".png" not in text
    assert "Where each misleads:" in text
    frame = found.to_dataframe()
    assert len((tmp_path / "docs" / "truth.csv").read_text().splitlines()) == len(frame) + 1
    assert len(found.figure("component").data) > 4


@pytest.mark.browser
def test_the_page_shows_the_figures_that_were_drawn_beside_it(found, tmp_path):
    text = found.save(tmp_path / "page.md", images=True).read_text()
    assert "(page-component.png)" in text
    assert (tmp_path / "page-component.png").read_bytes().startswith(b"\x89PNG")


def test_features_and_states_have_their_controls():
    pytest.importorskip("sae_lens")
    options = {
        "feature": {"n_train": 400, "steps": 20},
        "state": {"steps": 4, "n_fit": 40, "n_score": 40, "sae_steps": 10},
    }
    result = truth.truth("small", ["feature", "state"], seeds=[0], progress=False, **options)
    features, states = result["feature"], result["state"]
    assert features.values("the features themselves", "MCC").tolist() == pytest.approx([1])
    assert features.values("noise", "MCC")[0] < 0.2
    assert features.values("PCA", "MCC")[0] <= 0.5
    reader = states.values("best possible reader", "NMI")[0]
    assert reader == max(states.summary().query("measure == 'NMI'")["mean"])
    assert states.values("shuffled k-means", "precision")[0] < 0.2


def test_errors_say_what_there_is():
    with pytest.raises(UnknownNameError, match="did you mean 'small'"):
        truth.truth("smal")
    with pytest.raises(UnknownNameError, match="this names a part of the suite"):
        truth.truth("small", ["why"])
    with pytest.raises(ArgumentError, match="seeds: expected at least one"):
        truth.truth("small", ["component"], seeds=[])
