"""The figure of methods against answers."""

from __future__ import annotations

import pytest

from tstlens.truth.scores import Score, TruthTable


@pytest.fixture
def table():
    rows = {"a good method": "method", "chance": "random", "the answer": "answer"}
    scores = [
        Score(task, method, measure, seed, 0.1 * seed + 0.2 * number, kind)
        for number, (method, kind) in enumerate(rows.items(), start=1)
        for task in ("one", "two")
        for measure in ("AUPRC", "prediction difference")
        for seed in range(3)
    ]
    return TruthTable("where", tuple(scores))


def test_dots_are_means_and_bars_their_intervals(table):
    figure = table.figure()
    means = [trace for trace in figure.data if trace.error_x.array is not None]
    assert len(means) == 6  # three kinds in two panels
    summary = table.summary().set_index(["method", "measure"])
    for trace in means[:3]:
        row = summary.loc[(trace.y[0], "AUPRC")]
        assert trace.x[0] == pytest.approx(row["mean"])
        assert trace.x[0] + trace.error_x.array[0] == pytest.approx(row["high"])
        assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(row["low"])
    assert figure.layout.title.text.startswith("Which samples decide?")
    assert list(figure.layout.yaxis.categoryarray) == ["the answer", "chance", "a good method"]


def test_one_task_and_single_seeds(table):
    figure = table.figure(task="one", title=None)
    assert figure.layout.title.text is None
    faint = [trace for trace in figure.data if trace.hoverinfo == "skip"]
    assert sum(len(trace.x) for trace in faint) == 18
