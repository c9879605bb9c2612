"""Codes of a spliced model against the states that wrote its series."""

from __future__ import annotations

import copy

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tstlens.arguments import checked
from tstlens.codebooks.codebook import Codebook
from tstlens.codebooks.regime_result import CodePrecision, RegimeScore
from tstlens.codebooks.regime_swaps import code_divergence, swap_states
from tstlens.codebooks.search_rivals import Places, best_rivals
from tstlens.codebooks.starting import start
from tstlens.data import RegimeMachine, RegimeSeries
from tstlens.data.planted import StateScore, score_states
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HookedTST
from tstlens.training import score_next_patch

KNOWN = 0.99  # probability of a state, given all patches so far, from which it counts as known


@checked
@torch.no_grad()
def score_regime(
    model: HookedTST,
    machine: RegimeMachine,
    *,
    original: HookedTST | None = None,
    n_series: int = 512,
    min_support: int = 20,
    seed: int = 0,
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
            :func:`tstlens.training.fit_next_patch`; with codebooks of one group and ``k=1`` on.
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
        >>> from tstlens import codebooks
        >>> from tstlens.data import RegimeMachine
        >>> machine = RegimeMachine()
        >>> model = codebooks.regime_model(machine)  # not trained
        >>> data = machine.sample(64, 16, seed=1)
        >>> _ = codebooks.fit(model, data, ["blocks.1.hook_resid_post"], n_codes=32, epochs=1,
        ...                   progress=False)
        >>> list(codebooks.score_regime(model, machine, n_series=32).mass)
        ['codebooks', 'without codebooks', 'best possible', 'patch alone', 'chance']
    """
    books: dict[str, Codebook] = model.acts_to_codebooks
    _check(model, machine, books, n_series)
    n_pos = model.cfg.n_time // machine.patch_len  # type: ignore[operator]
    choice, report = (
        machine.sample(n_series, n_pos, seed=2**20 + 2 * seed + which, split=split)
        for which, split in enumerate(("choice", "report"))
    )
    known = tuple(machine.state_probabilities(data).amax(-1) >= KNOWN for data in (choice, report))
    ids = tuple(
        {hook: found[..., 0] for hook, found in model.code_ids(data.series).items()}
        for data in (choice, report)
    )
    states = {
        hook: _against_states(
            (ids[0][hook], ids[1][hook]), (choice.states, report.states), known, seed
        )
        for hook in books
    }
    activations = tuple(_neurons(model, original, books, data) for data in (choice, report))
    codes: list[CodePrecision] = []
    for hook in books:
        pair = (ids[0][hook], ids[1][hook])
        codes += _precisions(
            hook, pair, (choice, report), states[hook]["all"], activations, min_support
        )
    return RegimeScore(
        mass=_masses(model, original, machine, (choice, report), seed),
        states=states,
        references=_references(machine, choice, report, known, seed),
        codes=tuple(codes),
        swaps=swap_states(model, machine, report, known[1], seed),
        divergence={
            hook: code_divergence(model, machine, report, ids[1][hook], seed) for hook in books
        },
        known_share=float(known[1].double().mean()),
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


def _check(
    model: HookedTST, machine: RegimeMachine, books: dict[str, Codebook], n_series: int
) -> None:
    if not books:
        raise HookError("no codebook is on the model: codebooks.fit(model, data, hooks)")
    for hook, book in books.items():
        if book.k != 1 or book.n_groups != 1:
            raise ArgumentError(
                f"a state is compared with one code per position: expected k=1 and n_groups=1 at "
                f"{hook}, got k={book.k} and n_groups={book.n_groups}"
            )
    n_time = model.cfg.n_time
    if n_time is None or n_time % machine.patch_len or n_time <= machine.patch_len:
        raise ArgumentError(
            f"expected a model of series of several patches of {machine.patch_len} samples, as "
            f"the machine writes them, got n_time={n_time}"
        )
    if n_series < 2:
        raise ArgumentError(f"n_series: expected at least 2, got {n_series}")


def _against_states(
    ids: tuple[Tensor, Tensor],
    states: tuple[Tensor, Tensor],
    known: tuple[Tensor, ...],
    seed: int,
) -> dict[str, StateScore]:
    found = {"all": score_states(ids[1], states[1], chosen_on=(ids[0], states[0]), seed=seed)}
    if all(bool(places.any()) for places in known):
        chosen_on = ids[0][known[0]], states[0][known[0]]
        found["known"] = score_states(
            ids[1], states[1], chosen_on=chosen_on, observed=known[1], seed=seed
        )
    return found


def _references(
    machine: RegimeMachine,
    choice: RegimeSeries,
    report: RegimeSeries,
    known: tuple[Tensor, ...],
    seed: int,
) -> dict[str, dict[str, StateScore]]:
    """Mutual information of what needs no model: the prototype, and the exact reader's state."""
    states = choice.states, report.states
    patch, best = (
        tuple(read(data) for data in (choice, report))
        for read in (
            lambda data: machine.nearest_prototype(data.patches),
            lambda data: machine.state_probabilities(data).round(decimals=9).argmax(-1),
        )
    )
    return {
        "patch alone": _against_states((patch[0], patch[1]), states, known, seed),
        "best possible": _against_states((best[0], best[1]), states, known, seed),
    }


def _masses(
    model: HookedTST,
    original: HookedTST | None,
    machine: RegimeMachine,
    samples: tuple[RegimeSeries, RegimeSeries],
    seed: int,
) -> dict[str, float]:
    choice, report = samples

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
