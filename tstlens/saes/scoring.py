"""How good a dictionary is: what it reconstructs, how sparsely, and what the model loses by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor, nn

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.saes.checks import check_at_least, check_data
from tstlens.saes.controls import neuron_dictionary, random_dictionary
from tstlens.saes.harvest import ActivationRows, Heads
from tstlens.saes.scores import DictionaryScore, Scores


@checked
def score(
    model: HookedTST,
    sae: SAE[Any],
    data: TimeSeriesData,
    *,
    target: Tensor | None = None,
    controls: bool = True,
    seed: int = 0,
    batch_size: int = 256,
) -> Scores:
    """Score a dictionary on data, beside a random dictionary of its size and the neurons.

    It answers: does the dictionary keep what the model needs, with how few latents, and would any
    dictionary? Where zero and mean ablation hardly hurt the task, a good measure of the spliced
    model says little, which is why all of them are shown raw and no "loss recovered" is formed.
    Score on data that the dictionary was not trained on.

    Args:
        model: the model.
        sae: an SAE, transcoder or codebook with its hook point in ``cfg.metadata``.
        data: series, with labels for a classifier; padded positions are left out.
        target: true values [batch, channel, horizon] for a forecaster.
        controls: False leaves the random dictionaries and the neurons out; transcoders have none.
        seed: of the random dictionaries.
        batch_size: series per forward pass.

    Returns:
        Scores; ``to_dataframe()`` has one row per dictionary.

    Raises:
        ArgumentError: a dictionary without a hook name, or neither labels nor target.
        LabelError, SeriesShapeError: labels or target that do not fit the model.

    Example:
        >>> from tstlens import HookedTST, load_dataset, saes
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> data = load_dataset("JapaneseVowels", split="test")
        >>> sae = saes.load("japanese-vowels", "blocks.0.hook_mlp_out")
        >>> list(saes.score(model, sae, data).to_dataframe()["dictionary"])
        ['trained', 'random, topk', 'random, pursuit', 'neurons']
    """
    check_data(data)
    check_at_least(1, batch_size=batch_size)
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    hook = getattr(metadata, "hook_name", None)
    if not hook:
        raise ArgumentError(
            "the dictionary does not say its hook point: set cfg.metadata.hook_name"
        )
    if data.labels is None and target is None:
        raise ArgumentError("expected data with labels, or target= for a forecaster, got neither")
    out = getattr(metadata, "hook_name_out", None) or hook
    head = _heads_of(model, sae, hook)
    was_training = sae.training
    sae.eval()
    try:
        with torch.no_grad():
            hooks = [hook] if out == hook else [hook, out]
            rows = ActivationRows(model, data, hooks, head=head)
            read, written = _activations(rows, hook, out, batch_size)
            mean = written.mean(0)
            trained = _measure("trained", sae, read, written)
            dictionaries: list[tuple[str, SAE[Any]]] = []
            if controls and out == hook:
                k = max(1, round(trained.l0))
                dictionaries = [
                    ("random, topk", random_dictionary(sae, read, k, seed=seed)),
                    (
                        "random, pursuit",
                        random_dictionary(sae, read, k, seed=seed, encoder="pursuit"),
                    ),
                    ("neurons", neuron_dictionary(sae, read, k)),
                ]
            measured = [trained] + [_measure(n, made, read, written) for n, made in dictionaries]
            scored = []
            for found, made in zip(measured, [sae, *(d for _, d in dictionaries)], strict=True):
                with model.saes([made], use_error_term=False):
                    task = task_measures(model, data, target, batch_size)
                scored.append(replace(found, task=task))
            tasks = {"original": task_measures(model, data, target, batch_size)}
            one_head = head if isinstance(head, int) else None
            for kind, value in (("zero", torch.zeros_like(mean)), ("mean", mean)):
                with model.saes():  # puts back at its end what was spliced in before
                    model.splice(_Constant(value), out, head=one_head)
                    tasks[kind] = task_measures(model, data, target, batch_size)
    finally:
        sae.train(was_training)
    named = getattr(sae.cfg, "architecture", None)
    return Scores(
        rows=tuple(scored),
        task=tasks,
        hook=hook,
        n_activations=len(read),
        data=" ".join(part for part in (data.name, data.split) if part),
        made={
            "model": model.cfg.model_name,
            "architecture": named() if callable(named) else type(sae).__name__,
            "controls_seed": seed,
            "n_series": len(data),
        },
    )


class _Constant(nn.Module):
    """Replaces an activation by one vector."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", value)

    def encode(self, x: Tensor) -> Tensor:
        """The activation itself."""
        return x

    def decode(self, x: Tensor) -> Tensor:
        """The vector at every position; joined heads are taken apart again."""
        apart = x.ndim == 4 and self.value.numel() != x.shape[-1]
        return (self.value.view(x.shape[-2:]) if apart else self.value).expand_as(x)


