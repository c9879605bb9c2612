"""Activation patching: sites, metrics and exact sweeps.

``sweep`` replaces one site at a time over a grid; ``patch`` replaces several at once. The functions
of ``transformer_lens.patching`` are here too, under their own names.
"""

from tstlens.patching.metrics import Metric, log_prob, logit, logit_diff, mse, prob
from tstlens.patching.patch import patch
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Site, site_names
from tstlens.patching.sweep import sweep
from tstlens.patching.transformer_lens_names import (
    get_act_patch_resid_pre,
    get_act_patch_resid_mid,
    get_act_patch_attn_out,
    get_act_patch_mlp_out,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_block_every,
)

__all__ = [
    "Metric",
    "Site",
    "SweepResult",
    "get_act_patch_resid_pre",
    "get_act_patch_resid_mid",
    "get_act_patch_attn_out",
    "get_act_patch_mlp_out",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_block_every",
    "log_prob",
    "logit",
    "logit_diff",
    "mse",
    "patch",
    "prob",
    "site_names",
    "sweep",
]
