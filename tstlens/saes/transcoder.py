"""Training transcoders, which sae-lens can run and load but not train.

A transcoder reads one activation and predicts another: typically what an MLP reads and what it
writes. ReLU latents with an L1 penalty weighted by the decoder's norms, as sae-lens' standard SAE;
what comes out is sae-lens' ``Transcoder`` or ``SkipTranscoder``.

Source: Dunefsky et al. 2024 (arXiv 2406.11944); Paulo et al. 2025 (arXiv 2501.18823) for the skip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn

from tstlens.errors import ArgumentError


@dataclass
class TranscoderTrainingConfig(TrainingSAEConfig):
    """Configuration of a transcoder's training.

    Args:
        d_out: width of what it writes.
        l1_coefficient: of the sparsity penalty.
        l1_warm_up_steps: steps over which the penalty grows from zero.
    """

    d_out: int = 0
    l1_coefficient: float = 1.0
    l1_warm_up_steps: int = 0
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        """sae-lens' name."""
        return "transcoder"

    def __post_init__(self) -> None:
        if self.d_out < 1:
            raise ArgumentError(
                "a transcoder writes another hook point: give hook_out= (or d_out=)"
            )
        super().__post_init__()


@dataclass
class SkipTranscoderTrainingConfig(TranscoderTrainingConfig):
    """As :class:`TranscoderTrainingConfig`, with a linear map from input to output beside it."""

    @classmethod
    def architecture(cls) -> str:
        """sae-lens' name."""
        return "skip_transcoder"


class TranscoderTraining(TrainingSAE[Any]):
    """A transcoder in training, on batches [batch, d_in + d_out]."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """Decoder rows of norm ``decoder_init_norm``, encoder at random, biases and skip zero."""
        cfg, like = self.cfg, {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **like))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **like))
        decoder = nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, cfg.d_out, **like))
        if cfg.decoder_init_norm is not None:
            decoder *= cfg.decoder_init_norm / decoder.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(decoder)
        encoder = torch.empty(cfg.d_in, cfg.d_sae, **like)
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(encoder.T).T.contiguous())
        if isinstance(cfg, SkipTranscoderTrainingConfig):
            self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **like))

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """The penalty and its warm-up."""
        warm_up = self.cfg.l1_warm_up_steps
        return {"l1": TrainCoefficientConfig(value=self.cfg.l1_coefficient, warm_up_steps=warm_up)}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and what they are before the ReLU."""
        given = self.run_time_activation_norm_fn_in(self.hook_sae_input(x.to(self.dtype)))
        pre = self.hook_sae_acts_pre(given @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(torch.relu(pre)), pre

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The L1 penalty, each latent weighted by the norm of its decoder row."""
        weighted = (feature_acts * self.W_dec.norm(dim=1)).sum(1)
        return {"l1_loss": (step_input.coefficients["l1"] * weighted).mean()}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As for SAEs, with the other half of the batch as the target."""
        given, target = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], 1)
        acts, pre = self.encode_with_hidden_pre(given)
        out = acts @ self.W_dec + self.b_dec
        if isinstance(self.cfg, SkipTranscoderTrainingConfig):
            out = out + given @ self.W_skip.T
        mse = self.mse_loss_fn(out, target).sum(1).mean()
        losses = {"mse_loss": mse, **self.calculate_aux_loss(step_input, acts, pre, out)}
        return TrainStepOutput(
            sae_in=target,
            sae_out=out,
            feature_acts=acts,
            hidden_pre=pre,
            loss=mse + losses["l1_loss"],
            losses=losses,
        )


for _config in (TranscoderTrainingConfig, SkipTranscoderTrainingConfig):
    if _config.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(_config.architecture(), TranscoderTraining, _config)
