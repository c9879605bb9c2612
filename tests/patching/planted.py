"""A two-layer model with weights written by hand and one known circuit.

Series have two channels and six samples. The **detector** L0H0 looks, from position 3, at samples
2 and 3 of channel 0 and writes their mean (the motif) at position 3. The **mover** L1H1 looks from
every position for a motif, and moves 6 x motif plus channel 1 to the last position, where the
head reads it as the logit of class 1. So the circuit has five edges: two samples into the
detector's values, the detector into the mover's keys and into its values, the mover into the
output.

All other components do something too: L0H1 averages channel 1, L0MLP rectifies channel 0, L1H0
moves both on, L1MLP reads both; most of it goes to class 2, a little to class 1 (0.05 and -0.1).

The norms have an eps of 1e12 and a gain of 1e6 and so pass values through unchanged to float
precision. That makes every number a short sum, the same for pre-norm and post-norm blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tstlens.data import Pairs
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig

N_TIME = 6
SIGNAL, TAG = 0, 1  # the two channels
MOTIF, LEVEL, BUSY, EVIDENCE, OTHER = range(8, 13)
HARD = 60.0  # a score that leaves e^-60 to all other positions

CIRCUIT_NODES = ("pos2", "pos3", "L0H0", "L1H1")
CIRCUIT_EDGES = (
    "pos2->L0H0.v",
    "pos3->L0H0.v",
    "L0H0->L1H1.k",
    "L0H0->L1H1.v",
    "L1H1->output",
)


def at(pos: int) -> int:
    """The dimension of the stream that says "this is position pos"."""
    return 2 + pos


def planted_model(norm_position: str = "pre") -> HookedTST:
    """The model described above."""
    model = HookedTST(
        HookedTSTConfig(
            n_layers=2,
            d_model=14,
            n_heads=2,
            d_head=4,
            d_mlp=2,
            n_channels=2,
            n_time=N_TIME,
            embed=PerStepConfig(),
            head=HeadConfig("last", n_classes=3),
            positions="learned",
            norm_position=norm_position,
            normalization_type="RMS",
            eps=1e12,
            attn_scale=1.0,
            model_name="planted",
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith((".ln1.w", ".ln2.w")):
                parameter.fill_(1e6)
        model.embed.W_E[SIGNAL, SIGNAL] = model.embed.W_E[TAG, TAG] = 1
        for pos in range(N_TIME):
            model.pos_embed.W_pos[pos, at(pos)] = 1
        _write_layer_0(model.blocks[0])
        _write_layer_1(model.blocks[1])
        model.head.W_U[EVIDENCE, 1] = 1
        model.head.W_U[SIGNAL, 1] = 0.05
        model.head.W_U[OTHER, 2] = 1
    return model


def _write_layer_0(block: torch.nn.Module) -> None:
    attn, mlp = block.attn, block.mlp
    attn.W_Q[0, at(3), 0] = HARD  # the detector: position 3 attends to 2 and 3 ...
    attn.W_K[0, at(2), 0] = attn.W_K[0, at(3), 0] = 1
    for pos in (0, 1, 2, 4, 5):  # ... and all others to position 0, where there is no signal
        attn.W_Q[0, at(pos), 1] = HARD
    attn.W_K[0, at(0), 1] = 1
    attn.W_V[0, SIGNAL, 0] = 1
    attn.W_O[0, 0, MOTIF] = 1
    attn.W_V[1, TAG, 0] = 1  # attends everywhere alike
    attn.W_O[1, 0, LEVEL] = 1
    mlp.W_in[SIGNAL, 0] = mlp.W_in[TAG, 1] = 1
    mlp.W_out[0, BUSY] = 1
    mlp.W_out[1, OTHER] = 0.5


def _write_layer_1(block: torch.nn.Module) -> None:
    attn, mlp = block.attn, block.mlp
    attn.W_V[0, BUSY, 0] = attn.W_V[0, LEVEL, 1] = 1  # attends everywhere alike
    attn.W_O[0, 0, OTHER] = 1
    attn.W_O[0, 1, EVIDENCE] = 0.05
    attn.b_Q[1, 0] = 1  # the mover: a motif of 1 weighs as much as five other positions
    attn.W_K[1, MOTIF, 0] = math.log(5)
    attn.W_V[1, MOTIF, 0] = 6
    attn.W_V[1, TAG, 0] = 1
    attn.W_O[1, 0, EVIDENCE] = 1
    mlp.W_in[BUSY, 0] = mlp.W_in[LEVEL, 1] = 1
    mlp.W_out[0, OTHER] = 1
    mlp.W_out[0, EVIDENCE] = -0.1
    mlp.W_out[1, OTHER] = 0.3


def planted_series() -> tuple[Tensor, Tensor]:
    """A series with the motif and one with the same bump elsewhere, each [channel, time]."""
    clean = torch.tensor([[0.0, 0, 1, 1, 0, 0], [0, 0.3, 0, 3, 0, 0]])
    corrupted = torch.tensor([[0.0, 0, 0, 0, 1, 1], [0, 0, 0, 3, 0, 0.6]])
    return clean, corrupted


def planted_pairs() -> Pairs:
    """That pair, and a pair of the corrupted series with itself, where nothing has an effect."""
    clean, corrupted = planted_series()
    return Pairs(
        torch.stack([clean, corrupted]),
        torch.stack([corrupted, corrupted]),
        torch.tensor([1, 1]),
    )


# Logit of class 1, worked out by hand. Corrupted: no motif, so the mover weighs all positions
# alike: (3 + 0.6) / 6 = 0.6; L1H0 adds 0.05 x level = 0.05 x 3.6 / 6; L1MLP takes 0.1 x the signal
# at the last position, the head reads 0.05 of it.
CORRUPTED_LOGIT = 0.6 + 0.03 - 0.1 + 0.05
# Clean: the motif is 1, the mover's weights are 1/2 at position 3 and 1/10 elsewhere:
# (6 + 3) / 2 + 0.3 / 10 = 4.53; level is 3.3 / 6; no signal at the last position.
CLEAN_LOGIT = 4.53 + 0.0275
# With the clean sample 2 or 3 alone the motif is 1/2 and weighs 5^(1/2): against five others.
HALF_MOTIF = (math.sqrt(5) * (3 + 3) + 0.6) / (math.sqrt(5) + 5) - 0.6

# Effect of patching each edge alone, clean into corrupted. All edges not named have none.
EDGE_EFFECTS = {
    "pos2->L0H0.v": HALF_MOTIF,
    "pos3->L0H0.v": HALF_MOTIF,
    "L0H0->L1H1.k": (5 * 3 + 0.6) / 10 - 0.6,  # looks at position 3, where there is only the tag
    "L0H0->L1H1.v": 6 / 6,  # looks everywhere, and so sees a sixth of the motif
    "L1H1->output": 4.53 - 0.6,
    "pos1->L1H1.v": 0.3 / 6,
    "pos5->L1H1.v": -0.6 / 6,
    "pos1->L0H1.v": 0.05 * 0.3 / 6,
    "pos5->L0H1.v": -0.05 * 0.6 / 6,
    "L0H1->L1H0.v": 0.05 * -0.3 / 6,
    "L1H0->output": 0.05 * -0.3 / 6,
    "pos5->L0MLP": 0.1,
    "L0MLP->L1MLP": 0.1,
    "L1MLP->output": 0.1,
    "pos5->output": -0.05,
}

# Effect of patching each node's output alone.
NODE_EFFECTS = {
    "pos0": 0.0,
    "pos1": 0.3 / 6 + 0.05 * 0.3 / 6,
    "pos2": HALF_MOTIF,
    "pos3": HALF_MOTIF,
    "pos4": 0.0,
    "pos5": -0.1 - 0.005 + 0.1 - 0.05,
    "L0H0": (5 * (6 + 3) + 0.6) / 10 - 0.6,
    "L0H1": 0.05 * -0.3 / 6,
    "L0MLP": 0.1,
    "L1H0": 0.05 * -0.3 / 6,
    "L1H1": 4.53 - 0.6,
    "L1MLP": 0.1,
}
