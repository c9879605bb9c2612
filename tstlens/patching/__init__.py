"""Activation patching: sites, metrics and exact sweeps.

``sweep`` replaces one site at a time over a grid; ``patch`` replaces several at once. The functions
of ``transformer_lens.patching`` are here too, under their own names.
"""

from tstlens.metrics import Metric
from tstlens.patching.ablation import ablate
from tstlens.patching.attention import AttentionResult, attention
from tstlens.patching.attribution import AttributionConfig, attribution
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
from tstlens.patching.intervals import Interval, over_pairs
from tstlens.patching.lens import LensResult, lens
from tstlens.patching.logit_attribution import Component, LogitAttribution, logit_attribution
from tstlens.patching.metrics import log_prob, logit, logit_diff, mse, prob, quantile_loss
from tstlens.patching.patch import (
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    patch,
)
from tstlens.patching.result import AblationResult, SweepResult
from tstlens.patching.sites import Site, site_names
from tstlens.patching.statistics import (
    Agreement,
    SplitHalf,
    Summary,
    agreement,
    alike_pairs,
    null_map,
    split_half,
    summary,
)
from tstlens.patching.sweep import sweep
from tstlens.patching.together import TogetherResult
from tstlens.patching.transformer_lens_names import (
    generic_activation_patch,
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
    make_df_from_ranges,
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
    "AttributionConfig",
    "Agreement",
    "Campaign",
    "Influence",
    "Interval",
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
    "TogetherResult",
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
    "over_pairs",
    "patch",
    "prob",
    "quantile_loss",
    "site_names",
    "sweep",
    "window_sweep",
]
