"""sae-lens' trainer, set up for small models and run: scale, steps, checkpoints, inference SAE."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.errors import ArgumentError
from tstlens.saes.training_folder import TrainingFolder
from tstlens.training.diverging import all_finite

SCALE_BATCHES = 16  # for the mean norm and the mean: 16,384 activations at the default size


def make_trainer(
    cfg: TrainingSAEConfig, stream: Any, steps: int, batch_size: int, lr: float
) -> SAETrainer[Any, Any]:
    """sae-lens' trainer on a stream of activations."""
    sae: TrainingSAE[Any] = get_sae_training_class(cfg.architecture())[0](cfg)
    trainer_cfg = SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=steps // 5,
        device=cfg.device,
        # A latent that is silent for a twentieth of the training gets the auxiliary loss.
        dead_feature_window=max(50, steps // 20),
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=SCALE_BATCHES,
    )
    return SAETrainer(cfg=trainer_cfg, sae=sae, data_provider=stream)


@torch.no_grad()
def prepare(trainer: SAETrainer[Any, Any], stream: Any) -> None:
    """Estimate the input's scale as sae-lens does, and start the decoder's bias at the mean."""
    sae, scaler = trainer.sae, trainer.activation_scaler
    batches = [next(stream) for _ in range(SCALE_BATCHES)]
    if sae.cfg.normalize_activations == "expected_average_only_in":
        norms = torch.cat([batch[:, : sae.cfg.d_in].norm(dim=1) for batch in batches])
        if not bool(norms.any()):
            raise ArgumentError("all activations are zero, so there is nothing to train on")
        scaler.scaling_factor = float(sae.cfg.d_in**0.5 / norms.float().mean())
    elif sae.cfg.normalize_activations == "covariance_whitening":
        scaler.estimate_whitening(sae.cfg.d_in, iter(batches), len(batches))
        return
    elif sae.cfg.normalize_activations != "none":
        return
    mean = torch.cat(batches).mean(0)[-sae.b_dec.shape[0] :]
    sae.b_dec.copy_(mean * (scaler.scaling_factor or 1.0))


def run(
    trainer: SAETrainer[Any, Any],
    stream: Any,
    steps: int,
    folder: TrainingFolder | None,
    every: int,
    progress: bool,
) -> None:
    """The loop of ``SAETrainer.fit`` on its public steps, with whole checkpoints and one bar."""
    done = trainer.n_training_steps
    with tqdm(
        total=steps, initial=done, desc="training the SAE", unit="step", disable=not progress
    ) as bar:
        while trainer.n_training_steps < steps:
            trainer.maybe_reset_sparsity()
            output = trainer.step(next(stream))
            trainer.n_training_steps += 1
            bar.update()
            if trainer.n_training_steps % 100 == 0:
                bar.set_postfix(loss=f"{output.losses['mse_loss'].item():.3f}", refresh=False)
            due = folder is not None and trainer.n_training_steps % every == 0
            if due or trainer.n_training_steps % 100 == 0 or trainer.n_training_steps == steps:
                _check_finite(trainer, output.loss, kept=folder is not None)
            if folder is not None and due:
                folder.save(trainer, stream, SCALE_BATCHES + trainer.n_training_steps)
    sae, scaler = trainer.sae, trainer.activation_scaler
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        whitening, scaler.whitening = scaler.whitening, None
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    trainer.set_final_sae_metadata()


def _check_finite(trainer: SAETrainer[Any, Any], loss: Tensor, kept: bool) -> None:
    if bool(loss.isfinite()) and all_finite(trainer.sae):
        return
    last = "; the checkpoint holds the last finite weights that were saved" if kept else ""
    raise ArgumentError(
        f"lr: the SAE is no longer finite at step {trainer.n_training_steps} (loss {loss.item()}); "
        f"try a lower lr than {trainer.cfg.lr:g}, or scaled activations (normalize=){last}"
    )


def inference_sae(trainer: SAETrainer[Any, Any]) -> SAE[Any]:
    """The trained SAE as sae-lens loads it for use."""
    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=trainer.cfg.device).eval()
