"""TransformerLens' ActivationCache, refusing what a time-series transformer cannot answer."""

from __future__ import annotations

import inspect
from typing import Any

from transformer_lens import ActivationCache
from transformer_lens.utilities import get_act_name

from tstlens.arguments import checked
from tstlens.errors import NonlinearResidualError, UnknownActivationError

_REASON = (
    "{method} adds up what components wrote to the residual stream, but this model normalises the "
    "stream after every sublayer (post-norm), so contributions do not add up to it; patch instead "
    "(tstlens.patching.sweep), or use a pre-norm model"
)


def _linear_only(name: str) -> Any:
    inherited = getattr(ActivationCache, name)

    def method(self: TSTActivationCache, *args: Any, **kwargs: Any) -> Any:
        cfg: Any = self.model.cfg
        if cfg.norm_position == "post":
            raise NonlinearResidualError(_REASON.format(method=name))
        return inherited(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = inherited.__doc__
    return method


def _linear_with(name: str, *options: str) -> Any:
    inherited = getattr(ActivationCache, name)
    signature = inspect.signature(inherited)

    def method(self: TSTActivationCache, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        asked = [option for option in options if given.get(option)]
        cfg: Any = self.model.cfg
        if asked and cfg.norm_position == "post":
            raise NonlinearResidualError(_REASON.format(method=f"{name}({asked[0]}=True)"))
        return inherited(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = inherited.__doc__
    return method


class TSTActivationCache(ActivationCache):
    """Activations by name, as TransformerLens' cache gives them.

    ``cache["pattern", 0]``, ``cache["z", 1]``, ``cache["resid_post", 2]`` and full hook names work.
    Methods that add contributions up hold on pre-norm models and raise
    :class:`~tstlens.errors.NonlinearResidualError` on post-norm ones. ``accumulated_resid`` reads
    the stream itself and works on both (on post-norm models its entries are what enters each block
    and the last sum before its norm).
    """

    decompose_resid = _linear_only("decompose_resid")
    get_full_resid_decomposition = _linear_only("get_full_resid_decomposition")
    apply_ln_to_stack = _linear_only("apply_ln_to_stack")

    def logit_attrs(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a time-series head pools positions first, so a class has no one direction."""
        raise NonlinearResidualError(
            "logit_attrs projects each position on one token's unembedding direction, but a "
            "time-series head pools over positions first; sweep the site with tstlens.patching, or "
            "multiply the pooled vector cache['head.hook_pooled'] with model.W_U"
        )

    stack_head_results = _linear_with("stack_head_results", "incl_remainder", "apply_ln")
    stack_neuron_results = _linear_with("stack_neuron_results", "incl_remainder", "apply_ln")

    @checked
    def apply_slice_to_batch_dim(self, batch_slice: Any) -> TSTActivationCache:
        """Slice the batch axis of every activation."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return type(self)(sliced.cache_dict, self.model, has_batch_dim=sliced.has_batch_dim)

    def __getitem__(self, key: Any) -> Any:
        cfg: Any = self.model.cfg
        parts = key if isinstance(key, tuple) and key else (key,)
        layers = all(part is None or hasattr(part, "__index__") for part in parts[1:2])
        if not isinstance(parts[0], str) or not layers:
            raise UnknownActivationError(key, self.cache_dict, "Ask by (name, layer), or hook name")
        if not isinstance(key, str) and getattr(cfg, "n_decoder_layers", 0) and key[1] is not None:
            model: Any = self.model
            layer = key[1] % cfg.n_layers
            name = get_act_name(key[0], layer, *key[2:])
            key = name.replace(f"blocks.{layer}", model.layer_name(layer), 1)
        try:
            return super().__getitem__(key)
        except KeyError as error:
            name = error.args[0] if error.args else key
            advice = "cache.keys() lists them all"
            raise UnknownActivationError(name, self.cache_dict, advice) from None
