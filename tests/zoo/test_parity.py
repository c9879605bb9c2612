"""The limit of a conversion's difference: the source's own rounding, measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tstlens
from tstlens.errors import ParityError
from tstlens.model.parity import Parity
from tstlens.zoo import converting
from tstlens.zoo.parity import Trial, check_parity


class Rounding(torch.nn.Module):
    """Gives 1, and in float32 is off by ``error``."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.weight, self.error = torch.nn.Parameter(torch.ones(1)), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x) + (self.error if x.dtype == torch.float32 else 0.0)


def measured(model: Any, ours: float, theirs: float, wrong: float = 0.0) -> Parity:
    trial = Trial(
        "ones",
        (torch.ones(3),),
        lambda model, x: Rounding(ours)(x) + wrong,
        lambda source, x: source(x),
    )
    return check_parity(model, Rounding(theirs), (trial,), "rounding")


@pytest.fixture(scope="module")
def model(conv_tst) -> Any:
    return tstlens.convert(conv_tst())


@pytest.mark.parametrize(
    ("ours", "theirs", "passes"),
    [(9e-6, 0, True), (2e-5, 0, False), (2e-3, 1e-3, True), (6e-3, 1e-3, False)],
)
def test_a_difference_may_be_four_times_what_the_source_rounds(model, ours, theirs, passes):
    found = measured(model, ours, theirs)
    assert found.passed is passes
    assert found.source_rounding == pytest.approx(theirs, rel=1e-3, abs=1e-7)
    assert found.tolerance == pytest.approx(max(1e-5, 4 * theirs), rel=1e-3)


def test_float64_refuses_what_rounding_would_hide(model):
    found = measured(model, 1e-3, 1e-3, wrong=1e-6)
    assert found.max_rel <= found.tolerance and not found.passed


def test_a_refusal_gives_the_difference_and_the_sources_rounding(monkeypatch, conv_tst):
    def bad(model: Any, *given: Any) -> Parity:
        return measured(model, 6e-3, 1e-3)

    monkeypatch.setattr(converting, "check_parity", bad)
    words = "float32 5.0e-03 .*limit 0.004,.* the source's own rounding 1.0e-03"
    with pytest.raises(ParityError, match=words):
        tstlens.convert(conv_tst())


def test_healthy_weights_that_round_coarsely_convert(conv_tst):
    source = copy.deepcopy(conv_tst())
    with torch.no_grad():
        for name, weight in source.named_parameters():
            if "in_proj_weight" in name:
                weight.mul_(60.0)  # steep attention: scores in the hundreds
    assert tstlens.convert(source).parity.passed


def test_reports_of_older_files_load(model):
    old = {k: v for k, v in model.parity.to_dict().items() if k != "source_rounding"}
    assert Parity.from_dict(old).passed and Parity.from_dict(old).source_rounding is None
