"""Training SAEs on a time-series model's activations: a thin layer over sae-lens' ``SAETrainer``.

``train`` streams activations from a model; ``fit`` takes any activations. Both give an ordinary
sae-lens SAE, which saves, loads and splices like any other.

Published dictionaries of time-series models sit at 0.5 to 4 times the width; 16 times and more
mostly dies. So the default is 4 times the width, k = 8 active latents, and input scaled to a norm
of sqrt(width), on which the coefficients below were chosen.

A training's folder holds the last checkpoint, whole or not there at all, and the result. A
checkpoint is what sae-lens writes (weights, optimiser, schedules, input scale) and how far the
stream has got; ``latest.json`` names it and holds the SHA-256 of its files.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

import tstlens
from tstlens import storage
from tstlens.arguments import (
    Count,
    Positive,
    Seed,
    check_fields,
    checked,
    configured,
    needs_gradients,
)
from tstlens.data import TimeSeriesData
from tstlens.data.validate import check_dtype_name, usable_device
from tstlens.errors import ArgumentError, CorruptFileError, StorageError, UnknownNameError
from tstlens.model import HookedTST
from tstlens.randomness import seeded
from tstlens.results import TableResult
from tstlens.run import Heads
from tstlens.saes.stream import ActivationStream, TensorStream, fingerprint
from tstlens.shapes import Mask, Series
from tstlens.training.loop import all_finite

_BY_K = {"topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"}
SCALE_BATCHES = 16  # for the mean norm and the mean: 16,384 activations at the default size
# What of sae-lens' trainer is told by other arguments.
_OWN = {"total_training_samples", "train_batch_size_samples", "lr", "device"}
_OWN |= {"checkpoint_path", "save_final_checkpoint", "n_batches_for_norm_estimate"}
_OF_TRAINER = {one.name for one in fields(SAETrainerConfig)} - _OWN


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained; every field is an argument of :func:`train` and :func:`fit` too.

    Args:
        d_sae: latents; 4 times the width by default.
        k: active latents per activation where the architecture fixes it; 8 by default.
        steps: training steps.
        batch_size: activations per step.
        lr: peak learning rate of Adam; falls linearly to a tenth over the last fifth of the steps.
        seed: of the weights and the order of activations.
        normalize: how activations are scaled, sae-lens' ``normalize_activations``; folded into the
            weights at the end, so that the SAE takes activations as they are.
        checkpoint: folder to keep progress in; a training found there goes on, a finished one is
            loaded, one on other activations or with other settings is refused.
        checkpoint_every: steps between checkpoints.
        progress: show a bar.
        trainer: sae-lens' own config of its trainer, taken as it is; says steps, batch size and lr.
        options: further fields of the architecture's config, such as ``l1_coefficient``, and of
            sae-lens' trainer: ``adam_beta1``, ``adam_beta2``, ``lr_scheduler_name``, ``lr_end``,
            ``lr_warm_up_steps``, ``lr_decay_steps``, ``n_restart_cycles``,
            ``dead_feature_window``, ``feature_sampling_window``, ``autocast``, ``logger``, and
            ``n_checkpoints`` (sae-lens' checkpoints, kept in ``checkpoint``).

    Raises:
        ArgumentError: values that are not possible, or that ``trainer`` says otherwise.
    """

    d_sae: Count | None = None
    k: Count | None = None
    steps: Count = 5000
    batch_size: Count = 1024
    lr: Positive = 1e-3
    seed: Seed = 0
    normalize: str = "expected_average_only_in"
    checkpoint: str | Path | None = None
    checkpoint_every: Count = 1000
    progress: bool = True
    trainer: SAETrainerConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.trainer is None:
            return
        says = {
            "steps": self.trainer.total_training_steps,
            "batch_size": self.trainer.train_batch_size_samples,
            "lr": self.trainer.lr,
        }
        said = [name for name in says if getattr(self, name) != getattr(TrainConfig, name)]
        differ = [name for name in said if getattr(self, name) != says[name]]
        if differ := differ or sorted(_OF_TRAINER & set(self.options)):
            raise ArgumentError(f"trainer= says {differ[0]} itself; leave {differ[0]}= out")
        for name, value in says.items():
            object.__setattr__(self, name, value)


def architectures() -> list[str]:
    """Names of the architectures that can be trained: sae-lens' own, and transcoders."""
    import tstlens.saes.transcoder  # noqa: F401  (registers the transcoders)

    return sorted(SAE_TRAINING_CLASS_REGISTRY)


