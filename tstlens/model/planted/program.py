"""What a planted model computes, in words that a person can check: variables and their parents.

A program works on *factors*, what a series was drawn from (the level of a window, the direction of
a trend), and gives each node of the circuit a value. Replacing a value by that of another series
says what the model has to answer when the node's activation is replaced likewise: an interchange
intervention.

Source: Geiger et al. 2021 (arXiv 2106.02997), Geiger et al. 2022 (arXiv 2112.00826).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Values = Mapping[str, Tensor]  # name of a factor or node -> int [series]


@dataclass(frozen=True)
class Variable:
    """What one node of the circuit stands for.

    Args:
        node: its name in a component graph: ``"L0H1"``, ``"L1MLP"``.
        value: from factors and earlier variables to int [series].
        means: in words.
    """

    node: str
    value: Callable[[Values], Tensor]
    means: str


@dataclass(frozen=True)
class Program:
    """Variables in the order in which they are computed; the last one is the class.

    Args:
        variables: one per head and MLP of the circuit.
        factors: factor -> positions of the embedding that carry it, and no others.

    Example:
        >>> both = Variable("L1MLP", lambda v: v["a"] * v["L0H0"], "a and b")
        >>> second = Variable("L0H0", lambda v: v["b"], "b")
        >>> program = Program((second, both), {"a": (0,), "b": (1,)})
        >>> base, source = ({"a": torch.tensor([1]), "b": torch.tensor([b])} for b in (0, 1))
        >>> program.run(base), program.run(base, source, {"L0H0": torch.tensor([True])})
        (tensor([0]), tensor([1]))
    """

    variables: tuple[Variable, ...]
    factors: dict[str, tuple[int, ...]]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Heads and MLPs of the circuit."""
        return tuple(variable.node for variable in self.variables)

    @property
    def positions(self) -> frozenset[int]:
        """Positions that carry a factor."""
        return frozenset(pos for carrying in self.factors.values() for pos in carrying)

    def values(self, factors: Values) -> dict[str, Tensor]:
        """The value of every factor and variable, without interventions."""
        return self._values(factors, {}, {})

    def run(
        self, factors: Values, source: Values | None = None, swapped: Values | None = None
    ) -> Tensor:
        """The class, where some values are those of other series.

        Args:
            factors: of the series.
            source: factors of the other series; None for no interventions.
            swapped: factor or node -> bool [series], where its value is the other series'.
        """
        other = {} if source is None else self.values(source)
        return self._values(factors, other, swapped or {})[self.variables[-1].node]

    def _values(self, factors: Values, other: Values, swapped: Values) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name in self.factors:
            values[name] = _mixed(factors[name], other, swapped, name)
        for variable in self.variables:
            value = variable.value(values).long()
            values[variable.node] = _mixed(value, other, swapped, variable.node)
        return values


def _mixed(value: Tensor, other: Values, swapped: Values, name: str) -> Tensor:
    if name not in swapped:
        return value
    return torch.where(swapped[name], other[name], value)
