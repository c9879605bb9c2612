"""What codes are to the states of a regime machine, measured, with controls beside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tstlens.arguments import checked
from tstlens.data.planted import StateScore
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

POSITIONS = ("all", "known")


@dataclass(frozen=True)
class CodePrecision:
    """How precisely codes mark a state, beside the best neurons at (at least) the same recall.

    Neurons, signs and thresholds are chosen on other series, among what every codebook reads and
    the hidden layer of every MLP.

    Args:
        hook: the codebook's hook point.
        state: the state that the codes stand for, chosen on other series.
        codes: all codes that stand for it, or a single one.
        together: whether these are all codes of the state.
        precision: share of the codes' positions that are in the state.
        recall: share of the state's positions that have one of the codes.
        support: positions with one of the codes.
        neurons: model -> precision of its best neuron: ``"original"``, the model before it was
            tuned, which is what there is without codebooks; ``"tuned"``, whose activations have
            learned to lie near codes.
        neuron_names: the same -> hook point and column.
    """

    hook: str
    state: int
    codes: tuple[int, ...]
    together: bool
    precision: float
    recall: float
    support: int
    neurons: dict[str, float]
    neuron_names: dict[str, str]


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
        codes: every state's codes together, and every single code with enough support, each beside
            the best neurons.
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

    @checked
    def precision(self, hook: str, *, together: bool = True) -> dict[str, float]:
        """Mean precision at a hook point: of ``"codes"`` and of the best neurons by model.

        Args:
            hook: the hook point.
            together: over states, each marked by all of its codes; False for single codes, whose
                recall is lower, which is easier for neurons, too.
        """
        found = [one for one in self.codes if one.hook == hook and one.together == together]
        if not found:
            return {"codes": float("nan")}
        means = {"codes": float(np.mean([one.precision for one in found]))}
        for model in found[0].neurons:
            means[model] = float(np.mean([one.neurons[model] for one in found]))
        return means

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
            for together, measure in ((True, "precision, state"), (False, "precision, code")):
                codes, *neurons = self.precision(hook, together=together).items()
                for model, value in neurons:
                    kind = f"best neuron, {model} model"
                    yield row(f"{measure} ({model})", hook, codes[1], value, kind)
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
        precision = self.precision(best)
        neurons = ", ".join(f"{name} {precision[name]:.3f}" for name in list(precision)[1:])
        return (
            f"RegimeScore(valid mass {self.mass['codebooks']:.3f}, best at {best}: NMI "
            f"{self.states[best]['all'].nmi:.3f}, precision {precision['codes']:.3f} "
            f"(best neuron: {neurons}))"
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
