"""Ranking, estimates and circuit of the report: its numbers against direct calls."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tstlens import figures, patching, report
from tstlens.data import Pairs
from tstlens.report.circuits import halves
from tstlens.report.study import cost_sentence


@pytest.fixture(scope="module")
def part(numbers):
    return numbers["sets"]["classes"]


@pytest.fixture(scope="module")
def pairs(part, data):
    rows = part["pairs"]
    index = {
        name: torch.tensor([row[name] for row in rows])
        for name in ("clean_index", "corrupted_index")
    }
    return Pairs(
        data.series[index["clean_index"]],
        data.series[index["corrupted_index"]],
        torch.tensor([data.class_names.index(row["target"]) for row in rows]),
        **index,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def heads(model, pairs):
    return patching.sweep(
        model, pairs.clean, pairs.corrupted, "z", ("layer", "head"),
        patching.log_prob(pairs.target), progress=False,
    )  # fmt: skip


def test_the_ranking_is_that_of_summary_strongest_first(part, pairs, heads):
    found = patching.summary(heads, cluster=pairs.corrupted_index, seed=3)
    rows = part["ranking"]["rows"]
    assert len(rows) == 8
    for row in rows:
        at = (0, row["place"]["layer"], row["place"]["head"])
        for name in ("effect", "low", "high", "p", "q"):
            assert row[name] == pytest.approx(getattr(found, name)[at], rel=1e-3, abs=1e-5)
    sizes = [abs(row["effect"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert part["ranking"]["n_shown"] == int((found.q <= 0.05).sum())


def test_intervals_of_the_report_are_the_bootstrap_t_ones_of_summary(numbers, part):
    by_label = {row["label"]: row for row in part["ranking"]["rows"]}
    for top in part["strongest"]["heads"]:
        row = by_label[top["label"]]
        assert (top["low"], top["high"]) == pytest.approx((row["low"], row["high"]))
    assert numbers["made"]["bootstrap"]["method"].startswith("bootstrap-t")


def test_the_stability_is_that_of_split_half_and_is_told(part, pairs, heads, page):
    stable = patching.split_half(heads, 5, cluster=pairs.corrupted_index, seed=3)
    told = part["ranking"]["stability"]
    assert told["spearman"] == pytest.approx(float(np.mean(stable.spearman)), abs=1e-6)
    assert told["reliability"] == pytest.approx(stable.reliability, abs=1e-6)
    assert told["top_k_overlap"] == pytest.approx(float(stable.top_k_overlap.mean()))
    sentence = part["ranking"]["sentences"]["order"]
    assert f"{told['spearman']:.2f} on average".replace("-", "−") in sentence
    assert sentence in page.read_text()


@pytest.mark.parametrize(("name", "steps"), [("gradient", 0), ("integrated", 5)])
def test_estimates_agree_with_the_sweep_as_agreement_says(part, model, pairs, heads, name, steps):
    guess = patching.attribution(
        model, pairs.clean, pairs.corrupted, "z", ("layer", "head"),
        patching.log_prob(pairs.target), steps=steps, progress=False,
    )  # fmt: skip
    each, told = patching.agreement(heads, guess), part["estimates"]["heads"][name]
    for measure in ("pearson", "spearman", "top_k_overlap", "sign_agreement"):
        assert told[measure] == pytest.approx(np.nanmean(getattr(each, measure)), abs=1e-4)
    off = (each.approximate - each.exact).mean(0)
    worst = each.sites[int(off.abs().argmax())]
    assert told["furthest_off"]["label"] == f"L{worst['layer']}H{worst['head']}"
    assert f"{told['pearson']:.2f}" in part["estimates"]["sentence"]


def test_the_circuit_is_chosen_on_one_half_and_judged_on_the_other(part, model, pairs):
    told = part["circuit"]
    chosen, judged = told["chosen_on"], told["judged_on"]
    assert sorted(chosen + judged) == list(range(len(pairs)))
    circuit = patching.Circuit.from_edge_attribution(
        model, pairs[chosen], metric=patching.log_prob(pairs.target[chosen]), budget=0.05,
        progress=False,
    )  # fmt: skip
    assert told["n_edges"] == len(circuit) == len(told["edges"])
    weights = [edge["weight"] for edge in told["edges"]]
    np.testing.assert_allclose(weights, circuit.weights, atol=1e-6)
    faithful = circuit.faithfulness(model, pairs[judged], n_random=5, seed=3, progress=False)
    np.testing.assert_allclose(told["faithfulness"]["curve"], faithful.curve, atol=1e-4)
    assert told["faithfulness"]["cpr"] == pytest.approx(faithful.cpr, abs=1e-4)
    assert told["faithfulness"]["cmd"] == pytest.approx(faithful.cmd, abs=1e-4)
    assert told["faithfulness"]["random"]["cpr"] == pytest.approx(faithful.random_cpr, abs=1e-4)
    assert told["faithfulness"]["curve"][-1] == pytest.approx(1.0, abs=1e-4)  # all edges
    own = circuit.faithfulness(model, pairs[chosen], progress=False)
    assert told["on_its_own_half"]["cpr"] == pytest.approx(own.cpr, abs=1e-4)
    lost = circuit.minimality(model, pairs[judged], of="node", progress=False).loss.max()
    assert told["minimality"]["most_needed"][0]["loss"] == pytest.approx(float(lost), abs=1e-4)


def test_no_series_that_chose_edges_judges_them(part, pairs):
    told = part["circuit"]

    def series(rows):
        both = pairs[rows]
        return {*both.clean_index.tolist(), *both.corrupted_index.tolist()}

    assert told["apart"]
    assert not series(told["chosen_on"]) & series(told["judged_on"])
    assert "no series is in both halves" in told["sentences"]["halves"]


def made(clean, corrupted):
    n, index = len(clean), (torch.tensor(clean), torch.tensor(corrupted))
    return Pairs(
        torch.zeros(n, 1, 4), torch.ones(n, 1, 4), torch.arange(n) % 2,
        clean_index=index[0], corrupted_index=index[1],
    )  # fmt: skip


def test_pairs_that_share_a_series_stay_in_one_half():
    # 0-1-2 hang together through series 5 and 7; 3..7 stand alone.
    first, second, apart = halves(made([5, 5, 9, 1, 2, 3, 4, 8], [6, 7, 7, 11, 12, 13, 14, 15]))
    assert apart and {len(first), len(second)} <= {3, 4, 5}
    assert any({0, 1, 2} <= set(side) for side in (first, second))


def test_one_clean_series_for_all_pairs_is_said_to_be_shared():
    first, second, apart = halves(made([0] * 8, list(range(1, 9))))
    assert not apart and len(first) == len(second) == 4


def test_the_page_shows_the_three_and_keeps_four_cards(numbers, part, page):
    html = page.read_text()
    assert len(numbers["headline"]) <= 4
    for heading in ("Head ranking", "The circuit", "A cheap estimate against the exact sweep"):
        assert f">{heading}</h3>" in html
    for name in ("classes-circuit", "classes-faithfulness", "classes-estimate-integrated"):
        assert f'id="fig-{name}"' in html
    assert part["circuit"]["sentences"]["cpr"] in html
    assert part["circuit"]["sentences"]["cmd"] in html
    assert part["estimates"]["failure"] in html
    assert cost_sentence(numbers["cost"]["classes"]) in html
    assert "bootstrap-t intervals for means" in html


def test_the_cost_is_measured_and_its_ratio_told(numbers):
    cost = numbers["cost"]["classes"]
    for grid in cost.values():
        assert grid["integrated"]["of_exact"] == pytest.approx(
            grid["integrated"]["seconds"] / grid["exact"]["seconds"]
        )

    def row(seconds, exact):
        return {"seconds": seconds, "of_exact": seconds / exact}

    planted = {
        "heads": {"exact": row(1.0, 1.0), "gradient": row(1.0, 1.0), "integrated": row(2.0, 1.0)},
        "head_positions": {
            "exact": row(10.0, 10.0), "gradient": row(0.1, 10.0), "integrated": row(0.5, 10.0),
        },
    }  # fmt: skip
    text = cost_sentence(planted)
    assert "0.500 s against 10.0 s of exact sweep (5.0 %; the plain gradient 1.0 %)" in text
    assert "costs more than it saves" in text


def test_few_pairs_make_no_circuit_and_the_page_says_why(model, data, tmp_path):
    out = report.build(model, tmp_path / "few.html", data=data, max_pairs=4, progress=False)
    few = json.loads(out.with_suffix(".json").read_text())["sets"]["classes"]
    assert few["circuit"] is None and few["ranking"] is None
    assert "takes at least 4 pairs in each" in few["no_circuit"]
    assert few["no_circuit"] in out.read_text()


def test_a_scatter_of_few_dots_needs_no_webgl(heads):
    figure = figures.draw(patching.agreement(heads, heads))
    assert {trace["type"] for trace in figure.to_dict()["data"]} == {"scatter"}
