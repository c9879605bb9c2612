"""Activation patching: sites, metrics and exact sweeps.

``sweep`` replaces one site at a time over a grid; ``patch`` replaces several at once. The functions
of ``transformer_lens.patching`` are here too, under their own names.
"""

from tstlens.patching.ablation import AblationResult, ablate
from tstlens.patching.agreement import Agreement, agreement
from tstlens.patching.attention import attention
from tstlens.patching.attention_result import AttentionResult
from tstlens.patching.attribution import attribution
from tstlens.patching.campaign import (
    Campaign,
    campaign_grids,
    load_campaign,
    run_campaign,
)
from tstlens.patching.circuits import (
    Circuit,
    Completeness,
    ComponentGraph,
    Edge,
    EdgeEffects,
    Faithfulness,
    Minimality,
    Node,
    Together,
    component_graph,
    edge_attribution,
    edge_sweep,
    faithfulness,
    follow_paths,
    path_patch,
)
from tstlens.patching.influence import Influence, head_influence
from tstlens.patching.lens import lens
from tstlens.patching.lens_result import LensResult
from tstlens.patching.logit_attribution import logit_attribution
from tstlens.patching.logit_attribution_result import Component, LogitAttribution
from tstlens.patching.metrics import Metric, log_prob, logit, logit_diff, mse, prob, quantile_loss
from tstlens.patching.patch import patch
from tstlens.patching.patch_setters import (
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Site, site_names
from tstlens.patching.stability import SplitHalf, alike_pairs, null_map, split_half
from tstlens.patching.statistics import Summary, summary
from tstlens.patching.sweep import sweep
from tstlens.patching.transformer_lens_generic import (
    generic_activation_patch,
    make_df_from_ranges,
)
from tstlens.patching.transformer_lens_names import (
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
)
from tstlens.patching.windows import window_sweep

__all__ = [
    "Circuit",
    "Completeness",
    "ComponentGraph",
    "Edge",
    "EdgeEffects",
    "Faithfulness",
    "Minimality",
    "Node",
    "Together",
    "component_graph",
    "edge_attribution",
    "edge_sweep",
    "faithfulness",
    "follow_paths",
    "path_patch",
    "AblationResult",
    "Agreement",
    "Campaign",
    "Influence",
    "SplitHalf",
    "Summary",
    "ablate",
    "agreement",
    "alike_pairs",
    "attribution",
    "campaign_grids",
    "head_influence",
    "load_campaign",
    "null_map",
    "run_campaign",
    "split_half",
    "summary",
    "AttentionResult",
    "Component",
    "LensResult",
    "LogitAttribution",
    "attention",
    "lens",
    "logit_attribution",
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
    "generic_activation_patch",
    "layer_pos_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "make_df_from_ranges",
    "log_prob",
    "logit",
    "logit_diff",
    "mse",
    "patch",
    "prob",
    "quantile_loss",
    "site_names",
    "sweep",
    "window_sweep",
]
