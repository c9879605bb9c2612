"""Training SAEs on a time-series model's activations: a thin layer over sae-lens' ``SAETrainer``.

``train`` streams activations from a model; ``fit`` takes any activations. Both give an ordinary
sae-lens SAE, which saves, loads and splices like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAEConfig
from torch import Tensor

import tstlens
from tstlens import storage
from tstlens.arguments import checked, needs_gradients
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.randomness import seeded
from tstlens.saes.checks import check_at_least, check_positive
from tstlens.saes.configs import training_config
from tstlens.saes.harvest import Heads
from tstlens.saes.shards import fingerprint
from tstlens.saes.stream import ActivationStream
from tstlens.saes.tensor_stream import TensorStream
from tstlens.saes.training_folder import TrainingFolder
from tstlens.saes.training_run import inference_sae, make_trainer, prepare, run
from tstlens.shapes import Mask, Series


@checked
@needs_gradients
@torch.enable_grad()
def train(
    model: HookedTST,
    data: TimeSeriesData | Series,
    hook: str,
    sae: str | TrainingSAEConfig = "topk",
    *,
    hook_out: str | None = None,
    mask: Mask | None = None,
    d_sae: int | None = None,
    k: int | None = None,
    steps: int = 5000,
    batch_size: int = 1024,
    lr: float = 1e-3,
    seed: int = 0,
    normalize: str = "expected_average_only_in",
    head: Heads = "joined",
    memory_mb: float = 512.0,
    cache: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
    **options: Any,
) -> SAE[Any]:
    """Train a sparse autoencoder on a model's activations at a hook point.

    It answers: which directions, few at a time, make up what the model writes here? A low error
    does not make latents meaningful: look at :func:`score` beside a random dictionary, and train
    two seeds before believing a latent.

    Args:
        model: stays as it is.
        data: the series to take activations from; padded positions are left out.
        hook: hook name; ``attn.hook_z`` is read with its heads joined unless ``head`` says else.
        sae: an architecture of sae-lens by name (see :func:`architectures`) or its training config.
        hook_out: for transcoders, the hook point to write.
        mask: bool [batch, time], where ``data`` is a bare tensor.
        d_sae: latents; 4 times the width by default.
        k: active latents per activation where the architecture fixes it; 8 by default.
        steps: training steps.
        batch_size: activations per step.
        lr: peak learning rate of Adam; falls linearly to zero over the last fifth of the steps.
        seed: of the weights and the order of activations.
        normalize: sae-lens' ``normalize_activations``; folded into the weights at the end, so that
            the SAE takes activations as they are.
        head: ``"joined"``, ``"each"`` head as a row of its own, or one head's number.
        memory_mb: MiB of activations held at a time.
        cache: folder for activations that do not fit in memory.
        checkpoint: folder to keep progress in; a training found there goes on, a finished one is
            loaded, one on other activations or with other settings is refused.
        checkpoint_every: steps between checkpoints.
        progress: show a bar.
        **options: further fields of the architecture's config, such as ``l1_coefficient=2.0``.

    Returns:
        An ``sae_lens.SAE`` in eval mode with model, hook, data and seed in ``cfg.metadata``.
        ``save_model(folder)`` writes what ``sae_lens.SAE.load_from_disk(folder)`` reads.

    Raises:
        UnknownHookError, HookError: a hook point that does not exist or cannot fire.
        UnknownNameError: no such architecture.
        ArgumentError: sizes or options that are not possible.
        StorageError, CorruptFileError: a checkpoint or cache of something else, or damaged.

    Source: sae-lens (Bloom et al.), whose trainer does the work.

    Example:
        >>> from tstlens import HookedTST, load_dataset, saes
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> data = load_dataset("JapaneseVowels", split="train")
        >>> sae = saes.train(model, data, hook="blocks.0.hook_mlp_out", d_sae=64, k=4, steps=10,
        ...                  progress=False)
        >>> sae.cfg.architecture(), sae.cfg.metadata.hook_name
        ('topk', 'blocks.0.hook_mlp_out')
    """
    check_at_least(0, seed=seed)
    _check_told(options)
    if checkpoint is not None:
        storage.check_folder(Path(checkpoint), "a run's progress", replaced=False)
    hooks = [hook] if hook_out is None else [hook, hook_out]
    stream: Any = ActivationStream(
        model,
        data,
        hook if hook_out is None else hooks,
        mask,
        batch_size=batch_size,
        seed=seed,
        head=head,
        memory_mb=memory_mb,
        cache=cache,
        progress=progress,
    )
    probe, _ = stream.rows(torch.arange(1))
    widths = [probe[name].shape[1] for name in hooks]
    metadata = {
        "model_name": model.cfg.model_name,
        "hook_name": hook,
        "hook_name_out": hook_out,
        "hook_head_index": head if isinstance(head, int) else None,
        "dataset_path": data.name if isinstance(data, TimeSeriesData) else "",
        "dataset_split": data.split if isinstance(data, TimeSeriesData) else "",
        "n_series": len(stream.rows),
        "tstlens_version": tstlens.__version__,
    }
    named = isinstance(sae, str) and hook_out is None
    if named and hook.endswith("hook_z") and head == "joined":
        options.setdefault("reshape_activations", "hook_z")
    source = None if checkpoint is None else fingerprint(stream.rows, seed)
    if hook_out is not None:
        from tstlens.saes.transcoder import PairedStream

        stream = PairedStream(stream, hook, hook_out)
    return fit(
        stream,
        sae,
        d_in=widths[0],
        d_out=None if hook_out is None else widths[1],
        d_sae=d_sae,
        k=k,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        normalize=normalize,
        metadata={name: value for name, value in metadata.items() if value is not None},
        source=source,
        device=str(model.cfg.device),
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        **options,
    )


# What ``train`` tells ``fit`` by itself, and where it takes it from.
_TOLD = {
    "d_in": "the width of the activations at hook=",
    "d_out": "the width of the activations at hook_out=",
    "device": "the model's: model.to(device)",
    "metadata": "the model's, the hook's and the data's names",
    "source": "the model and the data",
}


def _check_told(options: dict[str, Any]) -> None:
    for name, place in _TOLD.items():
        if name in options:
            raise ArgumentError(
                f"{name} is {place}, which saes.train reads off by itself; leave {name}= out"
            )


@checked
@needs_gradients
@torch.enable_grad()
def fit(
    activations: Tensor | Iterator[Tensor],
    sae: str | TrainingSAEConfig = "topk",
    *,
    d_in: int | None = None,
    d_out: int | None = None,
    d_sae: int | None = None,
    k: int | None = None,
    steps: int = 5000,
    batch_size: int = 1024,
    lr: float = 1e-3,
    seed: int = 0,
    normalize: str = "expected_average_only_in",
    metadata: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
    **options: Any,
) -> SAE[Any]:
    """Train an SAE on activations from anywhere: a tensor [row, width] or an endless iterator.

    Args:
        activations: the rows; a tensor is shuffled anew in every epoch.
        sae: architecture or training config, as for :func:`train`.
        d_in: width of an iterator's batches; a tensor says itself.
        d_out: width that a transcoder writes.
        d_sae, k, steps, batch_size, lr, seed, normalize: as for :func:`train`.
        metadata: goes into ``cfg.metadata``.
        source: what else a checkpoint has to match to be gone on with, as JSON values: where the
            activations come from.
        device: where to train.
        checkpoint, checkpoint_every, progress, **options: as for :func:`train`.

    Returns:
        An ``sae_lens.SAE`` in eval mode.
    """
    check_at_least(1, steps=steps, batch_size=batch_size, checkpoint_every=checkpoint_every)
    check_at_least(0, seed=seed)
    check_positive(lr=lr)
    if isinstance(activations, Tensor):
        stream: Any = TensorStream(activations, batch_size, seed)
        d_in = activations.shape[1]
    else:
        stream = activations
    if d_in is None:
        raise ArgumentError("an iterator does not tell its width; give d_in=")
    cfg = training_config(
        sae,
        d_in,
        d_out=d_out,
        d_sae=d_sae,
        k=k,
        steps=steps,
        normalize=normalize,
        device=device,
        options=options,
    )
    cfg.metadata = SAEMetadata(
        **{**cfg.metadata.to_dict(), **(metadata or {}), "seed": seed, "training_steps": steps}
    )
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    settings |= {"config": {**cfg.to_dict(), "device": None, "metadata": None}}
    settings |= {"source": source or {}}
    with storage.claimed(None if checkpoint is None else Path(checkpoint)):
        folder = None
        if checkpoint is not None:
            seen: Any = activations
            if not isinstance(seen, Tensor) and not source:  # all that can be known of it
                seen = next(stream)
                stream = itertools.chain([seen], stream)
            made = {"activations": seen if isinstance(seen, Tensor) else source}
            folder = TrainingFolder(checkpoint, settings, storage.fingerprint(**made))
            if (done := folder.finished()) is not None:
                return done.to(device).eval()
        with seeded(seed):
            trainer = make_trainer(cfg, stream, steps, batch_size, lr)
            if folder is None or not folder.resume(trainer, stream):
                prepare(trainer, stream)
            run(trainer, stream, steps, folder, checkpoint_every, progress)
            trained = inference_sae(trainer)
        if folder is not None:
            folder.finish(trained)
        return trained
