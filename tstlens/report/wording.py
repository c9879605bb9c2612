"""Words: the templates, and numbers in them with as many digits as they deserve.

Other views of a sweep, too: in probabilities, by part of the model.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from tstlens.errors import ArgumentError
from tstlens.patching import SweepResult
from tstlens.storage import fenced, plain


def nats(value: float, signed: bool = False) -> str:
    """A log-probability or a change of one, to a hundredth of a nat.

    Example:
        >>> nats(1.234, signed=True), nats(-0.5), nats(-0.001, signed=True)
        ('+1.23', '−0.50', '0.00')
    """
    if value != value:
        return "undefined"
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    if not text.strip("+-0."):
        return "0.00"
    return text.replace("-", "−")


def chance(value: float) -> str:
    """A probability, to a thousandth; smaller ones say that they are.

    Example:
        >>> chance(0.12345), chance(0.0001)
        ('0.123', '< 0.001')
    """
    if not -1e-6 <= value <= 1 + 1e-6:
        raise ArgumentError(f"expected a probability, got {value}")
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "< 0.001"


def percent(share: float) -> str:
    r"""A fraction in per cent, which a line break does not part from its sign.

    Example:
        >>> percent(0.314)
        '31\xa0%'
    """
    return "undefined" if share != share else f"{100 * share:.0f}\u00a0%".replace("-", "−")


def odds(value: float) -> str:
    """A p- or q-value, to two digits; below a thousandth it says so.

    Example:
        >>> odds(0.0312), odds(0.2), odds(0.00002)
        ('0.031', '0.20', '< 0.001')
    """
    if value != value:
        return "undefined"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


FOLDER = Path(__file__).parent


def template(name: str) -> Template:
    """A text of this folder; only in HTML is what it is given escaped."""
    return _environment().get_template(name)


def sentences(name: str, **values: Any) -> dict[str, str]:
    """The blocks of a template, each in one line."""
    text = template(name)
    context = text.new_context(values)
    return {
        key: re.sub(r"[ \n]+", " ", "".join(block(context))).strip()
        for key, block in text.blocks.items()
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for filtering in (nats, chance, percent, odds, two, share, plain, fenced):
        environment.filters[filtering.__name__] = filtering
    return environment


def two(value: float | None) -> str:
    """A correlation, to two decimals.

    Example:
        >>> two(-0.123), two(None)
        ('−0.12', 'undefined')
    """
    return "undefined" if value is None else f"{value:.2f}".replace("-", "−")


def share(value: float) -> str:
    """A fraction in per cent, small ones with a decimal.

    Example:
        >>> share(0.314), share(0.0123)
        ('31 %', '1.2 %')
    """
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def as_probability(result: SweepResult) -> SweepResult:
    """A sweep of log-probabilities in probabilities, pair by pair."""
    corrupted = result.baseline.exp()
    each = corrupted.view(-1, *(1,) * (result.values.ndim - 1))
    return dataclasses.replace(
        result,
        values=result.values.exp(),
        effects=each * result.effect().expm1(),
        baseline=corrupted,
        clean=result.clean.exp(),
        rounding=None if result.rounding is None else corrupted * result.rounding,
        metric="probability of the target class",
        unit="probability",
        range=(0.0, 1.0),
    )


def by_part(attention: SweepResult, mlp: SweepResult) -> SweepResult:
    """Attention and MLP of every layer as one result with the axis "part", in the model's order."""
    layers = attention.coords["layer"]
    names = [name for layer in layers for name in (f"attention L{layer}", f"MLP L{layer}")]
    return dataclasses.replace(
        attention,
        values=torch.stack([attention.values, mlp.values], 2).flatten(1),
        effects=torch.stack([attention.effect(), mlp.effect()], 2).flatten(1),
        axes=("pair", "part"),
        coords={"pair": attention.coords["pair"], "part": tuple(names)},
        site="attn_out, mlp_out",
    )
