"""The experiment with a known answer: codebooks in models of regime machines, by seed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from tstlens.arguments import checked
from tstlens.codebooks.fitting import FittedCodebooks, fit
from tstlens.codebooks.regime_result import RegimeExperiment
from tstlens.codebooks.regime_score import score_regime
from tstlens.data import RegimeMachine
from tstlens.errors import ArgumentError
from tstlens.model import CustomConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig
from tstlens.training import NextPatchHead, fit_next_patch

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
def regime_model(
    machine: RegimeMachine,
    *,
    n_pos: int = 16,
    n_layers: int = 3,
    d_model: int = 16,
    n_heads: int = 4,
    d_mlp: int = 64,
    seed: int = 0,
) -> HookedTST:
    """A small causal transformer, not trained, that says at every position which patch is next.

    Args:
        machine: whose patches it reads.
        n_pos: patches of a series.
        n_layers, d_model, n_heads, d_mlp: sizes.
        seed: of the weights.

    Example:
        >>> from tstlens import codebooks
        >>> from tstlens.data import RegimeMachine
        >>> machine = RegimeMachine()
        >>> codebooks.regime_model(machine)(machine.sample(2, 16).series).shape
        torch.Size([2, 16, 12])
    """
    config = HookedTSTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_mlp=d_mlp,
        n_channels=1,
        n_time=n_pos * machine.patch_len,
        positions="learned",
        causal=True,
        final_norm=True,
        embed=LinearPatchesConfig(machine.patch_len, machine.patch_len),
        head=CustomConfig("tstlens.training.planted.NextPatchHead"),
        seed=seed,
        model_name=f"regime-machine-{machine.seed}",
    )
    return HookedTST(config, head=NextPatchHead(d_model, machine.patch_len, seed))


@checked
def fit_regime(
    model: HookedTST,
    machine: RegimeMachine,
    hooks: Iterable[str] = HOOKS,
    *,
    n_series: int = 6000,
    seed: int = 0,
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
    if model.cfg.n_time is None:
        raise ArgumentError("expected a model of series of one length: see regime_model")
    n_pos = model.cfg.n_time // machine.patch_len
    data = machine.sample(n_series, n_pos + 1, seed=TRAINING_SEED + seed)
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
        machine: arguments of :class:`~tstlens.data.RegimeMachine`, such as ``n_states``.
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
        >>> from tstlens import codebooks
        >>> found = codebooks.regime_experiment(seeds=[0])  # doctest: +SKIP
        >>> found.summary()  # doctest: +SKIP
    """
    chosen, places = tuple(int(seed) for seed in seeds), tuple(hooks)
    if not chosen:
        raise ArgumentError("seeds: expected at least one")
    scores = []
    for seed in chosen:
        world = RegimeMachine(**{"seed": seed, **(machine or {})})
        original = regime_model(world, **{"seed": seed, **(model or {})})
        n_pos = original.cfg.n_time // world.patch_len  # type: ignore[operator]
        fit_next_patch(original, world, n_pos=n_pos, steps=steps, seed=seed, progress=progress)
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