def _heads_of(model: HookedTST, sae: Any, hook: str) -> Heads:
    chosen = getattr(sae.cfg.metadata, "hook_head_index", None)
    if chosen is not None:
        return int(chosen)
    per_head = hook.rsplit(".", 1)[-1] in ("hook_q", "hook_k", "hook_v", "hook_z")
    return "each" if per_head and sae.cfg.d_in == model.cfg.d_head else "joined"


def _activations(
    rows: ActivationRows, hook: str, out: str, batch_size: int
) -> tuple[Tensor, Tensor]:
    parts = [rows(index)[0] for index in torch.arange(len(rows)).split(batch_size)]
    read = torch.cat([part[hook] for part in parts])
    return read, read if out == hook else torch.cat([part[out] for part in parts])


def _measure(name: str, sae: Any, read: Tensor, written: Tensor) -> DictionaryScore:
    squared, active, counts = 0.0, 0, None
    joins = getattr(sae, "hook_z_reshaping_mode", False)
    for given, true in zip(read.split(4096), written.split(4096), strict=True):
        latents = sae.encode(given.unsqueeze(1) if joins else given)
        latents = latents.to_dense() if latents.is_sparse else latents
        found = sae.decode(latents).reshape(len(given), -1)
        skip = getattr(sae, "W_skip", None)
        found = found if skip is None else found + given @ skip.T
        squared += float((true - found).double().pow(2).sum())
        on = latents.reshape(len(given), -1) != 0
        active += int(on.sum())
        counts = on.sum(0) if counts is None else counts + on.sum(0)
    if counts is None:
        raise ArgumentError("the data have no observed position to score")
    spread = float((written - written.mean(0)).double().pow(2).sum())
    return DictionaryScore(
        name,
        len(counts),
        1 - squared / spread if spread else float("nan"),
        squared / written.numel(),
        active / len(read),
        (counts.double() / len(read)).cpu().numpy(),
        task={},
    )


@torch.no_grad()
def task_measures(
    model: HookedTST, data: TimeSeriesData, target: Tensor | None, batch_size: int
) -> dict[str, float]:
    """Accuracy and cross-entropy (nats) of a classifier, mse of a forecaster, as the model is."""
    data = data.for_model(model) if target is None else data
    outputs = []
    for index in torch.arange(len(data)).split(batch_size):
        mask = None if data.mask is None else data.mask[index].to(model.cfg.device)
        outputs.append(model(data.series[index].to(model.cfg.device), mask=mask))
    output = torch.cat(outputs)
    if target is not None:
        return {"mse": float(model.loss(output, target.to(output)))}
    labels = data.labels
    if labels is None:
        raise ArgumentError("expected data with labels, got none")
    loss = model.loss(output, labels.to(output.device))
    right = output.argmax(-1) == labels.to(output.device)
    return {"accuracy": float(right.double().mean()), "cross_entropy": float(loss)}
