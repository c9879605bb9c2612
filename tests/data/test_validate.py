from __future__ import annotations

import pytest
import torch

from tstlens.data.validate import check_series
from tstlens.errors import SeriesShapeError, SeriesValueError


def message(error: type[Exception], *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        check_series(*args, **kwargs)
    return str(caught.value)


def test_channels_last_is_named_with_its_cure():
    assert message(SeriesShapeError, torch.zeros(4, 25, 12), 12, 25) == (
        "expected [batch, channel=12, time=25], got [4, 25, 12]; "
        "series are channel-first, try series.transpose(1, 2)"
    )
    assert "transpose(1, 2)" in message(SeriesShapeError, torch.zeros(4, 25, 12), 12)


def test_a_wrong_channel_count_or_length_says_which():
    assert message(SeriesShapeError, torch.zeros(4, 3, 25), 12, 25) == (
        "expected [batch, channel=12, time=25], got [4, 3, 25]; "
        "the series have 3 channels where 12 are needed"
    )
    assert message(SeriesShapeError, torch.zeros(4, 12, 30), 12, 25) == (
        "expected [batch, channel=12, time=25], got [4, 12, 30]; "
        "the series have 30 samples where 25 are needed"
    )


def test_missing_axes_say_which_one_to_add():
    assert "series[None, None]" in message(SeriesShapeError, torch.zeros(25))
    assert message(SeriesShapeError, torch.zeros(12, 25), 12) == (
        "expected [batch, channel=12, time], got [12, 25]; "
        "for one series, add the batch axis: series[None]"
    )
    assert "add the channel axis: series[:, None]" in message(SeriesShapeError, torch.zeros(4, 25))
    assert "three axes" in message(SeriesShapeError, torch.zeros(1, 1, 1, 1))
    assert "at least one channel and one sample" in message(SeriesShapeError, torch.zeros(2, 0, 3))


def test_integers_are_told_to_become_floats():
    assert message(SeriesValueError, torch.zeros(1, 1, 3, dtype=torch.int64)) == (
        "expected floating point series, got torch.int64; call series.float() first"
    )


@pytest.mark.parametrize(
    ("value", "name", "advice"),
    [
        (float("nan"), "NaN", "fill or drop missing values"),
        (
            float("inf"),
            "infinity",
            "look for a division by zero, or numbers that float32 cannot hold",
        ),
        (
            -float("inf"),
            "-infinity",
            "look for a division by zero, or numbers that float32 cannot hold",
        ),
    ],
)
def test_the_first_value_that_is_not_finite_is_located(value, name, advice):
    series = torch.zeros(2, 3, 4)
    series[1, 2, 0] = series[1, 2, 3] = value
    assert message(SeriesValueError, series) == (
        f"expected finite series, got {name} at [1, 2, 0] and in 1 more places "
        f"([batch, channel, time]); {advice}"
    )
    check_series(series, finite=False)


def test_padding_must_be_finite_too():
    series = torch.zeros(1, 1, 3)
    mask = torch.tensor([[True, True, False]])
    series[0, 0, 2] = 7.0
    check_series(series, mask=mask)
    series[0, 0, 2] = float("nan")
    assert "padding must be finite too" in message(SeriesValueError, series, mask=mask)


def test_a_mask_that_does_not_fit_is_refused():
    series = torch.zeros(2, 1, 3)
    assert "expected a bool mask [batch=2, time=3], got torch.float32" in message(
        SeriesShapeError, series, mask=torch.ones(2, 3)
    )
    assert message(SeriesShapeError, series, mask=torch.ones(3, 2, dtype=torch.bool)) == (
        "expected a mask [batch=2, time=3], got [3, 2]"
    )
    empty = torch.tensor([[True, False, False], [False, False, False]])
    assert "got none in row 1" in message(SeriesShapeError, series, mask=empty)


def test_an_empty_batch_and_half_precision_pass():
    check_series(torch.zeros(0, 2, 5), n_channels=2)
    check_series(torch.zeros(1, 2, 5, dtype=torch.bfloat16), 2, 5)
