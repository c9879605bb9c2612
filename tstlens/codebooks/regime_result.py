"""What codes are to the states of a regime machine, measured, with controls beside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tstlens.data.planted import StateScore
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

POSITIONS = ("all", "known")


@dataclass(frozen=True)
class CodePrecision:
    """One code beside the neuron that marks its state best at (at least) its recall.

    Args:
        hook: the codebook's hook point.
        code: its number.
        state: the state it stands for, chosen on other series.
        precision: share of the code's positions that are in that state.
        recall: share of the state's positions that have the code.
        support: positions with the code.
        neuron: where that neuron is, "tuned" or "original" model, hook point and column.
        neuron_precision: share of the positions beyond its threshold that are in the state.
        neuron_recall: share of the state's positions that are beyond it.
    """

    hook: str
    code: int
    state: int
    precision: float
    recall: float
    support: int
    neuron: str
    neuron_precision: float
    neuron_recall: float


@dataclass(frozen=True)
class StateSwap:
    """Forecasts after the codes of one position were taken from a series in another state.

    Only runs count whose forecast was not valid for the other state before.

    Args:
        hooks: the codebooks whose codes were swapped, together.
        n: runs.
        success: share whose most probable next patch may follow the swapped-in state.
        random: the same where the codes came from a random series instead.
        source: share of the sources whose own forecast may follow their state: the most there is.
        n_aliased: runs whose two states write the same patch, so that only memory tells them apart.
        aliased_success: success in these.
        aliased_random: and with random codes.
        before: Jensen-Shannon divergence between the forecasts of a run and its source, in bits.
        after: the same after the swap; 0 where the codes decide all.
        by_construction: nothing but these codes reaches the forecast, so that ``after`` must be 0.
    """

    hooks: tuple[str, ...]
    n: int
    success: float
    random: float
    source: float
    n_aliased: int
    aliased_success: float
    aliased_random: float
    before: float
    after: float
    by_construction: bool


@dataclass(frozen=True)
class RegimeScore(Result):
    """Codes against the true states of a :class:`~tstlens.data.RegimeMachine`.

    Args:
        mass: row -> valid-transition mass: ``"codebooks"`` is the model with its codebooks,
            ``"without codebooks"`` the same weights without; with the model before it was tuned
            also ``"original"`` and ``"original, codebooks untuned"`` (k-means tables); then
            ``"best possible"``, ``"patch alone"`` and ``"chance"``.
        states: hook point -> ``"all"`` positions, or those where the state can be ``"known"`` from
            the patches so far -> mutual information and purity, the states of codes chosen on other
            series.
        references: the same of what needs no model: ``"patch alone"`` takes the prototype for a
            code, ``"best possible"`` the most probable state given all patches so far.
        codes: codes with enough support, each beside the best neuron.
        swaps: each codebook alone, then all together.
        divergence: hook point -> Jensen-Shannon divergence (bits) between forecasts at two
            positions that share a code, and at two random positions.
        known_share: share of positions where the state can be known.
        made: how.
    """

    mass: dict[str, float]
    states: dict[str, dict[str, StateScore]]
    references: dict[str, dict[str, StateScore]]
    codes: tuple[CodePrecision, ...]
    swaps: tuple[StateSwap, ...]
    divergence: dict[str, tuple[float, float]]
    known_share: float
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def best_hook(self) -> str:
        """The hook point whose codes tell most about the states."""
        return max(self.states, key=lambda hook: self.states[hook]["all"].nmi)

    def precision(self, hook: str) -> tuple[float, float]:
        """Mean precision of the codes at a hook point, and of the best neurons, by code."""
        found = [code for code in self.codes if code.hook == hook]
        if not found:
            return float("nan"), float("nan")
        codes = np.mean([code.precision for code in found])
        return float(codes), float(np.mean([code.neuron_precision for code in found]))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per number: measure, where, value, control, and what the control is."""
        import pandas as pd

        return pd.DataFrame(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        def row(
            measure: str, where: str, value: float, control: float = np.nan, kind: str = ""
        ) -> dict[str, Any]:
            return {
                "measure": measure,
                "where": where,
                "value": float(value),
                "control": float(control),
                "control_is": kind,
            }

        for name, mass in self.mass.items():
            yield row("valid-transition mass", name, mass)
        for name, by_positions in {**self.states, **self.references}.items():
            for positions, score in by_positions.items():
                where = f"{name}, {positions} positions"
                yield row("NMI", where, score.nmi, score.shuffled_nmi, "shuffled codes")
                yield row("purity", where, score.purity, score.shuffled_purity, "shuffled codes")
        for hook in self.states:
            yield row("code precision", hook, *self.precision(hook), "best neuron")
        for swap in self.swaps:
            where = " and ".join(swap.hooks)
            yield row("swap success", where, swap.success, swap.random, "random codes")
            aliased = swap.aliased_success, swap.aliased_random
            yield row("swap success, same patch", where, *aliased, "random codes")
            yield row("divergence after swap (bits)", where, swap.after, swap.before, "before")
        for hook, (within, between) in self.divergence.items():
            yield row("divergence within a code (bits)", hook, within, between, "random pairs")

    def __repr__(self) -> str:
        best = self.best_hook
        code, neuron = self.precision(best)
        return (
            f"RegimeScore(valid mass {self.mass['codebooks']:.3f}, best at {best}: NMI "
            f"{self.states[best]['all'].nmi:.3f}, precision {code:.3f} (best neuron {neuron:.3f}))"
        )


@dataclass(frozen=True)
class RegimeExperiment(Result):
    """The experiment on several machines, each with a model and codebooks of its own.

    Args:
        scores: one per seed.
        seeds: of machine, model and codebooks.
        made: the settings of all of them.
    """

    scores: tuple[RegimeScore, ...]
    seeds: tuple[int, ...]
    made: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """The frames of all scores below each other, with a column for the seed."""
        import pandas as pd

        frames = [
            score.to_dataframe().assign(seed=seed)
            for seed, score in zip(self.seeds, self.scores, strict=True)
        ]
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Mean, smallest and largest over seeds, one row per measure and place."""
        frame = self.to_dataframe()
        grouped = frame.groupby(["measure", "where"], sort=False)
        table = grouped["value"].agg(["mean", "min", "max"])
        return table.assign(control=grouped["control"].mean()).reset_index()
