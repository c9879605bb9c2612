"""Whether a planted graph holds: interchange interventions on series that nobody was fitted on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tstlens.model.hooked_tst import HookedTST
from tstlens.model.planted.interchange import component_nodes, interchange, splice_positions
from tstlens.model.planted.program import Program, Values
from tstlens.results import Result
from tstlens.shapes import Series

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = 0.99


@dataclass(frozen=True)
class Verification(Result):
    """How often the model answers as its program does, intervention by intervention.

    Args:
        accuracy: intervention -> share of pairs with the program's answer: ``"none"``; every node
            and factor of the circuit by itself; ``"any of the circuit"`` (each of them with
            probability 1/2); every node and position outside by itself, which must change nothing;
            ``"all outside"``.
        inside: the interventions on the circuit.
        n_pairs: pairs of series.
        made: how.
    """

    accuracy: dict[str, float]
    inside: tuple[str, ...]
    n_pairs: int
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The lowest accuracy over all interventions."""
        return min(self.accuracy.values())

    @property
    def holds(self) -> bool:
        """Whether every intervention is answered rightly in 99 % of the pairs or more."""
        return self.worst >= REQUIRED

    def to_dataframe(self) -> pd.DataFrame:
        """One row per intervention: intervention, inside, accuracy."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"intervention": name, "inside": name in self.inside, "accuracy": value}
                for name, value in self.accuracy.items()
            ]
        )

    def __repr__(self) -> str:
        worst = min(self.accuracy, key=self.accuracy.__getitem__)
        return (
            f"Verification({'holds' if self.holds else 'FAILS'}: worst {self.worst:.3f} at "
            f"{worst!r} of {len(self.accuracy)} interventions, {self.n_pairs} pairs)"
        )


@torch.no_grad()
def verify(
    model: HookedTST,
    program: Program,
    base: tuple[Series, Values],
    source: tuple[Series, Values],
    seed: int,
) -> Verification:
    """Every interchange intervention on every pair of a base and a source series."""
    n = len(base[0])
    generator = torch.Generator().manual_seed(seed)
    whole = torch.ones(n, dtype=torch.bool)
    n_pos = model.n_pos(base[0].shape[2]) or 0
    inside = (*program.factors, *program.nodes)
    others = [node for node in component_nodes(model) if node not in program.nodes]
    places = [pos for pos in range(n_pos) if pos not in program.positions]

    def right(swapped: dict[str, Tensor]) -> float:
        return correct(model, program, base, source, swapped).float().mean().item()

    accuracy = {"none": right({})}
    accuracy |= {name: right({name: whole}) for name in inside}
    some = {name: torch.rand(n, generator=generator) < 0.5 for name in inside}
    accuracy["any of the circuit"] = right(some)
    outside = [*others, *(f"pos{pos}" for pos in places)]
    accuracy |= {name: right({name: whole}) for name in outside}
    accuracy["all outside"] = right(dict.fromkeys(outside, whole))
    accuracy["any outside, any of the circuit"] = right(
        some | {name: torch.rand(n, generator=generator) < 0.5 for name in outside}
    )
    names = ("none", *inside, "any of the circuit")
    return Verification(accuracy, names, n, {"model": model.cfg.model_name, "seed": seed})


def correct(
    model: HookedTST,
    program: Program,
    base: tuple[Series, Values],
    source: tuple[Series, Values],
    swapped: dict[str, Tensor],
) -> Tensor:
    """bool [series], where the model's answer is the program's under the same swaps."""
    wanted, logits = run_both(model, program, base, source, swapped)
    return logits.argmax(1) == wanted


def run_both(
    model: HookedTST,
    program: Program,
    base: tuple[Series, Values],
    source: tuple[Series, Values],
    swapped: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """The program's class and the model's logits, both with the same things swapped.

    Args:
        model: the model.
        program: what it should compute.
        base: series and their factors.
        source: those that swapped values come from.
        swapped: factor, head, MLP or position (``pos3``) -> bool [series].
    """
    n = len(base[0])
    places = torch.zeros(n, model.n_pos(base[0].shape[2]) or 0, dtype=torch.bool)
    nodes = {}
    for name, rows in swapped.items():
        if name in program.factors:
            places[:, list(program.factors[name])] |= rows[:, None]
        elif name.startswith("pos"):
            places[:, int(name.removeprefix("pos"))] |= rows
        else:
            nodes[name] = rows
    known = {name: rows for name, rows in swapped.items() if name in program.factors}
    known |= {name: rows for name, rows in nodes.items() if name in program.nodes}
    series = splice_positions(model, base[0], source[0], places)
    return program.run(base[1], source[1], known), interchange(model, series, source[0], nodes)
