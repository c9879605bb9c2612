"""Codebooks in models of regime machines: what codes are to the states, beside controls, by seed.

Codes of a spliced model against the states that wrote its series, and what forecasts become when
the codes of a position are those of another state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.arguments import Seed, checked
from tstlens.codebooks.codebook import Codebook
from tstlens.codebooks.fitting import FittedCodebooks, fit, start
from tstlens.codebooks.search import Places, best_rivals
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HookedTST
from tstlens.results import TableResult
from tstlens.truth.regime import RegimeMachine, RegimeSeries
from tstlens.truth.scores import StateScore, score_states
from tstlens.truth.training import fit_next_patch, regime_model, score_next_patch

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
class RegimeScore(TableResult):
    """Codes against the true states of a :class:`~tstlens.truth.RegimeMachine`.

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

    def _rows(self) -> Iterator[dict[str, Any]]:
        """One per number: measure, where, value, control, and what the control is."""

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
class RegimeExperiment(TableResult):
    """The experiment on several machines, each with a model and codebooks of its own.

    Args:
        scores: one per seed.
        seeds: of machine, model and codebooks.
        made: the settings of all of them.
    """

    scores: tuple[RegimeScore, ...]
    seeds: tuple[int, ...]
    made: dict[str, Any] = field(default_factory=dict)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Those of all scores below each other, with a column for the seed."""
        for seed, score in zip(self.seeds, self.scores, strict=True):
            yield from ({**row, "seed": seed} for row in score._rows())

    def summary(self) -> pd.DataFrame:
        """Mean, smallest and largest over seeds, one row per measure and place."""
        frame = self.to_dataframe()
        grouped = frame.groupby(["measure", "where"], sort=False)
        table = grouped["value"].agg(["mean", "min", "max"])
        return table.assign(control=grouped["control"].mean()).reset_index()


N_PAIRS = 20_000


def swap_states(
    model: HookedTST,
    machine: RegimeMachine,
    data: RegimeSeries,
    known: Bool[Tensor, "n pos"],
    seed: int,
) -> tuple[StateSwap, ...]:
    """Swap codes between series in different states: each codebook alone, then all together.

    Args:
        model: with codebooks on.
        machine: what wrote the series.
        data: the series.
        known: where the state can be known; both series of a swap are, at the position swapped.
        seed: of the pairs.
    """
    hooks = list(model.acts_to_codebooks)
    which = [[hook] for hook in hooks] + ([hooks] if len(hooks) > 1 else [])
    pairs = _pairs(data.states, known, np.random.default_rng(seed))
    shares = _shares(model, machine, data.series)
    return tuple(_swapped(model, machine, data, chosen, pairs, shares) for chosen in which)


def _pairs(
    states: Tensor, known: Tensor, generator: np.random.Generator
) -> list[tuple[int, Int[Tensor, "way run"]]]:
    """Per position: series, source in another state, and a random one in none of the two."""
    found = []
    for pos in range(1, known.shape[1]):
        rows = known[:, pos].nonzero()[:, 0].cpu().numpy()
        if len(rows) < 3:
            continue
        here = states[:, pos].cpu().numpy()
        source, other = generator.permutation(rows), generator.permutation(rows)
        differ = (here[rows] != here[source]) & (here[other] != here[source])
        triples = np.stack([rows, source, other])[:, differ]
        if triples.shape[1]:
            found.append((pos, torch.from_numpy(triples)))
    return found


def _swapped(
    model: HookedTST,
    machine: RegimeMachine,
    data: RegimeSeries,
    hooks: Sequence[str],
    pairs: list[tuple[int, Tensor]],
    shares: Tensor,
) -> StateSwap:
    rows: dict[str, list[Tensor]] = {}
    states = data.states.cpu()
    valid = machine.valid_next
    for pos, (series, source, other) in pairs:
        before = shares[series, pos]
        target = states[source, pos]
        wanted = ~_allowed(valid, before, target)
        series, source, other = (index[wanted] for index in (series, source, other))
        before, target = before[wanted], target[wanted]
        if not len(series):
            continue
        after, control = (
            _with_codes_of(model, machine, data.series, series, giver, hooks, pos)
            for giver in (source, other)
        )
        same_patch = machine.prototype_of[states[series, pos]] == machine.prototype_of[target]
        for name, values in {
            "success": _allowed(valid, after, target),
            "random": _allowed(valid, control, target),
            "source": _allowed(valid, shares[source, pos], target),
            "aliased": same_patch,
            "before": divergence(before, shares[source, pos]),
            "after": divergence(after, shares[source, pos]),
        }.items():
            rows.setdefault(name, []).append(values)
    all_rows = {name: torch.cat(parts).double().numpy() for name, parts in rows.items()}
    aliased = all_rows.get("aliased", np.zeros(0)) > 0

    def mean(name: str, where: np.ndarray | None = None) -> float:
        values = all_rows.get(name, np.zeros(0))
        values = values if where is None else values[where]
        return float(values.mean()) if len(values) else float("nan")

    return StateSwap(
        hooks=tuple(hooks),
        n=len(aliased),
        success=mean("success"),
        random=mean("random"),
        source=mean("source"),
        n_aliased=int(aliased.sum()),
        aliased_success=mean("success", aliased),
        aliased_random=mean("random", aliased),
        before=mean("before"),
        after=mean("after"),
        by_construction=any(_last(model, hook) for hook in hooks),
    )


def _with_codes_of(
    model: HookedTST,
    machine: RegimeMachine,
    series: Tensor,
    rows: Tensor,
    source: Tensor,
    hooks: Sequence[str],
    pos: int,
) -> Float[Tensor, "run prototype"]:
    with model.swap_codes(series[source], list(hooks), pos=pos):
        return _shares(model, machine, series[rows])[:, pos]


def _shares(
    model: HookedTST, machine: RegimeMachine, series: Tensor
) -> Float[Tensor, "n pos prototype"]:
    with torch.no_grad():
        return machine.prototype_shares(model(series)).cpu()


def _allowed(valid: Tensor, shares: Tensor, states: Tensor) -> Bool[Tensor, " run"]:
    """Whether the most probable prototype may follow a state."""
    return valid[states].gather(1, shares.argmax(-1, keepdim=True))[:, 0]


def _last(model: HookedTST, hook: str) -> bool:
    """Whether all that a forecast depends on passes through this hook point at its position."""
    name = f"blocks.{model.cfg.n_layers - 1}."
    return hook in (f"{name}hook_resid_post", f"{name}hook_resid_mid", "ln_final.hook_normalized")


def divergence(one: Float[Tensor, "run p"], other: Float[Tensor, "run p"]) -> Float[Tensor, " run"]:
    """Jensen-Shannon divergence in bits, 0 to 1."""
    middle = (one + other) / 2
    gained = torch.special.xlogy(one, one / middle) + torch.special.xlogy(other, other / middle)
    return torch.nan_to_num(gained).double().sum(-1).clamp(min=0) / (2 * np.log(2))


def code_divergence(
    model: HookedTST,
    machine: RegimeMachine,
    data: RegimeSeries,
    ids: Int[Tensor, "n some_pos"],
    seed: int,
) -> tuple[float, float]:
    """Mean divergence between forecasts at positions that share a code, and at random ones.

    Only the first positions count, as many as there are ids. Pairs are drawn so that each is as
    likely to be the first of a pair as any other.
    """
    shares = _shares(model, machine, data.series)[:, : ids.shape[1]].flatten(0, 1)
    codes = ids.flatten().cpu().numpy()
    generator = np.random.default_rng(seed)
    first = generator.integers(len(codes), size=N_PAIRS)
    anyone = generator.integers(len(codes), size=N_PAIRS)
    order = np.argsort(codes, kind="stable")
    begin = np.searchsorted(codes[order], codes[first], side="left")
    end = np.searchsorted(codes[order], codes[first], side="right")
    like = order[begin + (generator.random(N_PAIRS) * (end - begin)).astype(int)]
    alike, apart = like != first, anyone != first  # not a position with itself
    within = divergence(shares[first[alike]], shares[like[alike]])
    between = divergence(shares[first[apart]], shares[anyone[apart]])
    return float(within.mean()) if len(within) else float("nan"), float(between.mean())


KNOWN = 0.99  # probability of a state, given all patches so far, from which it counts as known


@dataclass(frozen=True)
class _Sample:
    """Series of the machine: those that things are chosen on, or those that are reported on.

    Args:
        data: the series and their states [series, pos].
        known: [series, pos], where the state can be known.
        ids: hook point -> codes [series, pos].
    """

    data: RegimeSeries
    known: Bool[Tensor, "n pos"]
    ids: dict[str, Int[Tensor, "n pos"]]


@checked
@torch.no_grad()
def score_regime(
    model: HookedTST,
    machine: RegimeMachine,
    *,
    original: HookedTST | None = None,
    n_series: Annotated[int, Ge(2)] = 512,
    min_support: int = 20,
    seed: Seed = 0,
) -> RegimeScore:
    """Whether codes are the states of the machine that a model learned to forecast.

    It answers: do codes stand for hidden states, more precisely than any neuron, does the model
    still forecast through them, and does it *use* them as states (it should forecast what may
    follow the state whose codes it is given)?

    What can mislead: the prototype of a patch alone is already informative (``references``), so
    read mutual information against that and not against 0; more codes than states raise purity,
    which is therefore reported on other series than the states of codes were chosen on; at the
    first positions nobody can know the state; a swap behind the last attention decides the forecast
    by construction (``by_construction``), so look at the earlier ones.

    Args:
        model: forecasts the next patch at every position, see
            :func:`tstlens.truth.fit_next_patch`; with codebooks of one group and ``k=1`` on.
        machine: what writes its series.
        original: the model before it was tuned, for rows of its own.
        n_series: of each of two samples: one to choose on (states of codes, neurons and their
            thresholds, untuned tables), one to report on.
        min_support: positions with a code, from which its precision counts; in both samples.
        seed: of the samples, the swaps and the pairs.

    Raises:
        HookError: no codebook is on the model.
        ArgumentError: codebooks with several codes per position, or a model of another machine.

    Source: the TokFSM experiment of Tamkin, Taufeeque and Goodman 2023 (arXiv 2310.17230).

    Example:
        >>> from tstlens import truth
        >>> from tstlens.truth import RegimeMachine
        >>> machine = RegimeMachine()
        >>> model = truth.regime_model(machine)  # not trained
        >>> data = machine.sample(64, 16, seed=1)
        >>> _ = codebooks.fit(model, data, ["blocks.1.hook_resid_post"], n_codes=32, epochs=1,
        ...                   progress=False)
        >>> list(truth.score_regime(model, machine, n_series=32).mass)
        ['codebooks', 'without codebooks', 'best possible', 'patch alone', 'chance']
    """
    books: dict[str, Codebook] = model.acts_to_codebooks
    _check(books)
    n_pos = _n_pos(model, machine)
    choice, report = samples = [
        _sample(
            model,
            machine,
            machine.sample(n_series, n_pos, seed=2**20 + 2 * seed + which, split=split),
        )
        for which, split in enumerate(("choice", "report"))
    ]
    states = {
        hook: _against_states([one.ids[hook] for one in samples], samples, seed) for hook in books
    }
    data = (choice.data, report.data)
    activations = tuple(_neurons(model, original, books, series) for series in data)
    codes: list[CodePrecision] = []
    for hook in books:
        pair = (choice.ids[hook], report.ids[hook])
        codes += _precisions(hook, pair, data, states[hook]["all"], activations, min_support)
    return RegimeScore(
        mass=_masses(model, original, machine, *data, seed),
        states=states,
        references={
            name: _against_states([read(series) for series in data], samples, seed)
            for name, read in {
                "patch alone": lambda series: machine.nearest_prototype(series.patches),
                "best possible": machine.most_probable_states,
            }.items()
        },
        codes=tuple(codes),
        swaps=swap_states(model, machine, report.data, report.known, seed),
        divergence={
            hook: code_divergence(model, machine, report.data, ids, seed)
            for hook, ids in report.ids.items()
        },
        known_share=float(report.known.double().mean()),
        made={
            "model": model.cfg.model_name,
            "machine_seed": machine.seed,
            "n_series": n_series,
            "n_pos": n_pos,
            "min_support": min_support,
            "known_from": KNOWN,
            "seed": seed,
        },
    )


def _check(books: dict[str, Codebook]) -> None:
    if not books:
        raise HookError("no codebook is on the model: codebooks.fit(model, data, hooks)")
    for hook, book in books.items():
        if book.k != 1 or book.n_groups != 1:
            raise ArgumentError(
                f"a state is compared with one code per position: expected k=1 and n_groups=1 at "
                f"{hook}, got k={book.k} and n_groups={book.n_groups}"
            )


def _n_pos(model: HookedTST, machine: RegimeMachine) -> int:
    n_time = model.cfg.n_time
    if n_time is None or n_time % machine.patch_len or n_time <= machine.patch_len:
        raise ArgumentError(
            f"expected a model of series of several patches of {machine.patch_len} samples, as "
            f"the machine writes them, got n_time={n_time}; see regime_model"
        )
    return n_time // machine.patch_len


def _sample(model: HookedTST, machine: RegimeMachine, data: RegimeSeries) -> _Sample:
    known = machine.state_probabilities(data).amax(-1) >= KNOWN
    ids = {hook: found[..., 0] for hook, found in model.code_ids(data.series).items()}
    return _Sample(data, known, ids)


def _against_states(
    ids: Sequence[Tensor], samples: Sequence[_Sample], seed: int
) -> dict[str, StateScore]:
    """Scores of what tells states, at all positions and where the state can be known."""
    choice, report = samples
    states = report.data.states
    chosen_on = ids[0], choice.data.states
    found = {"all": score_states(ids[1], states, chosen_on=chosen_on, seed=seed)}
    if all(bool(one.known.any()) for one in samples):
        chosen_on = ids[0][choice.known], choice.data.states[choice.known]
        found["known"] = score_states(
            ids[1], states, chosen_on=chosen_on, observed=report.known, seed=seed
        )
    return found


def _masses(
    model: HookedTST,
    original: HookedTST | None,
    machine: RegimeMachine,
    choice: RegimeSeries,
    report: RegimeSeries,
    seed: int,
) -> dict[str, float]:
    def of(which: HookedTST) -> float:
        return score_next_patch(which, machine, report).valid_mass.mean()

    mass = {"codebooks": of(model)}
    with model.snapping(False):
        mass["without codebooks"] = of(model)
    if original is not None:
        bare = _without(original)
        mass["original"] = of(bare)
        untuned: dict[str, Codebook] = {}
        for hook, book in model.acts_to_codebooks.items():
            untuned |= start(bare, choice, [hook], copy.deepcopy(book.cfg), "kmeans", seed)
        with bare.codebooks(untuned):
            mass["original, codebooks untuned"] = of(bare)
    score = score_next_patch(model, machine, report)
    mass |= {"best possible": score.best.mean(), "patch alone": score.patch_only.mean()}
    return {name: float(value) for name, value in {**mass, "chance": score.chance}.items()}


def _without(model: HookedTST) -> HookedTST:
    bare = copy.deepcopy(model)
    bare.reset_saes()
    bare.reset_hooks()
    return bare.eval()


def _neurons(
    model: HookedTST,
    original: HookedTST | None,
    books: dict[str, Codebook],
    data: RegimeSeries,
) -> dict[str, dict[str, np.ndarray]]:
    """Model -> place -> activations [position, column] that codes compete with."""
    hidden = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    read = {"tuned": (model, [*(f"{hook}.hook_sae_input" for hook in books), *hidden])}
    if original is not None:
        read = {"original": (_without(original), [*books, *hidden]), **read}
    found = {}
    for name, (which, hooks) in read.items():
        _, cache = which.run_with_cache(data.series, names_filter=hooks)
        found[name] = {hook: cache[hook].flatten(0, -2).cpu().numpy() for hook in hooks}
    return found


def _precisions(
    hook: str,
    ids: tuple[Tensor, Tensor],
    samples: tuple[RegimeSeries, RegimeSeries],
    score: StateScore,
    activations: tuple[dict[str, dict[str, np.ndarray]], ...],
    min_support: int,
) -> list[CodePrecision]:
    """Codes of a hook point beside neurons chosen, thresholds and all, on the first sample."""
    chosen, reported = (found.flatten().cpu().numpy() for found in ids)
    states = tuple(data.states.flatten().cpu().numpy() for data in samples)
    found = []
    for state in np.intersect1d(np.unique(states[0]), np.unique(states[1])):
        own = score.codes[score.stands_for == state]
        frequent = [
            code
            for code in own
            if min((chosen == code).sum(), (reported == code).sum()) >= min_support
        ]
        sets = [own, *(np.array([code]) for code in frequent)]
        sets = [codes for codes in sets if np.isin(reported, codes).sum() >= min_support]
        train, test = (_places(held == state) for held in states)
        recalls = [train.score(np.isin(chosen, codes)).recall for codes in sets]
        rivals = {
            name: best_rivals(places, (1, -1), train, recalls, activations[1][name], test)
            for name, places in activations[0].items()
        }
        for number, codes in enumerate(sets):
            best = {name: ranked[number] for name, ranked in rivals.items()}
            scored = test.score(np.isin(reported, codes))
            found.append(
                CodePrecision(
                    hook=hook,
                    state=int(state),
                    codes=tuple(int(code) for code in codes),
                    together=number == 0 and len(codes) == len(own),
                    precision=scored.precision,
                    recall=scored.recall,
                    support=scored.support,
                    neurons={n: r.test.precision for n, r in best.items() if r is not None},
                    neuron_names={
                        n: f"{r.place}, {r.index}" for n, r in best.items() if r is not None
                    },
                )
            )
    return found


def _places(hits: Bool[np.ndarray, " unit"]) -> Places:
    return Places(hits, np.ones(len(hits), dtype=bool), None, 1)


HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
TRAINING_SEED = 2**21  # of the series that codebooks are fitted on; those of scores are smaller

# Codes near in space stand for a state, so distances; the task alone trains the tables, and the
# model's activations come to them (commitment).
FIT: dict[str, Any] = {
    "n_codes": 256,
    "k": 1,
    "similarity": "euclidean",
    "gradient": "task",
    "train_model": True,
    "epochs": 12,
    "batch_size": 64,
    "lr": 3e-3,
    "codebook_lr": 1e-2,
    "commitment": 1.0,
    "revive": False,
}


@checked
def fit_regime(
    model: HookedTST,
    machine: RegimeMachine,
    hooks: Iterable[str] = HOOKS,
    *,
    n_series: int = 6000,
    seed: Seed = 0,
    progress: bool = True,
    **options: Any,
) -> FittedCodebooks:
    """Tune a model of a regime machine together with codebooks; :func:`fit` with its targets.

    Args:
        model: a trained one; changed in place, the codebooks stay on it.
        machine: what writes its series.
        hooks: the hook points.
        n_series: series to fit on; all of them in every epoch.
        seed: of series and codebooks.
        progress: show a bar.
        **options: of :func:`fit`, in place of those that work here: 256 codes, one active,
            Euclidean distance, tables trained by the task, 12 epochs.
    """
    data = machine.sample(n_series, _n_pos(model, machine) + 1, seed=TRAINING_SEED + seed)
    chosen = {**FIT, "seed": seed, "progress": progress, **options}
    return fit(model, data.inputs, hooks, target=data.next_patches, **chosen)


@checked
def regime_experiment(
    seeds: Iterable[int] = (0, 1, 2),
    *,
    hooks: Iterable[str] = HOOKS,
    machine: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    steps: int = 3000,
    n_fit: int = 6000,
    n_score: int = 512,
    min_support: int = 20,
    progress: bool = True,
    **options: Any,
) -> RegimeExperiment:
    """Train a model on a regime machine, tune it with codebooks, score codes against states.

    It answers whether codebooks find the hidden states that a model tracks, where the answer is
    known; see :func:`score_regime` for what is measured and what can mislead. Every seed has a
    machine, a model and codebooks of its own. Takes about two minutes per seed on one core.

    Args:
        seeds: of machine, model and codebooks.
        hooks: of the codebooks.
        machine: arguments of :class:`~tstlens.truth.RegimeMachine`, such as ``n_states``.
        model: arguments of :func:`regime_model`.
        steps: of the model's training.
        n_fit: series that codebooks are fitted on.
        n_score: series of each of the two samples of the scores.
        min_support: see :func:`score_regime`.
        progress: show bars.
        **options: of :func:`fit`.

    Raises:
        ArgumentError: no seed, or sizes that are not possible.

    Source: the TokFSM experiment of Tamkin, Taufeeque and Goodman 2023 (arXiv 2310.17230).

    Example:
        >>> from tstlens import truth
        >>> found = truth.regime_experiment(seeds=[0])  # doctest: +SKIP
        >>> found.summary()  # doctest: +SKIP
    """
    chosen, places = tuple(int(seed) for seed in seeds), tuple(hooks)
    if not chosen:
        raise ArgumentError("seeds: expected at least one")
    scores = []
    for seed in chosen:
        world = RegimeMachine(**{"seed": seed, **(machine or {})})
        original = regime_model(world, **{"seed": seed, **(model or {})})
        shown = {"n_pos": _n_pos(original, world), "progress": progress}
        fit_next_patch(original, world, steps=steps, seed=seed, **shown)
        tuned = copy.deepcopy(original)
        fit_regime(tuned, world, places, n_series=n_fit, seed=seed, progress=progress, **options)
        scores.append(
            score_regime(
                tuned,
                world,
                original=original,
                n_series=n_score,
                min_support=min_support,
                seed=seed,
            )
        )
    return RegimeExperiment(
        scores=tuple(scores),
        seeds=chosen,
        made={
            "hooks": list(places),
            "machine": dict(machine or {}),
            "model": dict(model or {}),
            "steps": steps,
            "n_fit": n_fit,
            "n_score": n_score,
            "fit": {**FIT, **options},
        },
    )
