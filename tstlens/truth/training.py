"""Recipes for the planted tasks: models that have learned what there is to explain.

A method that explains a model can be scored against a planted answer only if the model has found
that answer. `fit_planted` trains a small ConvTST on a where-task; `fit_next_patch` trains any
module to say what a `RegimeMachine` writes next, and `score_next_patch` says how near it came to
the best that is possible.

Measured with these recipes on one thread (``pytest -s tests/benchmarks/test_planted.py``): accuracy
on 400 test series, by seed of task and model:

| task                     | seed 0 | 1     | 2     | 3     | 4     | CPU seconds per fit |
|--------------------------|--------|-------|-------|-------|-------|---------------------|
| freq-shapes              | 1.000  | 1.000 | 1.000 | 1.000 | 1.000 | 6 to 8              |
| freq-shapes-multivariate | 0.998  | 1.000 | 1.000 | 1.000 | 1.000 | 6 to 8              |
| seq-comb-univariate      | 1.000  | 0.998 | 1.000 | 0.995 | 0.995 | 7 to 8              |
| seq-comb-multivariate    | 0.983  | 0.988 | 0.975 | 0.970 | 0.973 | 38 to 47            |
| low-var                  | 0.995  | 0.998 | 0.998 | 0.995 | 0.993 | 7 to 8              |

With the background alone in place of the deciding samples they are right in 23 to 29 % of the
cases (chance is 25 %). Causal trunks of 3 layers and width 16, 4000 steps on the regime machines
of seeds 0 to 2: valid-transition mass 0.935, 0.934, 0.938 (best possible 0.949, 0.947, 0.950;
patch alone 0.482, 0.496, 0.461), from position 5 on 0.987 to 0.988 (best possible 1.000).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from tstlens.arguments import Count, Positive, Seed, checked, needs_gradients
from tstlens.effects import Labelled
from tstlens.errors import SeriesShapeError, UnknownNameError
from tstlens.model import CustomConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig
from tstlens.randomness import seeded
from tstlens.run import Runs
from tstlens.training.conv_tst import ConvTST, ConvTSTConfig
from tstlens.training.evaluation import Evaluation, device_of, evaluate
from tstlens.training.loop import LastGood, TrainingResult, train
from tstlens.truth.regime import RegimeMachine, RegimeSeries
from tstlens.truth.tasks import PlantedTask, planted

TARGETS = ("patch", "prototype")
_BLOCK = 50  # batches drawn at once
TRAINING_SEEDS = 2**32  # training series take seeds from here on; smaller ones stay for tests


@dataclass(frozen=True)
class PlantedRecipe:
    """How a small ConvTST learns a planted task.

    Args:
        n_train: series to train on; they cost nothing, and fresh ones are the best regulariser.
        config: fields of the ConvTSTConfig beside channels, length and classes.
        training: arguments of ``train``.
    """

    n_train: int
    config: Mapping[str, Any]
    training: Mapping[str, Any]


_CONFIG: dict[str, Any] = {
    "conv_channels": (32, 32),
    "kernel_sizes": (9, 5),
    "strides": (2, 2),  # 24 positions of 4 samples
    "n_heads": 4,
    "d_mlp": 64,
    "n_layers": 2,
    "dropout": 0.0,
    "pooling": "mean",
    "norm_first": True,
}
_TRAINING: dict[str, Any] = {
    "epochs": 6,
    "batch_size": 32,
    "lr": 3e-3,
    "schedule": "onecycle",
    "val_fraction": 0.0,
    "select": "last",
}

PLANTED_RECIPES: dict[str, PlantedRecipe] = {
    "freq-shapes": PlantedRecipe(3000, _CONFIG, _TRAINING),
    "freq-shapes-multivariate": PlantedRecipe(3000, _CONFIG, _TRAINING),
    "seq-comb-univariate": PlantedRecipe(3000, _CONFIG, _TRAINING),
    "seq-comb-multivariate": PlantedRecipe(20000, _CONFIG, {**_TRAINING, "epochs": 5}),
    "low-var": PlantedRecipe(3000, _CONFIG, _TRAINING),
}


@checked
@needs_gradients
@torch.enable_grad()
def fit_planted(
    name: str, seed: Seed = 0, *, n_test: int = 400, progress: bool = True
) -> tuple[ConvTST, PlantedTask, Evaluation, TrainingResult]:
    """Train a small transformer on a planted task, to 95 % or more on series it has not seen.

    Args:
        name: one of :func:`tstlens.truth.planted_names`.
        seed: of the task, the initialisation and the training.
        n_test: series of the test split.
        progress: whether to show a bar.

    Returns:
        The model in eval mode, the task (training split; ``task.test`` is the other), the
        evaluation on the test split, and how training went. Look at ``accuracy`` before scoring
        a method on it.

    Raises:
        UnknownNameError: no task of this name.

    Example:
        >>> model, task, evaluation, _ = fit_planted("low-var", progress=False)  # doctest: +SKIP
        >>> evaluation.accuracy >= 0.95  # doctest: +SKIP
        True
    """
    if name not in PLANTED_RECIPES:
        raise UnknownNameError(name, PLANTED_RECIPES, "this names a task of truth.planted")
    recipe = PLANTED_RECIPES[name]
    task = planted(name, seed, n_train=recipe.n_train, n_test=n_test)
    _, n_channels, n_time = task.series.shape
    sizes = ConvTSTConfig(n_channels, n_time, len(task.class_names), **recipe.config)
    with seeded(seed):
        model = ConvTST(sizes)
    result = train(model, task.data, seed=seed, progress=progress, **recipe.training)
    return model, task, evaluate(model, task.test.data), result


class NextPatchHead(nn.Module):
    """A linear map of every position: the patch after it, or logits of the next prototype.

    Give it as ``head=`` to a causal ``HookedTST``, beside ``CustomConfig`` in its config.

    Args:
        d_model: width of the trunk.
        d_out: ``machine.patch_len`` for patches, ``machine.n_prototypes`` for logits.
        seed: of the weights.

    Example:
        >>> NextPatchHead(16, 12)(torch.zeros(2, 8, 16)).shape
        torch.Size([2, 8, 12])
    """

    @checked
    def __init__(self, d_model: int, d_out: int, seed: Seed = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W_U = nn.Parameter(torch.randn(d_model, d_out, generator=generator) / d_model**0.5)
        self.b_U = nn.Parameter(torch.zeros(d_out))

    def forward(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_out"]:
        return residual @ self.W_U + self.b_U


@checked
def regime_model(
    machine: RegimeMachine,
    *,
    n_pos: int = 16,
    n_layers: int = 3,
    d_model: int = 16,
    n_heads: int = 4,
    d_mlp: int = 64,
    seed: Seed = 0,
) -> HookedTST:
    """A small causal transformer, not trained, that says at every position which patch is next.

    Args:
        machine: whose patches it reads.
        n_pos: patches of a series.
        n_layers, d_model, n_heads, d_mlp: sizes.
        seed: of the weights.

    Example:
        >>> from tstlens import truth
        >>> from tstlens.truth import RegimeMachine
        >>> machine = RegimeMachine()
        >>> truth.regime_model(machine)(machine.sample(2, 16).series).shape
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
        head=CustomConfig("tstlens.truth.training.NextPatchHead"),
        seed=seed,
        model_name=f"regime-machine-{machine.seed}",
    )
    return HookedTST(config, head=NextPatchHead(d_model, machine.patch_len, seed))


