"""How good a dictionary is: what it reconstructs, how sparsely, and what the model loses by it.

A dictionary's scores beside its controls, as plain data.

Dictionaries to stand beside a trained one: random directions, and the neurons themselves.

A sparse code of enough latents reconstructs a lot whatever its directions are, so a trained
dictionary's numbers mean little alone. These controls have as many active latents as it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor, nn

from tstlens.arguments import Count, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.randomness import seeded
from tstlens.results import Result
from tstlens.run import Heads, Runs
from tstlens.saes.checks import check_data
from tstlens.saes.stream import ActivationRows

if TYPE_CHECKING:
    import pandas as pd


Activations = Float[Tensor, "row width"]


def random_directions(n: int, width: int, seed: int) -> Float[Tensor, "row width"]:
    """Unit vectors uniform on the sphere.

    The seed is moved away from the small numbers that users seed everything with: the same draws
    as a planted dictionary's would be no control at all.
    """
    generator = torch.Generator().manual_seed(seed + 7_777_777)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)


@checked
@seeded(0)
def random_dictionary(
    sae: SAE[Any],
    activations: Activations,
    k: Count,
    *,
    seed: Seed = 0,
    encoder: str = "topk",
) -> SAE[Any]:
    """A dictionary of the same size whose directions are random, centred and scaled on the data.

    Args:
        sae: the dictionary to stand beside; its size, place and metadata are taken.
        activations: [row, width], for the mean and the scale.
        k: active latents.
        seed: of the directions.
        encoder: ``"topk"`` reads along the directions, as a trained SAE does; ``"pursuit"`` picks
            the latents one by one against what is left, the better code for given directions.

    Returns:
        An ``sae_lens.SAE``; decoder rows are uniform on the sphere.
    """
    d_in, d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
    if activations.ndim != 2 or activations.shape[1] != d_in or not len(activations):
        raise ArgumentError(
            f"expected activations [row, width={d_in}], got {list(activations.shape)}"
        )
    directions = random_directions(d_sae, d_in, seed).to(activations)
    if encoder == "pursuit":
        cfg: Any = MatchingPursuitSAEConfig(
            **_shared(sae, d_in, d_sae),
            residual_threshold=0.0,
            max_iterations=k,
            stop_on_duplicate_support=False,
        )
        made: SAE[Any] = MatchingPursuitSAE(cfg)
        with torch.no_grad():
            made.W_dec.copy_(directions)
            made.b_dec.copy_(activations.mean(0))
        return made.eval()
    if encoder != "topk":
        raise ArgumentError(f"encoder must be 'topk' or 'pursuit', got {encoder!r}")
    return _topk(sae, directions, activations, k)


@checked
def neuron_dictionary(sae: SAE[Any], activations: Activations, k: Count) -> SAE[Any]:
    """The neurons as a dictionary: the k entries that are furthest from their mean, both signs.

    Args:
        sae: the dictionary to stand beside.
        activations: [row, width], for the mean.
        k: entries that are kept.

    Returns:
        An ``sae_lens.SAE`` with 2 * d_in latents: every neuron up, then every neuron down.
    """
    eye = torch.eye(int(sae.cfg.d_in)).to(activations)
    return _topk(sae, torch.cat([eye, -eye]), activations, k)


@torch.no_grad()
@seeded(0)
def _topk(sae: SAE[Any], directions: Tensor, activations: Activations, k: int) -> SAE[Any]:
    d_sae, d_in = directions.shape
    cfg = TopKSAEConfig(**_shared(sae, d_in, d_sae), k=min(k, d_sae))
    made = TopKSAE(cfg)
    made.W_dec.copy_(directions)
    made.W_enc.copy_(directions.T)
    made.b_enc.zero_()
    made.b_dec.copy_(activations.mean(0))
    # Overlapping directions overshoot: the one number that scales the decoder best, by least
    # squares, is given to the control.
    as_rows = activations if not made.hook_z_reshaping_mode else activations.unsqueeze(1)
    parts = made.encode(as_rows).reshape(-1, d_sae) @ made.W_dec
    centred = activations - made.b_dec
    size = parts.pow(2).sum()
    made.W_dec.mul_((parts * centred).sum() / size if size > 0 else 1.0)
    return made.eval()


def _shared(sae: SAE[Any], d_in: int, d_sae: int) -> dict[str, Any]:
    metadata = sae.cfg.metadata
    place = {
        name: metadata[name]
        for name in ("model_name", "hook_name", "hook_name_out", "hook_head_index")
        if metadata[name] is not None
    }
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": sae.cfg.dtype,
        "device": str(sae.W_dec.device),
        "reshape_activations": sae.cfg.reshape_activations,
        "metadata": SAEMetadata(**place),
    }


@dataclass(frozen=True)
class DictionaryScore:
    """One dictionary's numbers.

    Args:
        name: "trained", "random, topk", "random, pursuit" or "neurons".
        n_latents: size of the dictionary.
        explained_variance: 1 - squared error / squared distance from the mean; 1 is perfect, 0 is
            the mean, below 0 is worse than the mean.
        mse: mean squared error per entry, in the activation's units; sae-lens' own is the sum over
            entries, d_in times as large.
        l0: active latents per activation, mean.
        density: [latent], share of activations at which each latent is active.
        task: the task's measures with the dictionary spliced in, without error term.
        l1: sum of the latents' sizes per activation, mean.
        cosine: of reconstruction and activation, mean; 0 where one of them is zero.
        l2_ratio: norm of the reconstruction over that of the activation, mean; below 1 it shrinks.
            An activation of a norm below 1e-4 counts as one of norm 1.
        relative_reconstruction_bias: mean squared norm of the reconstruction over its mean product
            with the activation; 1 is unbiased, below 1 is shrinkage.
        encoder_norm: [latent], norm of the encoder's column; None without such an encoder.
        encoder_decoder_cosine: [latent], of the encoder's column and the decoder's row, 0 where one
            of them is zero; None where they are of different width, or without such an encoder.

    Source: the evaluations of sae-lens (``sae_lens.evals``), whose definitions these are; the bias
        is equation 10 of Rajamanoharan et al. 2024 (arXiv 2404.16014).
    """

    name: str
    n_latents: int
    explained_variance: float
    mse: float
    l0: float
    density: Float[np.ndarray, " latent"]
    task: dict[str, float]
    l1: float = float("nan")
    cosine: float = float("nan")
    l2_ratio: float = float("nan")
    relative_reconstruction_bias: float = float("nan")
    encoder_norm: Float[np.ndarray, " latent"] | None = None
    encoder_decoder_cosine: Float[np.ndarray, " latent"] | None = None

    @property
    def n_dead(self) -> int:
        """Latents that are active nowhere in these data."""
        return int((self.density == 0).sum())


@dataclass(frozen=True)
class Scores(Result):
    """A dictionary's scores beside its controls, all raw.

    Args:
        rows: the trained dictionary first, then the controls.
        task: the task's measures of the model as it is ("original"), with the activation replaced
            by zeros ("zero") and by its mean over these data ("mean"). Of a classifier these are
            accuracy, cross-entropy and the KL divergence of the output from the original one
            (nats, mean over series), of a forecaster the mean squared error.
        hook: the hook point that is read.
        n_activations: activations scored; padding is left out.
        data: name and split.
        made: model, architecture, seed of the controls.
    """

    rows: tuple[DictionaryScore, ...]
    task: dict[str, dict[str, float]]
    hook: str
    n_activations: int
    data: str
    made: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        each = "; ".join(
            f"{row.name}: explained variance {row.explained_variance:.3f}, l0 {row.l0:.1f}"
            for row in self.rows
        )
        return f"Scores({self.hook}, {self.n_activations} activations of {self.data}; {each})"

    @property
    def trained(self) -> DictionaryScore:
        """The dictionary that was scored."""
        return self.rows[0]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per dictionary; measures of the task spliced, original, zero and mean ablated."""
        import pandas as pd

        table = []
        for row in self.rows:
            entry: dict[str, Any] = {
                "dictionary": row.name,
                "latents": row.n_latents,
                "explained_variance": row.explained_variance,
                "mse": row.mse,
                "l0": row.l0,
                "l1": row.l1,
                "cosine": row.cosine,
                "l2_ratio": row.l2_ratio,
                "relative_reconstruction_bias": row.relative_reconstruction_bias,
                "dead": row.n_dead,
            }
            for measure, value in row.task.items():
                entry[measure] = value
                for kind, found in self.task.items():
                    entry[f"{measure}_{kind}"] = found[measure]
            table.append(entry)
        return pd.DataFrame(table)

    def latents_dataframe(self) -> pd.DataFrame:
        """One row per dictionary and latent: its density, encoder norm and encoder-decoder cosine.

        The last two are NaN where the dictionary has no such encoder.
        """
        import pandas as pd

        blank = float("nan")
        return pd.concat(
            pd.DataFrame(
                {
                    "dictionary": row.name,
                    "latent": np.arange(row.n_latents),
                    "density": row.density,
                    "encoder_norm": blank if row.encoder_norm is None else row.encoder_norm,
                    "encoder_decoder_cosine": (
                        blank if row.encoder_decoder_cosine is None else row.encoder_decoder_cosine
                    ),
                }
            )
            for row in self.rows
        ).reset_index(drop=True)

    @checked
    def density_histogram(self, bins: Count = 24) -> pd.DataFrame:
        """Latents by log10 of their density, one row per dictionary and bin; dead ones left out."""
        import pandas as pd

        lowest = np.log10(1 / self.n_activations)
        edges = np.linspace(lowest, 0, bins + 1)
        table = []
        for row in self.rows:
            alive = np.log10(row.density[row.density > 0])
            counts, _ = np.histogram(alive.clip(lowest, 0), edges)
            table += [
                {"dictionary": row.name, "log10_density": left, "latents": int(count)}
                for left, count in zip(edges[:-1], counts, strict=True)
            ]
        return pd.DataFrame(table)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON values; densities are left out."""
        return {
            "hook": self.hook,
            "data": self.data,
            "n_activations": self.n_activations,
            "task": self.task,
            "dictionaries": self.to_dataframe().to_dict(orient="records"),
            "made": self.made,
        }


@checked
def score(
    model: HookedTST,
    sae: SAE[Any],
    data: TimeSeriesData,
    *,
    target: Tensor | None = None,
    controls: bool = True,
    seed: Seed = 0,
    batch_size: Count = 256,
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
            original = Runs(model, data, batch_size=batch_size).outputs()
            scored = []
            for found, made in zip(measured, [sae, *(d for _, d in dictionaries)], strict=True):
                with model.saes([made], use_error_term=False):
                    task = task_measures(model, data, target, batch_size, original)
                scored.append(replace(found, task=task))
            tasks = {"original": task_measures(model, data, target, batch_size, original)}
            one_head = head if isinstance(head, int) else None
            for kind, value in (("zero", torch.zeros_like(mean)), ("mean", mean)):
                with model.saes():  # puts back at its end what was spliced in before
                    model.splice(_Constant(value), out, head=one_head)
                    tasks[kind] = task_measures(model, data, target, batch_size, original)
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
    sums: dict[str, float] = {}
    counts = torch.zeros(0)
    joins = getattr(sae, "hook_z_reshaping_mode", False)
    for given, true in zip(read.split(4096), written.split(4096), strict=True):
        latents = sae.encode(given.unsqueeze(1) if joins else given)
        latents = latents.to_dense() if latents.is_sparse else latents
        found = sae.decode(latents).reshape(len(given), -1)
        skip = getattr(sae, "W_skip", None)
        found = found if skip is None else found + given @ skip.T
        latents = latents.reshape(len(given), -1)
        x, y = true.double(), found.double()
        norm = x.norm(dim=1)
        for measure, part in {
            "squared": (true - found).double().pow(2),
            "active": latents != 0,
            "l1": latents.double().abs(),
            "cosine": nn.functional.cosine_similarity(x, y, eps=1e-12),
            "l2_ratio": y.norm(dim=1) / torch.where(norm < 1e-4, 1.0, norm),
            "size": y.pow(2),
            "product": x * y,
        }.items():
            sums[measure] = sums.get(measure, 0.0) + float(part.sum())
        on = (latents != 0).sum(0)
        counts = counts + on if len(counts) else on
    if not sums:
        raise ArgumentError("the data have no observed position to score")
    spread = float((written - written.mean(0)).double().pow(2).sum())
    encoder_norm, encoder_decoder_cosine = _encoder(sae, len(counts))
    return DictionaryScore(
        name,
        len(counts),
        1 - sums["squared"] / spread if spread else float("nan"),
        sums["squared"] / written.numel(),
        sums["active"] / len(read),
        (counts.double() / len(read)).cpu().numpy(),
        task={},
        l1=sums["l1"] / len(read),
        cosine=sums["cosine"] / len(read),
        l2_ratio=sums["l2_ratio"] / len(read),
        relative_reconstruction_bias=(
            sums["size"] / sums["product"] if sums["product"] else float("nan")
        ),
        encoder_norm=encoder_norm,
        encoder_decoder_cosine=encoder_decoder_cosine,
    )


def _encoder(sae: Any, n_latents: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Norms of the encoder's columns, and their cosines with the decoder's rows."""
    encoder = getattr(sae, "W_enc", None)
    if not isinstance(encoder, Tensor) or encoder.shape[1:] != (n_latents,):
        return None, None
    columns, rows = encoder.double().T, sae.W_dec.double()
    cosine = None
    if columns.shape == rows.shape:
        cosine = nn.functional.cosine_similarity(columns, rows, eps=1e-12).cpu().numpy()
    return columns.norm(dim=1).cpu().numpy(), cosine


def task_measures(
    model: HookedTST,
    data: TimeSeriesData,
    target: Tensor | None,
    batch_size: int,
    original: Tensor | None = None,
) -> dict[str, float]:
    """What a classifier or forecaster is worth as it is.

    Args:
        model: the model.
        data: series, with labels for a classifier.
        target: true values of a forecaster.
        batch_size: series per forward pass.
        original: output to take a classifier's KL divergence from.

    Returns:
        Accuracy, cross-entropy and KL divergence (nats) of a classifier; mse of a forecaster.
    """
    data = data.for_model(model) if target is None else data
    output = Runs(model, data, batch_size=batch_size).outputs()
    if target is not None:
        return {"mse": float(model.loss(output, target.to(output)))}
    labels = data.labels
    if labels is None:
        raise ArgumentError("expected data with labels, got none")
    loss = model.loss(output, labels.to(output.device))
    right = output.argmax(-1) == labels.to(output.device)
    measured = {"accuracy": float(right.double().mean()), "cross_entropy": float(loss)}
    if original is not None:
        was, now = (one.double().log_softmax(-1) for one in (original, output))
        measured["kl_divergence"] = float((was.exp() * (was - now)).sum(-1).mean())
    return measured
