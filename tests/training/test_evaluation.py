"""Evaluation against scikit-learn and closed forms."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn import metrics

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError
from tstlens.training import evaluate


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_every_number_equals_scikit_learn(make_data, fresh, batch_size):
    data, model = make_data(n=50, seed=4), fresh()
    came = evaluate(model, data, batch_size=batch_size)
    with torch.no_grad():
        probabilities = model.eval()(data.series).double().softmax(dim=1).numpy()
    truth, predicted = data.labels.numpy(), probabilities.argmax(axis=1)
    assert came.n == 50
    assert came.n_correct == metrics.accuracy_score(truth, predicted, normalize=False)
    assert came.accuracy == metrics.accuracy_score(truth, predicted)
    assert came.cross_entropy == pytest.approx(metrics.log_loss(truth, probabilities), rel=1e-5)
    assert (came.confusion.numpy() == metrics.confusion_matrix(truth, predicted)).all()
    report = metrics.classification_report(truth, predicted, output_dict=True, zero_division=0.0)
    frame = came.to_dataframe()
    for label, name in enumerate(data.class_names):
        assert frame.loc[name, "f1"] == pytest.approx(report[str(label)]["f1-score"])
        assert frame.loc[name, "recall"] == pytest.approx(report[str(label)]["recall"])
        assert frame.loc[name, "support"] == report[str(label)]["support"]


def test_a_function_of_known_logits_gives_the_closed_form():
    data = TimeSeriesData(torch.zeros(4, 1, 5), torch.tensor([0, 0, 1, 1]), ("a", "b", "never"))
    logits = torch.tensor([3.0, 1.0, 1.0]).log()
    came = evaluate(lambda series: logits.expand(len(series), 3), data)
    assert came.confusion.tolist() == [[2, 0, 0], [2, 0, 0], [0, 0, 0]]
    assert came.cross_entropy == pytest.approx(-torch.tensor([0.6, 0.2]).log().mean().item())
    assert came.to_dataframe().loc["never"].tolist() == [0, 0, 0, 0]
    assert json.loads(json.dumps(came.to_dict()))["n_correct"] == 2


def test_the_table_of_series_equals_a_loop(make_data, fresh):
    data, model = make_data(n=50, seed=4), fresh()
    came = evaluate(model, data)
    table = came.series_table()
    with torch.no_grad():
        probabilities = model.eval()(data.series).softmax(1)
    for at, row in enumerate(probabilities.tolist()):
        ranked = sorted(range(len(row)), key=lambda index, row=row: -row[index])
        label = int(data.labels[at])
        found = table.loc[at]
        assert found["label"] == data.class_names[label]
        assert found["prediction"] == data.class_names[ranked[0]]
        assert found["runner_up"] == data.class_names[ranked[1]]
        assert found["correct"] == (ranked[0] == label)
        expected = [row[ranked[0]], row[label], row[ranked[1]]]
        numbers = ["probability", "label_probability", "runner_up_probability"]
        assert found[numbers].tolist() == pytest.approx(expected, abs=1e-6)
    assert table["correct"].mean() == came.accuracy
    grouped = table.groupby("label")["correct"].mean()
    assert grouped.to_dict() == pytest.approx(came.to_dataframe()["recall"].to_dict())


def test_one_class_has_no_runner_up():
    data = TimeSeriesData(torch.zeros(2, 1, 5), torch.tensor([0, 0]), ("only",))
    table = evaluate(lambda series: torch.zeros(len(series), 1), data).series_table()
    assert list(table) == ["label", "prediction", "correct", "probability", "label_probability"]


def test_masks_reach_the_model_and_training_flags_come_back(make_data, fresh):
    data, model = make_data(masked=True), fresh().train()
    model.classifier.eval()
    with torch.no_grad():
        expected = fresh().eval()(data.series, mask=data.mask).softmax(dim=1)
    torch.testing.assert_close(evaluate(model, data, batch_size=5).probabilities, expected)
    assert model.training and model.conv1.training and not model.classifier.training


def test_what_does_not_fit_is_refused_in_words(fresh, data):
    with pytest.raises(ArgumentError, match="at least one series, got none"):
        evaluate(fresh(), data[:0])
    with pytest.raises(
        ArgumentError, match=r"expected logits \[batch=24, class=3\], got \[24, 5\]"
    ):
        evaluate(fresh(n_classes=5), data)
    data.labels[0] = -1
    with pytest.raises(LabelError, match=r"expected labels in 0\.\.2 .* got -1\.\.2"):
        evaluate(fresh(), data)