@checked
@needs_gradients
@torch.enable_grad()
def fit_next_patch(
    model: nn.Module,
    machine: RegimeMachine,
    *,
    n_pos: Count = 16,
    target: str = "patch",
    steps: Count = 4000,
    batch_size: Count = 64,
    lr: Positive = 2e-2,
    seed: Seed = 0,
    progress: bool = True,
) -> Float[np.ndarray, " step"]:
    """Train a module in place to say, at every position, what the machine writes next.

    Every step sees fresh series, so nothing can be learned by heart. The module must be causal:
    at each position it may see no patch after it, else it copies the answer.

    Args:
        model: ``model(series)`` gives [batch, pos, patch_len], or [batch, pos, prototype] logits.
        machine: what writes the series.
        n_pos: patches that the model reads; it is asked for the next one at every position, so
            series are drawn one patch longer.
        target: ``"patch"`` (mean squared error of the next patch, noise included) or
            ``"prototype"`` (cross-entropy of its prototype).
        steps: of AdamW.
        batch_size: series per step.
        lr: peak of the one-cycle schedule.
        seed: of the series. Those drawn here never equal those of ``machine.sample`` with a seed
            below 2**32.
        progress: whether to show a bar.

    Returns:
        The loss of every step. The model is in eval mode.

    Raises:
        UnknownNameError: no target of this name.
        ArgumentError: a number of steps, series or positions that is not possible.
        SeriesShapeError: an output of another shape.

    Example:
        >>> machine = RegimeMachine()
        >>> model = regime_model(machine)
        >>> losses = fit_next_patch(model, machine, steps=2, progress=False)
        >>> score_next_patch(model, machine, machine.sample(8, 16, seed=1)).n_series
        8
    """
    if target not in TARGETS:
        raise UnknownNameError(target, TARGETS, "this names what fit_next_patch predicts")
    device = device_of(model) or torch.device("cpu")
    block = machine.sample(1, n_pos)
    model.train()

    def loss_at(step: int) -> Tensor:
        nonlocal block
        at = step % _BLOCK
        if at == 0:
            n = batch_size * min(_BLOCK, steps - step)
            drawn_with = TRAINING_SEEDS * (seed + 1) + step
            block = machine.sample(n, n_pos + 1, seed=drawn_with).to(device)
        return _loss(model, machine, block[at * batch_size : (at + 1) * batch_size], target)

    return descend(model, loss_at, steps, lr, "next patch", progress)


