"""Part (d) of the suite: which state? Codes of a model of a regime machine against its states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.data import RegimeMachine, RegimeSeries, score_states
from tstlens.data.planted import Score
from tstlens.model import HookedTST
from tstlens.randomness import seeded
from tstlens.training import fit_next_patch, score_next_patch

HOOK = "blocks.1.hook_resid_post"
_N_POS = 16
_SEEDS = (2**22, 2**23, 2**24)  # of series to fit, to choose states of codes, and to report on


def state_scores(
    seeds: Sequence[int],
    *,
    steps: int = 2000,
    n_fit: int = 2000,
    n_score: int = 400,
    codes_per_state: int = 2,
    sae_steps: int = 2000,
    progress: bool = True,
) -> tuple[list[Score], dict[str, float]]:
    """NMI and precision of codes of a trained model, at one hook point in its middle.

    All rows give one of at most as many codes to every position; what a code stands for is chosen
    on other series than those of the report. Tuned codebooks are those of another model, trained
    together with its codes: they show what that buys, not what the frozen model holds.

    Args:
        seeds: of machine, model and codes.
        steps: of the model's training.
        n_fit: series that codes are fitted on.
        n_score: series of each of the two samples of the scores.
        codes_per_state: size of every table.
        sae_steps: of the SAE's training.
        progress: show a bar.

    Returns:
        Scores, and "share of the possible, seed" -> valid-transition mass of the model, from 0
        (what the patch alone allows) to 1 (the best possible).
    """
    from tstlens import codebooks

    scores, checks = [], {}
    for seed in tqdm(seeds, desc="state", disable=not progress):
        machine = RegimeMachine(seed=seed)
        model = codebooks.regime_model(machine, n_pos=_N_POS, seed=seed)
        fit_next_patch(model, machine, n_pos=_N_POS, steps=steps, seed=seed, progress=False)
        fitted, choice, report = (
            machine.sample(n, _N_POS, seed=first + seed)
            for n, first in zip((n_fit, n_score, n_score), _SEEDS, strict=True)
        )
        mass = score_next_patch(model, machine, report)
        floor, top = mass.patch_only.mean(), mass.best.mean()
        share = (mass.valid_mass.mean() - floor) / (top - floor)
        checks[f"share of the possible, seed {seed}"] = float(share)
        n_codes = codes_per_state * machine.n_states
        samples = (fitted, choice, report)
        for method, (kind, on_choice, on_report) in _codes(
            model, machine, samples, n_codes, sae_steps, seed
        ).items():
            found = score_states(
                on_report, report.states, chosen_on=(on_choice, choice.states), n_shuffles=1
            )
            for measure, value in (("NMI", found.nmi), ("precision", found.purity)):
                scores.append(Score("regime machine", method, measure, seed, value, kind))
    return scores, checks


@seeded(0)
def _codes(
    model: HookedTST,
    machine: RegimeMachine,
    samples: tuple[RegimeSeries, RegimeSeries, RegimeSeries],
    n_codes: int,
    sae_steps: int,
    seed: int,
) -> dict[str, tuple[str, Tensor, Tensor]]:
    """Method -> kind of row, and codes [series, pos] of the last two samples."""
    from sklearn.cluster import KMeans

    from tstlens import codebooks, saes

    fitted, choice, report = samples
    rows = activations(model, fitted, HOOK)
    flat = rows.flatten(0, 1)
    sae = saes.fit(flat, "topk", d_sae=n_codes, k=4, steps=sae_steps, seed=seed, progress=False)
    kmeans = KMeans(n_codes, n_init="auto", random_state=seed).fit(flat.numpy())
    neurons = f"{HOOK.rsplit('.', 1)[0]}.mlp.hook_post"
    hidden = activations(model, fitted, neurons).flatten(0, 1)
    mean, spread = hidden.mean(0), hidden.std(0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed + 53)
    table = flat.mean(0) + flat.std(0) * torch.randn(n_codes, flat.shape[1], generator=generator)
    frozen, tuned = copy.deepcopy(model), copy.deepcopy(model)
    options = {"n_codes": n_codes, "seed": seed, "progress": False}
    codebooks.fit(
        frozen, fitted, [HOOK], similarity="euclidean", gradient="reconstruction", epochs=4,
        **options,
    )  # fmt: skip
    codebooks.fit_regime(tuned, machine, [HOOK], n_series=len(fitted), **options)

    def strongest(data: RegimeSeries) -> Tensor:
        return sae.encode(activations(model, data, HOOK)).argmax(-1)

    def clusters(data: RegimeSeries) -> Tensor:
        found = activations(model, data, HOOK)
        return torch.from_numpy(kmeans.predict(found.flatten(0, 1).numpy())).view(found.shape[:2])

    def neuron(data: RegimeSeries) -> Tensor:
        return ((activations(model, data, neurons) - mean) / spread).argmax(-1)

    def codes_of(which: HookedTST) -> Callable[[RegimeSeries], Tensor]:
        return lambda data: which.code_ids(data.series)[HOOK][..., 0]

    def by_table(data: RegimeSeries) -> Tensor:
        return torch.cdist(activations(model, data, HOOK), table).argmin(-1)

    readers: dict[str, tuple[str, Callable[[RegimeSeries], Tensor]]] = {
        "codebook, tuned with the model": ("method", codes_of(tuned)),
        "codebook, model frozen": ("method", codes_of(frozen)),
        "k-means": ("method", clusters),
        "SAE, strongest latent": ("method", strongest),
        "neurons, strongest": ("trivial", neuron),
        "nearest prototype of the patch": (
            "trivial",
            lambda data: machine.nearest_prototype(data.patches),
        ),
        "random table": ("random", by_table),
        "shuffled k-means": ("random", lambda data: _shuffled(clusters(data), generator)),
        "best possible reader": (
            "answer",
            # Rounded: states that are equally likely must not be told apart by the last bit.
            lambda data: machine.state_probabilities(data).round(decimals=9).argmax(-1),
        ),
    }
    with torch.no_grad():
        return {
            method: (kind, read(choice), read(report)) for method, (kind, read) in readers.items()
        }


@torch.no_grad()
def activations(model: HookedTST, data: RegimeSeries, hook: str) -> Tensor:
    """[series, pos, width] at a hook point."""
    return model.run_with_cache(data.series, names_filter=[hook])[1][hook]


def _shuffled(ids: Tensor, generator: torch.Generator) -> Tensor:
    return ids.flatten()[torch.randperm(ids.numel(), generator=generator)].view(ids.shape)
