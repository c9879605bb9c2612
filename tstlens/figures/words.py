"""What figures and reports call sites, axes, times and units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tstlens.points import SITES, layer_of

Cells = Sequence[tuple[int, int]] | None

_LETTER = {"layer": "L", "head": "H"}
_TITLES = {
    "query": "query position (attends)",
    "key": "key position (attended to)",
    "time": "time (sample)",
    "pos": "position",
    "feature": "dimension",
    "part": "",
}


def site_title(site: str) -> str:
    """A site in words: ``z`` is "the head's output (z)"."""
    return SITES.get(site, ("", site))[1]


def hook_label(hook: str) -> str:
    """A hook point in a title: "L1 resid_post", "L1 latents"."""
    kind, layer = hook.rsplit("hook_", 1)[-1], layer_of(hook)
    if hook.endswith("hook_sae_acts_post"):
        kind = "latents"
    elif hook.rsplit(".", 2)[-2:-1] == ["mlp"]:
        kind = f"mlp_{kind}"
    return kind if layer is None else f"L{layer} {kind}"


def hook_labels(hooks: tuple[str, ...]) -> tuple[str, ...]:
    """Hook points as ticks say them: "L0 resid_post", or "L0" where all are of one kind."""
    labels = tuple(hook_label(hook) for hook in hooks)
    in_layers = all(layer_of(hook) is not None for hook in hooks)
    if in_layers and len({label.split(" ")[1] for label in labels}) == 1:
        labels = tuple(label.split(" ")[0] for label in labels)
    return labels if len(set(labels)) == len(labels) else hooks


def hook_place(hook: str) -> str:
    """A hook point in a sentence: "the MLP output (mlp_out), layer 0"."""
    layer = layer_of(hook)
    name = site_title(hook.rsplit("hook_", 1)[-1])
    return name if layer is None else f"{name}, layer {layer}"


def time_label(cell: tuple[int, int]) -> str:
    """The samples of a position: "12", or "12–15" where it covers several; "token" for none."""
    if cell[1] <= cell[0]:
        return "token"
    first, last = cell[0], cell[1] - 1
    return f"{first}" if last <= first else f"{first}–{last}"


def when(cell: tuple[int, int]) -> str:
    """The samples of a position with their noun: "sample 12", "samples 12–15"."""
    if cell[1] <= cell[0]:
        return "a special token"
    return f"sample{'s' if cell[1] - cell[0] > 1 else ''} {time_label(cell)}"


def entry_label(axis: str, entry: Any, cells: Cells = None) -> str:
    """One entry of an axis as a tick says it: "L0", "H6", "12–15"."""
    if axis in ("pos", "query", "key") and cells is not None:
        return time_label(cells[entry])
    return f"{_LETTER.get(axis, '')}{entry}"


def axis_title(axis: str, cells: Cells = None) -> str:
    """An axis in words, with its unit where it has one."""
    if cells is not None and axis in ("query", "key"):
        return f"{'query' if axis == 'query' else 'key'}: time (sample)"
    if cells is not None and axis == "pos":
        return _TITLES["time"]
    return _TITLES.get(axis, axis)


def site_label(entries: Mapping[str, Any], cells: Cells = None) -> str:
    """A place on a grid: {"layer": 0, "head": 6, "pos": 12} is "L0H6, sample 12".

    Example:
        >>> site_label({"layer": 1, "channel": 3})
        'L1, channel 3'
    """
    compact = "".join(f"{_LETTER[axis]}{entries[axis]}" for axis in _LETTER if axis in entries)
    rest = []
    for axis, entry in entries.items():
        if axis in ("pos", "query", "key") and cells is not None:
            at = when(cells[entry])
            rest.append(at if axis == "pos" else f"{axis} {at}")
        elif axis == "time":
            rest.append(f"sample {entry}")
        elif axis not in _LETTER:
            rest.append(f"{_TITLES.get(axis, axis)} {entry}")
    return ", ".join([*([compact] if compact else []), *rest]) or "the site"


def quantity(metric: str, unit: str, kind: str) -> str:
    """What a colour bar shows, with its unit.

    Args:
        metric: name of the metric.
        unit: its unit.
        kind: "effect", "normalized" or "value".

    Example:
        >>> quantity("log-probability of the target class", "nats", "effect")
        'change of log-probability (nats)'
    """
    name = metric.removesuffix(" of the target class")
    if kind == "normalized":
        return f"share of the gap in {name} closed"
    # A function of one's own has no unit to name: its unit is "value".
    shown = name if unit in name or unit == "value" else f"{name} ({unit})"
    return shown if kind == "value" else f"change of {shown}"


def suffix(unit: str) -> str:
    """A unit behind a number; probabilities, and what has no unit to name, have none."""
    return "" if unit in ("probability", "value") else f" {unit}"


def number(value: float, signed: bool = False) -> str:
    """Three significant digits, with a real minus sign.

    Example:
        >>> number(-0.01234), number(3.0, signed=True), number(12.3456), number(0.0)
        ('−0.0123', '+3.00', '12.3', '0')
    """
    if value != value:
        return "undefined"
    if value == 0:
        return "0"
    size = abs(value)
    if size and size < 5e-4:
        text = f"{value:+.1e}" if signed else f"{value:.1e}"
    else:
        digits = 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
        text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−")


def in_cell(value: float, form: str) -> str:
    """A number as a cell of a heat map prints it, with a real minus sign; nothing where undefined.

    Args:
        value: the number.
        form: one of Python's formats: ".2f", ".0e".

    Example:
        >>> in_cell(-0.123, ".2f"), in_cell(-0.001, ".2f"), in_cell(-0.00004, ".0e")
        ('−0.12', '0.00', '−4e−5')
    """
    if value != value:
        return ""
    text = format(value, form).replace("e-0", "e-")
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "−")
