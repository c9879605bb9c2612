"""What training refuses, and what would have trained or scored on something else than meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tstlens.data import TimeSeriesData, load_forecasting
from tstlens.errors import (
    ArgumentError,
    LabelError,
    SeriesValueError,
    StorageError,
    UnknownNameError,
)
from tstlens.training import (
    RECIPES,
    Augment,
    ConvTST,
    ConvTSTConfig,
    Recipe,
    evaluate,
    fit_recipe,
    forecast_errors,
    stratified_split,
    train,
)

pytestmark = pytest.mark.usefixtures("no_shape_checks")

SERIES = torch.randn(8, 2, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2
DATA = TimeSeriesData(SERIES, LABELS, ("up", "down"))
GUNPOINT = RECIPES["gunpoint"].to_dict()


def small() -> ConvTST:
    sizes = {"conv_channels": (4,), "kernel_sizes": (3,), "strides": (1,), "n_heads": 1}
    return ConvTST(n_channels=2, n_time=12, n_classes=2, d_mlp=4, n_layers=1, **sizes)


def linear(n_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(24, n_classes))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": "gunpoint"}, ArgumentError, "model as a Module, got 'gunpoint'"),
        ({"model": nn.Flatten()}, ArgumentError, "parameters to train, got none"),
        ({"model": linear(3)}, ArgumentError, r"logits \[4, 2\], one per class .*, got \[4, 3\]"),
        ({"data": SERIES}, ArgumentError, "data as a TimeSeriesData, got Tensor"),
        ({"epochs": 2.5}, ArgumentError, "epochs as an integer of at least 1, got 2.5"),
        ({"batch_size": 0}, ArgumentError, "batch_size as an integer of at least 1, got 0"),
        ({"lr": float("inf")}, ArgumentError, "lr as a positive number, got inf"),
        ({"lr": "0.1"}, ArgumentError, "lr as a positive number, got '0.1'"),
        ({"weight_decay": -1.0}, ArgumentError, "weight_decay as .* of at least 0, got -1.0"),
        ({"label_smoothing": 2.0}, ArgumentError, "label_smoothing as .* at most 1, got 2.0"),
        ({"label_smoothing": -0.1}, ArgumentError, "label_smoothing as .* at least 0"),
        ({"clip_norm": -1.0}, ArgumentError, "clip_norm as a positive number or None, got -1.0"),
        ({"augment": {"jitter": 0.1}}, ArgumentError, "augment as an Augment or None"),
        ({"refit": "no"}, ArgumentError, "refit as True or False, got 'no'"),
        (
            {"val": TimeSeriesData(SERIES, LABELS, ("down", "up")), "val_fraction": 0.0},
            LabelError,
            "the classes of data in their order",
        ),
    ],
)
def test_training_refuses(options, error, words):
    given = {"model": small(), "data": DATA, "epochs": 1, "batch_size": 4, "val_fraction": 0.25}
    given |= {"select": "last", "progress": False, **options}
    with pytest.raises(error, match=words):
        train(given.pop("model"), given.pop("data"), **given)


def test_a_checkpoint_that_is_a_file_is_left_alone(tmp_path):
    place = tmp_path / "notes.txt"
    place.write_text("mine")
    with pytest.raises(StorageError, match="expected a folder at .*, found a file"):
        train(small(), DATA, epochs=1, select="last", progress=False, checkpoint=place)
    assert place.read_text() == "mine"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: evaluate(lambda x: x[:, :, 0] / 0 * 0, DATA), ArgumentError, "finite logits, got"),
        (lambda: evaluate(ConvTST, DATA), ArgumentError, "a function, got the class ConvTST"),
        (lambda: evaluate(small(), SERIES), ArgumentError, "data as a TimeSeriesData"),
        (lambda: small()(SERIES.double()), SeriesValueError, "float32 series like the model's"),
        (lambda: stratified_split(LABELS.float(), 0.5), LabelError, "integers .*torch.float32"),
        (lambda: stratified_split(LABELS[:, None], 0.5), LabelError, r"integers .*\[8, 1\]"),
        (lambda: Augment(jitter="0.1"), ArgumentError, "Augment.jitter as a finite number"),
        (lambda: Augment(jitter=float("nan")), ArgumentError, "a finite number, got nan"),
        (lambda: ConvTSTConfig(2, "12", 2), ArgumentError, "ConvTSTConfig.n_time as an integer"),
        (lambda: ConvTSTConfig.from_dict({"n_time": 3}), ArgumentError, "needs n_channels, n_clas"),
        (lambda: ConvTSTConfig.from_dict(3), ArgumentError, "ConvTSTConfig as a dict, got int"),
        (lambda: Recipe.from_dict({"name": "x"}), ArgumentError, "Recipe needs dataset, config"),
        (lambda: Recipe.from_dict({**GUNPOINT, "augment": {"z": 1}}), UnknownNameError, "'z'"),
        (lambda: fit_recipe("gunpoint"), ArgumentError, "recipe as a Recipe, got 'gunpoint'"),
        (
            lambda: forecast_errors([1.0], load_forecasting("co2", n_time=9, horizon=2)),
            SeriesValueError,
            "forecast as a tensor of floats",
        ),
    ],
)
def test_other_calls_refuse(call, error, words):
    with pytest.raises(error, match=words):
        call()