def descend(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    lr: float,
    title: str,
    progress: bool,
) -> Float[np.ndarray, " step"]:
    """AdamW on a one-cycle schedule, in place; the model is in eval mode afterwards.

    Args:
        model: what is trained.
        loss_at: the loss of a step, from its number.
        steps: how many.
        lr: peak of the schedule.
        title: of the bar.
        progress: whether to show it.

    Returns:
        The loss of every step.

    Raises:
        ArgumentError: a loss or weights that are no longer finite; the last ones that were are put
            back.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    losses, good = np.empty(steps), LastGood(model, lr)
    for step in tqdm(range(steps), desc=title, disable=not progress):
        if step % _BLOCK == 0:
            good.keep(f"at step {step}")
        loss = loss_at(step)
        losses[step] = loss.item()
        good.check_loss(losses[step], f"at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    good.keep("at the end")
    model.eval()
    return losses


def _loss(
    model: Callable[..., Tensor], machine: RegimeMachine, data: RegimeSeries, target: str
) -> Tensor:
    output = _checked(model(data.inputs.series), machine, data.inputs.states.shape, target)
    if target == "patch":
        return F.mse_loss(output, data.next_patches)
    following = machine.prototype_of.to(data.states.device)[data.states[:, 1:]]
    return F.cross_entropy(output.flatten(0, 1), following.flatten())


def _checked(
    output: Any, machine: RegimeMachine, shape: Sequence[int], target: str
) -> Float[Tensor, "batch pos d_out"]:
    expected = (*shape, machine.patch_len if target == "patch" else machine.n_prototypes)
    if output.shape != expected:
        raise SeriesShapeError(
            f"expected the model to give [batch, pos, {target}] {list(expected)}, "
            f"got {list(output.shape)}"
        )
    return output


@dataclass(frozen=True, eq=False)
class NextPatchScore(Labelled):
    """How well a model forecasts a `RegimeMachine`, between chance and the best possible.

    Args:
        valid_mass: [pos] mean probability that the forecast puts on prototypes that may follow.
        best: [pos] the same for the best possible reader of the same patches.
        patch_only: [pos] the same for the best reader of the patch at the position alone: what a
            model gets without memory.
        chance: the same for a uniform forecast.
        valid_choice: [pos] share of series in which the most probable prototype may follow.
        n_series: series that count.
        made: how.
    """

    valid_mass: Float[np.ndarray, " pos"]
    best: Float[np.ndarray, " pos"]
    patch_only: Float[np.ndarray, " pos"]
    chance: float
    valid_choice: Float[np.ndarray, " pos"]
    n_series: int
    made: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> dict[str, Sequence[int]]:
        """The positions."""
        return {"pos": range(len(self.valid_mass))}

    def columns(self) -> dict[str, Any]:
        """Masses of the model, the best, and the patch alone, right choices, chance."""
        names = ("valid_mass", "best", "patch_only", "valid_choice", "chance")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        means = (self.valid_mass.mean(), self.best.mean(), self.patch_only.mean())
        shown = "valid mass {:.3f}, best {:.3f}, patch alone {:.3f}".format(*means)
        return f"NextPatchScore({shown}, chance {self.chance:.3f}, {self.n_series} series)"


@checked
@torch.no_grad()
def score_next_patch(
    model: Callable[..., Tensor],
    machine: RegimeMachine,
    data: RegimeSeries,
    *,
    target: str = "patch",
    batch_size: Count = 256,
) -> NextPatchScore:
    """Valid-transition mass of a model's forecasts, by position.

    What can mislead: the first positions are hard for everybody, so compare with ``best`` at the
    same position; a point forecast is read as shares of prototypes, in which small errors spread
    mass over prototypes that cannot follow (``valid_choice`` does not see them).

    Args:
        model: as for `fit_next_patch`.
        machine: what wrote the series.
        data: series of a draw that the model was not trained on.
        target: what the model's output is, as for `fit_next_patch`.
        batch_size: series per forward pass.

    Raises:
        UnknownNameError: no target of this name.
        SeriesShapeError: an output of another shape.

    Source: arXiv 2310.17230 (the share of valid transitions).
    """
    if target not in TARGETS:
        raise UnknownNameError(target, TARGETS, "this names what score_next_patch reads")
    read = machine.prototype_shares if target == "patch" else _softmax
    parts = []
    for one in Runs(model, data, batch_size=batch_size).passes():
        output = _checked(one.output, machine, (len(one), data.states.shape[1]), target)
        parts.append(read(output).cpu().double())
    forecast, states = torch.cat(parts), data.states.cpu()

    def mass(probabilities: Tensor) -> np.ndarray:
        return machine.valid_transition_mass(probabilities, states).mean(0).cpu().numpy()

    chosen = forecast.argmax(-1, keepdim=True)
    valid = machine.valid_next[states].gather(-1, chosen)[..., 0]
    return NextPatchScore(
        valid_mass=mass(forecast),
        best=mass(machine.forecast(data.to("cpu"))),
        patch_only=mass(machine.forecast(data.to("cpu"), history=False)),
        chance=machine.n_edges / machine.n_prototypes,
        valid_choice=valid.double().mean(0).numpy(),
        n_series=len(data),
        made={"target": target, "data": data.name, "split": data.split},
    )


def _softmax(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1)
