"""The functions of ``transformer_lens.patching``, with their names, signatures and results.

They run on the engine of :mod:`tstlens.patching.worlds`, so all sites of a layer are patched in one
pass. TransformerLens' own loop takes the number of positions from the last axis of the input, which
for a series is time; here ``pos`` counts the positions that the model really has.

``corrupted_tokens`` is the corrupted series [batch, channel, time], ``clean_cache`` the cache of
the clean run, ``patching_metric`` any function from outputs [batch, ...] to one number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens import ActivationCache

from tstlens.arguments import checked, shown
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownAxisError
from tstlens.model import HookedTST
from tstlens.patching.checks import require_one_stack
from tstlens.patching.grids import grid_of_rows
from tstlens.patching.sites import AXIS_ALIASES, Site, locate
from tstlens.patching.sweep import rows_that_fit
from tstlens.patching.worlds import run_corrupted, run_worlds
from tstlens.shapes import Series

if TYPE_CHECKING:
    import pandas as pd

PatchingMetric = Callable[[Tensor], Any]
Cache = ActivationCache | Mapping[str, Tensor]


def one_number(value: Any) -> float:
    """What a metric of all outputs gave.

    Raises:
        ArgumentError: it is not one finite number.
    """
    plain = isinstance(value, int | float)
    single = plain or prod(getattr(value, "shape", (0,))) == 1
    number = value.item() if single and not plain else value
    if not single or not isfinite(number):
        raise ArgumentError(
            f"expected the metric to give one finite number for all series, got {shown(value)}; "
            "average over the series: .mean()"
        )
    return float(number)


class ActPatch:
    """One of TransformerLens' patching functions: an activation and the axes that index it.

    Args:
        name: the function's name.
        activation: the site that is patched.
        index_axis_names: axes of the returned tensor, TransformerLens' names.
    """

    def __init__(self, name: str, activation: str, index_axis_names: tuple[str, ...]) -> None:
        self.__name__ = name
        self.activation, self.index_axis_names = activation, index_axis_names
        self.__doc__ = (
            f"Patch {activation} by {', '.join(index_axis_names)}, one entry at a time; returns "
            f"the metric of every patched run, [{', '.join(index_axis_names)}]."
        )

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"

    @checked
    @torch.no_grad()
    def __call__(
        self,
        model: HookedTST,
        corrupted_tokens: Series,
        clean_cache: Cache,
        patching_metric: PatchingMetric,
        index_df: pd.DataFrame | None = None,
        return_index_df: bool = False,
    ) -> Any:
        """Patch and measure.

        Args:
            model: the model.
            corrupted_tokens: corrupted series [batch, channel, time].
            clean_cache: cache of the clean run (or a dict by hook name), with this activation in
                every layer asked for; of as many series, or of one for all.
            patching_metric: from outputs [batch, ...] to one number.
            index_df: rows to patch, the first column ``layer``; all of them where None.
            return_index_df: return the rows as well.

        Returns:
            The metric, one axis per index axis, or one entry per row of ``index_df``.
        """
        import pandas as pd

        require_one_stack(model, self.__name__)
        place = locate(model, Site(self.activation))
        layers = list(range(model.cfg.n_layers))
        model.check_series(corrupted_tokens)
        if not len(corrupted_tokens):
            raise ArgumentError("expected at least one corrupted series, got none")
        run = run_corrupted(model, corrupted_tokens, None, place, layers)
        sizes = dict(
            zip(place.axes, place.by_series(run.acts[place.hook_name(0)]).shape[1:], strict=True)
        )
        shape = [model.cfg.n_layers, *(sizes[self._axis(a)] for a in self.index_axis_names[1:])]
        flat = index_df is not None
        if index_df is None:
            rows = list(itertools.product(*map(range, shape)))
            index_df = pd.DataFrame(rows, columns=list(self.index_axis_names))
        self._check_rows(index_df, model.cfg.n_layers)
        values = torch.zeros(len(index_df), device=run.final.device)
        per_chunk = max(1, rows_that_fit(model, run.final.shape[1], None) // len(run.final))
        bar = tqdm(total=len(index_df), desc=self.__name__, leave=False)
        for layer in sorted(set(index_df["layer"])):
            where = torch.tensor((index_df["layer"] == layer).to_numpy().nonzero()[0])
            of_layer = index_df.iloc[where.numpy()]
            entries = {
                self._axis(name): torch.tensor(of_layer[name].to_numpy())
                for name in index_df.columns[1:]
            }
            grid = grid_of_rows(place, sizes, entries, run.final.device)
            source = clean_cache[place.hook_name(int(layer))]
            own = run.acts[place.hook_name(int(layer))]
            one_series = len(own) // len(corrupted_tokens)  # its rows: one, or one per channel
            if source.shape[1:] != own.shape[1:] or len(source) not in (len(own), one_series):
                raise SeriesShapeError(
                    f"expected clean_cache of one series or as many as the corrupted ones, of the "
                    f"same length: {list(own.shape)}, got {list(source.shape)}"
                )
            outputs = run_worlds(model, run, place, int(layer), grid, source, per_chunk)
            measured = [one_number(patching_metric(out)) for chunk in outputs for out in chunk]
            values[where] = torch.tensor(measured, device=values.device)
            bar.update(len(where))
        bar.close()
        values = values if flat else values.view(shape)
        return (values, index_df) if return_index_df else values

    def _axis(self, name: str) -> str:
        name = AXIS_ALIASES.get(name, name)
        return "query" if name == "pos" and self.activation == "pattern" else name

    def _check_rows(self, index_df: pd.DataFrame, n_layers: int) -> None:
        if not hasattr(index_df, "columns"):
            raise ArgumentError(f"expected index_df as a pandas DataFrame, got {shown(index_df)}")
        columns = [str(column) for column in index_df.columns]
        if not columns or columns[0] != "layer":
            raise ArgumentError(f"index_df's first column must be 'layer', got {columns}")
        expected = {self._axis(name) for name in self.index_axis_names}
        for column in columns:
            if self._axis(column) not in expected:
                raise UnknownAxisError(column, self.index_axis_names, f"{self.__name__} has these")
        for column, entries in index_df.items():
            if entries.dtype.kind not in "iu" and len(entries):
                raise ArgumentError(f"expected integers in column {column!r}, got {entries.dtype}")
        for layer in index_df["layer"]:
            if not 0 <= layer < n_layers:
                raise ArgumentError(f"expected layer in 0..{n_layers - 1}, got {layer}")


_BY_POS = ("layer", "pos", "head")
_ALL_POS = ("layer", "head")

get_act_patch_resid_pre = ActPatch("get_act_patch_resid_pre", "resid_pre", ("layer", "pos"))
get_act_patch_resid_mid = ActPatch("get_act_patch_resid_mid", "resid_mid", ("layer", "pos"))
get_act_patch_attn_out = ActPatch("get_act_patch_attn_out", "attn_out", ("layer", "pos"))
get_act_patch_mlp_out = ActPatch("get_act_patch_mlp_out", "mlp_out", ("layer", "pos"))
get_act_patch_attn_head_out_by_pos = ActPatch("get_act_patch_attn_head_out_by_pos", "z", _BY_POS)
get_act_patch_attn_head_q_by_pos = ActPatch("get_act_patch_attn_head_q_by_pos", "q", _BY_POS)
get_act_patch_attn_head_k_by_pos = ActPatch("get_act_patch_attn_head_k_by_pos", "k", _BY_POS)
get_act_patch_attn_head_v_by_pos = ActPatch("get_act_patch_attn_head_v_by_pos", "v", _BY_POS)
get_act_patch_attn_head_pattern_by_pos = ActPatch(
    "get_act_patch_attn_head_pattern_by_pos", "pattern", ("layer", "head_index", "dest_pos")
)
get_act_patch_attn_head_pattern_dest_src_pos = ActPatch(
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "pattern",
    ("layer", "head_index", "dest_pos", "src_pos"),
)
get_act_patch_attn_head_out_all_pos = ActPatch("get_act_patch_attn_head_out_all_pos", "z", _ALL_POS)
get_act_patch_attn_head_q_all_pos = ActPatch("get_act_patch_attn_head_q_all_pos", "q", _ALL_POS)
get_act_patch_attn_head_k_all_pos = ActPatch("get_act_patch_attn_head_k_all_pos", "k", _ALL_POS)
get_act_patch_attn_head_v_all_pos = ActPatch("get_act_patch_attn_head_v_all_pos", "v", _ALL_POS)
get_act_patch_attn_head_pattern_all_pos = ActPatch(
    "get_act_patch_attn_head_pattern_all_pos", "pattern", ("layer", "head_index")
)


def _stack(functions: Sequence[ActPatch], *arguments: Any) -> Tensor:
    return torch.stack([function(*arguments) for function in functions])


@checked
def get_act_patch_attn_head_all_pos_every(
    model: HookedTST, corrupted_tokens: Series, clean_cache: Cache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer head"]:
    """Every head's output, query, key, value and pattern, over all positions."""
    functions = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return _stack(functions, model, corrupted_tokens, clean_cache, metric)


@checked
def get_act_patch_attn_head_by_pos_every(
    model: HookedTST, corrupted_tokens: Series, clean_cache: Cache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer pos head"]:
    """Every head's output, query, key, value and pattern, by position (of the query)."""
    functions = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    arguments = (model, corrupted_tokens, clean_cache, metric)
    pattern = get_act_patch_attn_head_pattern_by_pos(*arguments).transpose(1, 2)
    return torch.cat([_stack(functions, *arguments), pattern[None]])


@checked
def get_act_patch_block_every(
    model: HookedTST, corrupted_tokens: Series, clean_cache: Cache, metric: PatchingMetric
) -> Float[Tensor, "patch_type layer pos"]:
    """The residual stream before each block, and what attention and MLP write, by position."""
    functions = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return _stack(functions, model, corrupted_tokens, clean_cache, metric)