@checked
def training_config(
    sae: str | TrainingSAEConfig,
    d_in: int,
    *,
    d_out: int | None = None,
    d_sae: int | None = None,
    k: Count | None = None,
    steps: Count = 5000,
    normalize: str = "expected_average_only_in",
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
) -> TrainingSAEConfig:
    """A training configuration from an architecture's name, or a given one that is checked.

    Args:
        sae: a name of :func:`architectures`, or a config, which is taken as it is.
        d_in: width of the activations.
        d_out: width of what a transcoder writes; None for SAEs.
        d_sae: latents; 4 * d_in by default.
        k: active latents per activation, for the architectures that fix it; 8 by default.
        steps: training steps, of which the first fifth warms sparsity penalties up.
        normalize: sae-lens' ``normalize_activations``.
        device: where to train.
        dtype: of the weights.
        options: further fields of the architecture's config, such as ``l1_coefficient``.

    Raises:
        UnknownNameError: no such architecture; lists what there is.
        ArgumentError: k or an option that the architecture does not have, or a config of another
            width.
    """
    options = dict(options or {})
    if isinstance(sae, TrainingSAEConfig):
        _check_given(sae, d_in, d_sae, k, options)
        _check_writes(sae.architecture(), type(sae), d_out)
        return dataclasses.replace(sae, metadata=sae.metadata)
    if sae not in architectures():
        raise UnknownNameError(sae, architectures(), "These are the architectures of sae-lens")
    config_class = SAE_TRAINING_CLASS_REGISTRY[sae][1]
    _check_writes(sae, config_class, d_out)
    width = d_sae if d_sae is not None else 4 * d_in
    place = str(usable_device(device))
    check_dtype_name(dtype)
    if k is not None and sae not in _BY_K and not sae.startswith("topk"):
        penalty = "l0_coefficient" if sae == "jumprelu" else "l1_coefficient"
        raise ArgumentError(f"{sae!r} has no k; say how sparse it should be with {penalty}=")
    active = 8 if k is None else k
    if not 1 <= active <= width:
        raise ArgumentError(f"expected k in 1..{width} (d_sae), got {active}")
    fields = {field.name for field in dataclasses.fields(config_class)}
    chosen: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": width,
        "device": place,
        "dtype": dtype,
        "normalize_activations": normalize,
    }
    for name, value in {
        "d_out": d_out,
        "k": active,
        "max_iterations": active if sae == "matching_pursuit" else None,
        "l1_warm_up_steps": steps // 5,
        "l0_warm_up_steps": steps // 5,
        "l0_coefficient": 1.0,
        "matryoshka_widths": sorted({max(1, width // 4), max(1, width // 2), width}),
    }.items():
        if name in fields and value is not None:
            chosen[name] = value
    if sae == "matching_pursuit":
        chosen["decoder_init_norm"] = 1.0
    if normalize == "layer_norm" and "aux_loss_coefficient" in fields:
        raise ArgumentError(
            f"sae-lens cannot revive dead latents of {sae!r} under normalize='layer_norm'; use "
            "'expected_average_only_in' or 'covariance_whitening'"
        )
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ArgumentError(_no_option(sae, unknown[0], fields))
    try:
        return config_class(**{**chosen, **options})
    except ValueError as error:
        raise ArgumentError(f"sae-lens refuses this configuration: {error}") from error


_OF_TRAIN = {"hook", "hook_out", "mask", "head", "positions", "memory_mb", "cache"}
_OF_TRAIN |= {one.name for one in fields(TrainConfig)} - {"options"}
_ELSEWHERE = {
    "n_steps": "steps",
    "training_steps": "steps",
    "learning_rate": "lr",
    "n_latents": "d_sae",
    "n_features": "d_sae",
    "train_batch_size_samples": "batch_size",
}


def _no_option(sae: str, name: str, fields: set[str]) -> str:
    """What to say of an option that neither the architecture, the trainer nor ``train`` has."""
    options = sorted(fields - {"d_in", "d_out", "metadata", "device"})
    close = difflib.get_close_matches(name, sorted({*_OF_TRAIN, *_OF_TRAINER, *options}), 3)
    subject = name.split("_")[0]  # l1_ and lr_ are spelled alike, and are about different things
    close = [one for one in close if difflib.get_close_matches(subject, [one.split("_")[0]])]
    close = [_ELSEWHERE[name]] if name in _ELSEWHERE else close
    meant = f"; did you mean {close[0]!r}?" if close else ";"
    return (
        f"{sae!r} has no option {name!r}{meant} it has {', '.join(options)}, and the trainer has "
        f"{', '.join(sorted(_OF_TRAINER))}"
    )


def _check_writes(name: str, config_class: type, d_out: int | None) -> None:
    """An SAE given a second hook point would be trained on the two side by side."""
    writes = "d_out" in {field.name for field in dataclasses.fields(config_class)}
    if d_out is not None and not writes:
        raise ArgumentError(
            f"{name!r} gives back what it reads, so it takes no hook_out= (or d_out=); "
            "use 'transcoder' or 'skip_transcoder'"
        )


def _check_given(
    cfg: TrainingSAEConfig, d_in: int, d_sae: int | None, k: int | None, options: dict[str, Any]
) -> None:
    if cfg.d_in != d_in:
        raise ArgumentError(f"expected a config with d_in={d_in}, got d_in={cfg.d_in}")
    if d_sae is not None or k is not None or options:
        raise ArgumentError("the config says d_sae, k and the rest itself; leave them out")


LATEST = "latest.json"
_STREAM = "stream.pt"
_DONE = "sae"
_OVER = "delete the folder to start over"


_ROWS_KEPT = 100  # of a training's history


@dataclass(frozen=True, eq=False, repr=False)
class TrainingHistory(TableResult):
    """How the training of an SAE went.

    Args:
        rows: about a hundred steps: step, losses by name as sae-lens calls them (of batches scaled
            as in training), l0 (mean number of active latents), dead (latents silent for longer
            than the trainer's window) and, but for transcoders, explained_variance, all of the
            step's own batch.
        name: of the SAE.
    """

    rows: list[dict[str, Any]]
    name: str = "an SAE"

    def _rows(self) -> list[dict[str, Any]]:
        return self.rows

    def __repr__(self) -> str:
        return f"TrainingHistory({self.name}, {len(self.rows)} steps recorded)"


@checked
def history(sae: SAE[Any]) -> TrainingHistory:
    """How the training of an SAE went, which its metadata hold: a frame and a figure.

    Args:
        sae: from :func:`train` or :func:`fit`, also where it was saved and loaded.

    Raises:
        ArgumentError: an SAE that was not trained here, or by an older tstlens.

    Example:
        >>> import torch
        >>> sae = fit(torch.randn(256, 8), d_sae=16, k=2, steps=20, progress=False)
        >>> history(sae).to_dataframe()["step"].iloc[-1]
        np.int64(20)
    """
    rows = sae.cfg.metadata.history
    if not rows:
        raise ArgumentError(
            "this SAE's metadata hold no history: it was trained elsewhere, or by an older tstlens"
        )
    where = sae.cfg.metadata.hook_name
    name = f"{sae.cfg.architecture()} SAE" + ("" if where is None else f" at {where}")
    return TrainingHistory([dict(row) for row in rows], name)


class TrainingFolder:
    """Where a training keeps its progress.

    Args:
        folder: made if missing.
        settings: what the training depends on; a folder of other settings is refused.
        made: fingerprint of the activations; a folder of others is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], made: dict[str, str]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.made = made

    def finished(self) -> SAE[Any] | None:
        """The SAE of a training that ended, or None."""
        latest = self._latest()
        if latest is None or latest["name"] != _DONE:
            return None
        self._check(latest)
        if "fingerprint" in latest:
            storage.check_same_run(self.folder, latest["fingerprint"], self.made)
        else:
            warnings.warn(
                f"checkpoint: {self.folder} holds an SAE from an older tstlens, which did not "
                "record on which activations it was trained; where that is in doubt, give another "
                "folder",
                stacklevel=4,
            )
        with storage.reading(self.folder, "holds no SAE that sae-lens can load", _OVER):
            return SAE.load_from_disk(self.folder / _DONE)

    def resume(self, trainer: SAETrainer[Any, Any], stream: Any) -> bool:
        """Put trainer and stream where the last checkpoint was; False where there is none.

        Raises:
            CorruptFileError: a file of the checkpoint is truncated or altered, by name.
            StorageError: the checkpoint belongs to a training with other settings.
        """
        latest = self._latest()
        if latest is None:
            return False
        self._check(latest)
        storage.check_same_run(self.folder, latest.get("fingerprint"), self.made)
        path = self.folder / latest["name"]
        with storage.reading(path, "holds no whole checkpoint", _OVER):
            trainer.sae.load_weights_from_checkpoint(path)
            trainer.load_trainer_state(path)
            state = storage.read_torch(path / _STREAM, "a stream's place", _OVER)
            torch.set_rng_state(state["random"])
            trainer.sae.cfg.metadata.history = list(state.get("history", []))
            if hasattr(stream, "load_state_dict"):
                stream.load_state_dict(state["stream"])
        if not hasattr(stream, "load_state_dict"):
            for _ in range(state["batches"]):
                next(stream)
        return True

    def save(self, trainer: SAETrainer[Any, Any], stream: Any, batches: int) -> None:
        """Write a checkpoint and forget the one before."""
        name = f"step-{trainer.n_training_steps:08d}"
        position = stream.state_dict() if hasattr(stream, "state_dict") else {}
        state = {"stream": position, "batches": batches, "random": torch.get_rng_state()}
        state["history"] = trainer.sae.cfg.metadata.history

        def write(staging: Path) -> None:
            trainer.save_checkpoint(staging.name, base_path=staging.parent)
            storage.write_torch(staging / _STREAM, state)

        self._put(name, write)

    def keep(self, trainer: SAETrainer[Any, Any]) -> None:
        """Write a checkpoint of sae-lens that stays; it is never gone on with."""
        name = str(trainer.n_training_samples)
        with storage.staged(self.folder / "kept" / name, "a checkpoint", keep=False) as staging:
            trainer.save_checkpoint(staging.name, base_path=staging.parent)

    def finish(self, sae: SAE[Any]) -> None:
        """Keep the result in place of the checkpoints."""
        self._put(_DONE, sae.save_model)

    def _put(self, name: str, write: Callable[[Path], Any]) -> None:
        with storage.staged(self.folder / name, "a checkpoint", keep=False) as staging:
            write(staging)
        parts = sorted((self.folder / name).iterdir())
        record = {
            "name": name,
            "settings": self.settings,
            "fingerprint": self.made,
            "sha256": {part.name: storage.digest(part) for part in parts},
        }
        storage.write_text(self.folder / LATEST, storage.json_text(record, "settings", indent=1))
        for other in self.folder.glob("step-*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def _latest(self) -> dict[str, Any] | None:
        path = self.folder / LATEST
        if not path.exists():
            return None
        latest = storage.read_json(path, "a training's record", _OVER)
        with storage.reading(path, "is not a training's record", _OVER):
            settings = dict(latest["settings"])
            digests = dict(latest["sha256"])
            if latest["name"] != Path(latest["name"]).name or not digests:
                raise ValueError("it names no folder in here, or no files")
        if settings != self.settings:
            changed = sorted(
                key
                for key in {*settings, *self.settings}
                if settings.get(key) != self.settings.get(key)
            )
            raise StorageError(
                f"{self.folder} holds a training with other settings (different: "
                f"{', '.join(changed)}); choose another folder, or delete this one"
            )
        return latest

    def _check(self, latest: dict[str, Any]) -> None:
        for name, recorded in latest["sha256"].items():
            path = self.folder / latest["name"] / Path(name).name
            if not storage.regular(path):
                raise CorruptFileError(f"{path} is missing, truncated or altered; {_OVER}")
            storage.check_digest(path, recorded, LATEST, _OVER)


def make_trainer(
    cfg: TrainingSAEConfig, stream: Any, config: TrainConfig, options: dict[str, Any]
) -> SAETrainer[Any, Any]:
    """sae-lens' trainer on a stream of activations."""
    sae: TrainingSAE[Any] = get_sae_training_class(cfg.architecture())[0](cfg)
    if config.trainer is not None:
        given = dataclasses.replace(config.trainer, device=cfg.device)
        return SAETrainer(cfg=given, sae=sae, data_provider=stream)
    settings: dict[str, Any] = {
        "lr_end": config.lr / 10,
        "lr_decay_steps": config.steps // 5,
        # A latent that is silent for a twentieth of the training gets the auxiliary loss.
        "dead_feature_window": max(50, config.steps // 20),
        "logger": LoggingConfig(log_to_wandb=False),
        **options,
    }
    try:
        trainer_cfg = SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=config.lr,
            device=cfg.device,
            n_batches_for_norm_estimate=SCALE_BATCHES,
            **settings,
        )
        return SAETrainer(cfg=trainer_cfg, sae=sae, data_provider=stream)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"sae-lens refuses these trainer options: {error}") from error


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
    trainer: SAETrainer[Any, Any], stream: Any, folder: TrainingFolder | None, config: TrainConfig
) -> None:
    """The loop of ``SAETrainer.fit`` on its public steps, with whole checkpoints and one bar."""
    steps, logs = config.steps, trainer.cfg.logger.log_to_wandb
    thresholds = [n for n in trainer.checkpoint_thresholds if n > trainer.n_training_samples]
    log = _logging(trainer, config) if logs else None
    history, every = trainer.sae.cfg.metadata.history, max(1, steps // _ROWS_KEPT)
    with tqdm(
        total=steps,
        initial=trainer.n_training_steps,
        desc="training the SAE",
        unit="step",
        disable=not config.progress,
    ) as bar:
        while trainer.n_training_steps < steps:
            trainer.maybe_reset_sparsity()
            output = trainer.step(next(stream))
            if log is not None:
                log(output)
            trainer.n_training_steps += 1
            bar.update()
            if trainer.n_training_steps % 100 == 0:
                bar.set_postfix(loss=f"{output.losses['mse_loss'].item():.3f}", refresh=False)
            if trainer.n_training_steps % every == 0 or trainer.n_training_steps == steps:
                history.append(_row(trainer, output))
            due = folder is not None and trainer.n_training_steps % config.checkpoint_every == 0
            if due or trainer.n_training_steps % 100 == 0 or trainer.n_training_steps == steps:
                _check_finite(trainer, output.loss, kept=folder is not None)
            if folder is not None and due:
                folder.save(trainer, stream, SCALE_BATCHES + trainer.n_training_steps)
            if folder is not None and thresholds and trainer.n_training_samples > thresholds[0]:
                del thresholds[0]
                folder.keep(trainer)
    sae, scaler = trainer.sae, trainer.activation_scaler
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        whitening, scaler.whitening = scaler.whitening, None
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    trainer.set_final_sae_metadata()


@torch.no_grad()
def _row(trainer: SAETrainer[Any, Any], output: Any) -> dict[str, Any]:
    """A step in the history: its losses, how sparse its batch was and what it explained."""
    row: dict[str, Any] = {"step": trainer.n_training_steps}
    row |= {name: float(loss) for name, loss in output.losses.items()}
    if len(output.losses) > 1:
        row["loss"] = float(output.loss)
    row["l0"] = float((output.feature_acts != 0).sum(-1).float().mean())
    row["dead"] = int(trainer.dead_neurons.sum())
    if (
        trainer.sae.cfg.metadata.hook_name_out is None
        and output.sae_out.shape == output.sae_in.shape
    ):
        given = output.sae_in.flatten(1)
        left = (given - output.sae_out.flatten(1)).square().sum()
        row["explained_variance"] = float(1 - left / (given - given.mean(0)).square().sum())
    return row


def _logging(trainer: SAETrainer[Any, Any], config: TrainConfig) -> Callable[[Any], None]:
    """What sends a step's losses to Weights & Biases, as sae-lens' runner and trainer do."""
    import wandb

    logger = trainer.cfg.logger
    if wandb.run is None:
        wandb.init(
            project=logger.wandb_project,
            entity=logger.wandb_entity,
            name=logger.run_name,
            id=logger.wandb_id,
            config={"steps": config.steps, "seed": config.seed, **trainer.sae.cfg.to_dict()},
        )

    def log(output: Any) -> None:
        if (trainer.n_training_steps + 1) % logger.wandb_log_frequency == 0:
            losses = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
            wandb.log(losses, step=trainer.n_training_steps)

    return log


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


@configured(TrainConfig, rest="options")
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
    head: Heads = "joined",
    positions: int | slice | Sequence[int] | None = None,
    memory_mb: Positive = 512.0,
    cache: str | Path | None = None,
    config: TrainConfig | None = None,
    **settings: Any,
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
        head: ``"joined"``, ``"each"`` head as a row of its own, or one head's number.
        positions: positions of the trunk to train on, see :class:`ActivationStream`.
        memory_mb: MiB of activations held at a time.
        cache: folder for activations that do not fit in memory.
        config: how to train.
        **settings: fields of :class:`TrainConfig` (``d_sae=64, k=4, steps=5000`` …), of the
            architecture's config (``l1_coefficient=2.0``) and of sae-lens' trainer
            (``adam_beta1=0.0, lr_warm_up_steps=500``).

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
    config = config or TrainConfig()
    _check_told(config.options)
    if config.checkpoint is not None:
        storage.check_folder(Path(config.checkpoint), "a run's progress", replaced=False)
    hooks = [hook] if hook_out is None else [hook, hook_out]
    stream = ActivationStream(
        model,
        data,
        hook if hook_out is None else hooks,
        mask,
        batch_size=config.batch_size,
        seed=config.seed,
        head=head,
        positions=positions,
        memory_mb=memory_mb,
        cache=cache,
        progress=config.progress,
    )
    stream.side_by_side = hook_out is not None
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
        "processing": list(model.processing),
    }
    if isinstance(sae, str) and hook_out is None and hook.endswith("hook_z") and head == "joined":
        config = dataclasses.replace(
            config, options={"reshape_activations": "hook_z", **config.options}
        )
    return fit(
        stream,
        sae,
        d_in=widths[0],
        d_out=None if hook_out is None else widths[1],
        metadata={name: value for name, value in metadata.items() if value is not None},
        source=None if config.checkpoint is None else fingerprint(stream.rows, config.seed),
        device=str(model.cfg.device),
        config=config,
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


@configured(TrainConfig, rest="options")
@checked
@needs_gradients
@torch.enable_grad()
def fit(
    activations: Tensor | Iterator[Tensor],
    sae: str | TrainingSAEConfig = "topk",
    *,
    d_in: int | None = None,
    d_out: int | None = None,
    metadata: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    config: TrainConfig | None = None,
    **settings: Any,
) -> SAE[Any]:
    """Train an SAE on activations from anywhere: a tensor [row, width] or an endless iterator.

    Args:
        activations: the rows; a tensor is shuffled anew in every epoch.
        sae: architecture or training config, as for :func:`train`.
        d_in: width of an iterator's batches; a tensor says itself.
        d_out: width that a transcoder writes.
        metadata: goes into ``cfg.metadata``.
        source: what else a checkpoint has to match to be gone on with, as JSON values: where the
            activations come from.
        device: where to train.
        config: how to train.
        **settings: as for :func:`train`.

    Returns:
        An ``sae_lens.SAE`` in eval mode.
    """
    config = config or TrainConfig()
    if isinstance(activations, Tensor):
        stream: Any = TensorStream(activations, config.batch_size, config.seed)
        d_in = activations.shape[1]
    else:
        stream = activations
    if d_in is None:
        raise ArgumentError("an iterator does not tell its width; give d_in=")
    options = {name: one for name, one in config.options.items() if name in _OF_TRAINER}
    if options.get("n_checkpoints") and config.checkpoint is None:
        raise ArgumentError("n_checkpoints: give checkpoint=, the folder that they are kept in")
    cfg = training_config(
        sae,
        d_in,
        d_out=d_out,
        d_sae=config.d_sae,
        k=config.k,
        steps=config.steps,
        normalize=config.normalize,
        device=device,
        options={name: one for name, one in config.options.items() if name not in options},
    )
    told = {"seed": config.seed, "training_steps": config.steps, "history": []}
    cfg.metadata = SAEMetadata(**{**cfg.metadata.to_dict(), **(metadata or {}), **told})
    settings = {name: getattr(config, name) for name in ("steps", "batch_size", "lr", "seed")}
    settings |= {"config": {**cfg.to_dict(), "device": None, "metadata": None}}
    settings |= {"source": source or {}}
    if options or config.trainer is not None:
        given = options if config.trainer is None else dataclasses.asdict(config.trainer)
        silent = ("logger", "device", "n_checkpoints", "checkpoint_path")
        settings["trainer"] = {name: one for name, one in given.items() if name not in silent}
    place = None if config.checkpoint is None else Path(config.checkpoint)
    with storage.claimed(place):
        folder = None
        if place is not None:
            seen: Any = activations
            if not isinstance(seen, Tensor) and not source:  # all that can be known of it
                seen = next(stream)
                stream = itertools.chain([seen], stream)
            made = {"activations": seen if isinstance(seen, Tensor) else source}
            folder = TrainingFolder(place, settings, storage.fingerprint(**made))
            if (done := folder.finished()) is not None:
                return done.to(device).eval()
        with seeded(config.seed):
            trainer = make_trainer(cfg, stream, config, options)
            if folder is None or not folder.resume(trainer, stream):
                prepare(trainer, stream)
            run(trainer, stream, folder, config)
            trained = inference_sae(trainer)
        if folder is not None:
            folder.finish(trained)
        return trained
