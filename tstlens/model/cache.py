"""TransformerLens' ActivationCache, whose sums hold on every block option or are refused."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, get_act_name

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, NonlinearResidualError, UnknownActivationError
from tstlens.model.norms import HeldNorm
from tstlens.points import real_name

_REASON = (
    "{method} adds up what components wrote to the residual stream, but this model normalises the "
    "stream after every sublayer (post-norm), so contributions do not add up to it; take what was "
    "written layer by layer with stack_activation('attn_out') and stack_activation('mlp_out'), "
    "patch instead (tstlens.patching.sweep), or use a pre-norm model"
)
_Stack = Tensor | tuple[Tensor, list[str]]
_Parts = list[tuple[str, Tensor]]


class TSTActivationCache(ActivationCache):
    """Activations by name, as TransformerLens' cache gives them.

    ``cache["pattern", 0]``, ``cache["z", 1]``, ``cache["resid_post", 2]`` and full hook names work.

    Parts of a pre-norm model's stream sum to it, whatever its options; where TransformerLens has
    no name for a part, a row of its own is added:

    - ``{l}_channel_attn_out``, ``{l}_cross_attn_out``: what a block's second attention wrote;
    - ``embed_norm_bias``: the bias of the norm on the embedding (``norm_embed``);
    - ``decoder_embed``: what a decoder's stream starts from;
    - ``0_pre``: the first stream, where the embedding was not cached;
    - ``norm_bias``: with ``apply_ln``, what a batch norm's running mean takes away.

    An encoder and a decoder have a stream each: ``layer`` says which, and ``layer=n_layers`` (or
    -1) is the decoder's last. With ``apply_ln`` rows are what ``hook_normalized`` of the norm that
    reads the stream at ``layer`` is made of, as in TransformerLens; without a norm there they stay
    as they are. Norms inside the blocks and on the embedding are held at their scale in the run.

    On post-norm models what adds up raises :class:`~tstlens.errors.NonlinearResidualError`, and so
    does it where a hook edited the stream. ``accumulated_resid`` reads the stream itself and works
    on both (on post-norm models its entries are what enters each block and the last sum before its
    norm). A cache of gradients, which sum to nothing, gives its rows as they are.
    """

    model: Any

    @checked
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> _Stack:
        """What embedding and sublayers wrote to the stream that enters ``layer``.

        Args:
            layer: 0 to the number of layers; None and -1 are the last stream.
            mlp_input: go on to what the MLP of ``layer`` reads.
            mode: ``"mlp"`` and ``"attn"`` leave the other sublayers out.
            apply_ln: divide by the scale of the norm that reads the stream.
            pos_slice: positions, as TransformerLens' ``Slice`` takes them.
            incl_embeds: False leaves the embedding out.
            return_labels: also return the names of the rows.

        Returns:
            [component, ..., d_model]. With everything in, rows sum to the stream.
        """
        layer = self._summable("decompose_resid", layer, mlp_input)
        parts = self._entering(layer) if incl_embeds else []
        for number in self._layers(layer, mlp_input):
            if mode != "mlp":
                parts += [(f"{number}_{name}", self[name, number]) for name in self._attns(number)]
            if mode != "attn" and number < layer:
                parts.append((f"{number}_mlp_out", self["mlp_out", number]))
        whole = incl_embeds and mode == "all"
        return self._stacked(parts, layer, mlp_input, apply_ln, pos_slice, return_labels, whole)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> _Stack:
        """Every head, neuron (or MLP), the embedding and all biases; rows sum to the stream.

        Args:
            layer, mlp_input, apply_ln, pos_slice, return_labels: as in :meth:`decompose_resid`.
            expand_neurons: a row per neuron instead of one per MLP.
            project_output_onto: [d_model] or [d_model, output] to multiply every row with.
        """
        layer = self._summable("get_full_resid_decomposition", layer, mlp_input)
        layers = self._layers(layer, mlp_input)
        heads = [part for number in layers for part in self._heads(number)]
        neurons = range(layers.start, layer) if expand_neurons else range(0)
        rest: _Parts = []
        bias = torch.zeros((), dtype=self.model.b_O.dtype, device=self.model.b_O.device)
        for number in layers:
            rest += [(f"{number}_{name}", self[name, number]) for name in self._attns(number)[1:]]
            bias = bias + self._bias(number, "attn")
            if number in neurons:
                bias = bias + self._bias(number, "mlp")
            elif number < layer:
                rest.append((f"{number}_mlp_out", self["mlp_out", number]))
        rest += self._entering(layer)
        rest.append(("bias", bias.expand_as(rest[-1][1])))
        project = project_output_onto
        pieces: list[Tensor] = []
        labels: list[str] = []
        for parts in (heads, rest):
            if parts:
                stack, names = self._stacked(
                    parts, layer, mlp_input, apply_ln, pos_slice, True, whole=parts is rest,
                    check=False,
                )  # fmt: skip
                pieces.append(stack if project is None else stack @ project)
                labels += names
            if parts is heads and neurons:
                reader = self._reader(project, layer, mlp_input, apply_ln, pos_slice)
                pieces += [self._neurons(number, pos_slice, None, reader, project) for number in
                           neurons]  # fmt: skip
                labels += [f"L{at}N{n}" for at in neurons for n in range(self.model.cfg.d_mlp)]
        stack = torch.cat(pieces)
        self._check_sum(stack, layer, mlp_input, apply_ln, pos_slice, project)
        return (stack, labels) if return_labels else stack

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> _Stack:
        """The stream that enters each layer up to ``layer``, read from the cache.

        Args:
            layer, pos_slice, return_labels: as in :meth:`decompose_resid`.
            incl_mid: also the sums between a block's sublayers.
            apply_ln: put each row through the final norm, its weight and bias too, or on the way
                divide it as ``hook_normalized`` of the norm at ``layer`` was.
            mlp_input: end with what the MLP of ``layer`` reads.
        """
        layer = self._layer(layer, mlp_input)
        rows: list[tuple[str, str]] = []
        for number in range(self._layers(layer, False).start, layer + 1):
            if number == self.model.cfg.n_layers:
                rows.append(("final_post", self._stream_name(number)))
                continue
            name = self.model.layer_name(number)
            rows.append((f"{number}_pre", f"{name}.hook_resid_pre"))
            if (incl_mid and number < layer) or (mlp_input and number == layer):
                last = self._stream_name(number, mlp_input=True).rsplit("_resid_", 1)[1]
                rows += [(f"{number}_{leaf}", f"{name}.hook_resid_{leaf}")
                         for leaf in dict.fromkeys(("mid", last))]  # fmt: skip
        stack = torch.stack([_sliced(self[name], pos_slice) for _, name in rows])
        if apply_ln:
            stack = self._normalised(
                "accumulated_resid(apply_ln=True)", stack, layer, mlp_input, pos_slice
            )
        return (stack, [label for label, _ in rows]) if return_labels else stack

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Divide parts of the stream by the scale that the norm reading it had in the run.

        Rows of parts that sum to the stream then sum to the norm's ``hook_normalized``. A batch
        norm adds a last row: what its running mean takes away. Where no norm reads the stream
        (no final norm) parts stay as they are.

        Args:
            residual_stack: [component, ..., d_model], positions sliced already.
            layer, mlp_input, pos_slice: where, as in :meth:`decompose_resid`.
            batch_slice: rows of the batch.
            has_batch_dim: whether the stack has a batch axis.
            recompute_ln: rows are whole streams: at the last one each goes through the final norm
                with a scale of its own, weight and bias too; elsewhere no row is added.
        """
        batch = _slice(batch_slice)
        if has_batch_dim:
            residual_stack = batch.apply(residual_stack, dim=1)
        if recompute_ln:
            return self._normalised(
                "apply_ln_to_stack", residual_stack, layer, mlp_input, pos_slice, batch
            )
        layer = self._summable("apply_ln_to_stack", layer, mlp_input)
        norm = self._norm(layer, mlp_input, pos_slice, batch)
        if norm is None:
            return residual_stack
        divided = norm.divide(residual_stack)
        if norm.shift is None:
            return divided
        return torch.cat([divided, norm.shift.expand(1, *residual_stack.shape[1:])])

    def compute_head_results(self) -> None:
        """Cache ``attn.hook_result``, z times ``W_O`` per head, for every layer that lacks it."""
        for number, block in enumerate(self.model.layers):
            name = f"{self.model.layer_name(number)}.attn.hook_result"
            if name not in self.cache_dict:
                z = self["z", number]
                self.cache_dict[name] = torch.einsum("...hd,hdm->...hm", z, block.attn.W_O)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> _Stack:
        """What every head of the first attentions wrote to the stream that enters ``layer``.

        Where a norm follows attention (``use_normalization_before_and_after``) this is what
        leaves that norm.

        Args:
            layer, pos_slice, apply_ln, return_labels: as in :meth:`decompose_resid`.
            incl_remainder: a last row with the rest of the stream, so that rows sum to it.
        """
        if incl_remainder or apply_ln:
            option = "incl_remainder" if incl_remainder else "apply_ln"
            self._summable(f"stack_head_results({option}=True)", layer)
        layer = self._layer(layer)
        parts = [part for number in self._layers(layer) for part in self._heads(number)]
        stack, labels = self._stacked(parts, layer, False, apply_ln, pos_slice, True, False)
        return self._with_rest(
            stack, labels, layer, pos_slice, apply_ln, incl_remainder, return_labels
        )

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> _Stack:
        """What every neuron wrote to the stream that enters ``layer``.

        Args:
            layer, pos_slice, apply_ln, return_labels: as in :meth:`decompose_resid`.
            neuron_slice: which neurons of each layer.
            incl_remainder: a last row with the rest of the stream, so that rows sum to it.
            project_output_onto: [d_model] or [d_model, output] to multiply every row with.
        """
        if incl_remainder or apply_ln:
            option = "incl_remainder" if incl_remainder else "apply_ln"
            self._summable(f"stack_neuron_results({option}=True)", layer)
        layer = self._layer(layer)
        layers, project = self._layers(layer), project_output_onto
        reader = self._reader(project, layer, False, apply_ln, pos_slice)
        pieces = [self._neurons(at, pos_slice, neuron_slice, reader, project) for at in layers]
        if pieces:
            stack = torch.cat(pieces)
        else:
            empty = _sliced(self._stream(layer), pos_slice)
            stack = (empty if project is None else empty @ project)[None][:0]
        kept = _slice(neuron_slice).apply(torch.arange(self.model.cfg.d_mlp), dim=0).reshape(-1)
        labels = [f"L{at}N{n}" for at in layers for n in kept.tolist()]
        return self._with_rest(
            stack, labels, layer, pos_slice, apply_ln, incl_remainder, return_labels, project
        )

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        project_output_onto: Tensor | None = None,
    ) -> Tensor:
        """What the neurons of one layer wrote to the stream, [..., pos, neuron, d_model].

        Args:
            layer: the block, negative from the end.
            neuron_slice: which neurons.
            pos_slice: which positions.
            project_output_onto: [d_model] or [d_model, output] to multiply the last axis with.
        """
        n_layers = self.model.cfg.n_layers
        if not hasattr(layer, "__index__") or not -n_layers <= layer < n_layers:
            raise ArgumentError(f"expected a layer in 0..{n_layers - 1}, got {layer!r}")
        project = project_output_onto
        reader = self._reader(project, n_layers, False, False, pos_slice)
        found = self._neurons(layer % n_layers, pos_slice, neuron_slice, reader, project)
        if _slice(neuron_slice).mode == "int":
            return found[0]
        return found.movedim(0, -1 if project is not None and project.ndim == 1 else -2)

    def stack_activation(
        self, activation_name: str, layer: int = -1, sublayer_type: str | None = None
    ) -> Tensor:
        """One activation of every layer before ``layer``, stacked.

        Raises:
            ArgumentError: the layers' activations differ in shape, as an encoder's and a decoder's.
        """
        layers = range(self._layer(layer))
        found = [self[activation_name, number, sublayer_type] for number in layers]
        if len({one.shape for one in found}) > 1:
            n_encoder = self.model.cfg.n_encoder_layers
            raise ArgumentError(
                f"{activation_name!r} has shapes {sorted({tuple(one.shape) for one in found})} in "
                "different layers, so they do not stack; stop at the encoder with layer="
                f"{n_encoder}, or take cache[{activation_name!r}, layer] one by one"
            )
        if not found:
            raise ArgumentError("layer=0 leaves nothing to stack: layers before it are taken")
        return torch.stack(found)

    def logit_attrs(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a time-series head pools positions first, so a class has no one direction."""
        post = self.model.cfg.norm_position == "post"
        raise NonlinearResidualError(
            "logit_attrs projects each position on one token's unembedding direction, but a "
            "time-series head pools over positions first; "
            + (
                "and patching.logit_attribution, which pools as the head does, needs a pre-norm "
                "model, where contributions add up; here (post-norm) "
                if post
                else "use patching.logit_attribution, which pools as the head does, "
            )
            + "sweep the site with tstlens.patching, or "
            "multiply the pooled vector cache['head.hook_pooled'] with model.W_U"
        )

    def logit_lens(self, **kwargs: Any) -> Any:
        """Refused for the same reason: ``patching.lens`` reads the stream through the head."""
        raise NonlinearResidualError(
            "logit_lens unembeds each position by itself, but a time-series head pools over "
            "positions first; use patching.lens(model, series), with by_pos=True for positions"
        )

    def remove_batch_dim(self) -> TSTActivationCache:
        """Drop the batch axis of a cache of one row."""
        if self.has_batch_dim and self._batch_size() != 1:
            raise ArgumentError(
                f"remove_batch_dim needs a single row in the trunk, got {self._batch_size()}; take "
                "one with apply_slice_to_batch_dim(0)"
            )
        super().remove_batch_dim()
        return self

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
            own = real_name(name, self.cache_dict) if isinstance(name, str) else name
            if own in self.cache_dict:
                return self.cache_dict[own]
            advice = "cache.keys() lists them all"
            raise UnknownActivationError(name, self.cache_dict, advice) from None

    def _summable(self, method: str, layer: int | None, mlp_input: bool = False) -> int:
        if self.model.cfg.norm_position == "post":
            raise NonlinearResidualError(_REASON.format(method=method))
        return self._layer(layer, mlp_input)

    def _layer(self, layer: int | None, mlp_input: bool = False) -> int:
        n_layers = self.model.cfg.n_layers
        given = n_layers if layer is None or layer == -1 else layer
        most = n_layers - bool(mlp_input)
        whole = hasattr(given, "__index__") and not isinstance(given, bool)
        if not whole or not 0 <= given <= most:
            why = ", as mlp_input=True asks for an MLP of its own" if mlp_input else " (or -1)"
            raise ArgumentError(f"expected a layer in 0..{most}{why}, got {layer!r}")
        return int(given)

    def _layers(self, layer: int, mlp_input: bool = False) -> range:
        """The layers that write to the stream that enters ``layer``."""
        cfg = self.model.cfg
        decoding = cfg.n_decoder_layers and layer >= cfg.n_encoder_layers
        return range(cfg.n_encoder_layers if decoding else 0, layer + bool(mlp_input))

    def _attns(self, number: int) -> list[str]:
        second = self.model.layers[number].second
        return ["attn_out"] if second == "none" else ["attn_out", f"{second}_attn_out"]

    def _entering(self, layer: int) -> _Parts:
        """What the stream that reaches ``layer`` started from."""
        first, cfg = self._layers(layer).start, self.model.cfg
        if first:
            return [("decoder_embed", self["hook_decoder_embed"])]
        names = {"embed": "hook_embed"}
        if cfg.positions != "none":
            names["pos_embed"] = "hook_pos_embed"
        needed = [*names.values(), *(["ln_embed.hook_scale"] if cfg.norm_embed else [])]
        begun = f"{self.model.layer_name(0)}.hook_resid_pre"
        if begun in self.cache_dict and not all(name in self.cache_dict for name in needed):
            return [("0_pre", self[begun])]  # a run from the middle, or of some names
        parts = [(label, self[name]) for label, name in names.items()]
        if not cfg.norm_embed:
            return parts
        norm = HeldNorm(self.model.ln_embed, self["ln_embed.hook_scale"])
        parts = [(label, norm.through(value)) for label, value in parts]
        bias = norm.bias
        if bias is not None:
            parts.append(("embed_norm_bias", bias.expand_as(parts[0][1])))
        return parts

    def _post(self, number: int, sublayer: str) -> HeldNorm | None:
        """The norm between a sublayer and the stream, where there is one."""
        name = "ln1_post" if sublayer == "attn" else "ln2_post"
        norm = getattr(self.model.layers[number], name, None)
        scale = f"{self.model.layer_name(number)}.{name}.hook_scale"
        return None if norm is None else HeldNorm(norm, self[scale])

    def _heads(self, number: int) -> _Parts:
        attn, norm = self.model.layers[number].attn, self._post(number, "attn")
        name = f"{self.model.layer_name(number)}.attn.hook_result"
        if name in self.cache_dict:
            result = self.cache_dict[name]
        else:
            result = torch.einsum("...hd,hdm->...hm", self["z", number], attn.W_O)
        heads = [result.select(-2, head) for head in range(attn.W_O.shape[0])]
        written = heads if norm is None else [norm.through(head) for head in heads]
        return [(f"L{number}H{head}", one) for head, one in enumerate(written)]

    def _bias(self, number: int, sublayer: str) -> Tensor:
        block, norm = self.model.layers[number], self._post(number, sublayer)
        bias = block.attn.b_O if sublayer == "attn" else block.mlp.b_out
        if norm is None:
            return bias
        own = norm.bias
        return norm.through(bias) if own is None else norm.through(bias) + own

    def _reader(
        self, project: Tensor | None, layer: int, mlp_input: bool, apply_ln: bool, pos_slice: Any
    ) -> Tensor:
        """What neurons' writing is multiplied with, [..., output, d_model]."""
        if project is None:
            like = self.model.b_O
            reader = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        else:
            reader = project.reshape(len(project), -1).T
        norm = self._norm(layer, mlp_input, pos_slice) if apply_ln else None
        return reader if norm is None else _per_output(norm).read(reader, gain=False)

    def _neurons(
        self, number: int, pos_slice: Any, kept: Any, reader: Tensor, project: Tensor | None
    ) -> Tensor:
        """[neuron, ..., output] of one layer, through ``reader``."""
        mlp, norm = self.model.layers[number].mlp, self._post(number, "mlp")
        if norm is not None:
            norm = HeldNorm(norm.norm, _sliced(norm.scale, pos_slice))
            reader = _per_output(norm).read(reader)
        kept = _slice(kept).apply(torch.arange(len(mlp.W_out), device=mlp.W_out.device), dim=0)
        kept = kept.reshape(-1)
        post = _sliced(self["post", number, "mlp"], pos_slice)[..., kept]
        written = post[..., None] * (mlp.W_out[kept] @ reader.transpose(-1, -2))
        written = written.movedim(-2, 0)
        return written[..., 0] if project is not None and project.ndim == 1 else written

    def _stream_name(self, layer: int, mlp_input: bool = False) -> str:
        model = self.model
        if layer == model.cfg.n_layers:
            return f"{model.layer_name(layer - 1)}.hook_resid_post"
        name = f"{model.layer_name(layer)}.hook_resid_"
        if not mlp_input:
            before = f"{model.layer_name(layer - 1)}.hook_resid_post" if layer else ""
            first = layer == self._layers(layer).start
            usable = not first and f"{name}pre" not in self.cache_dict
            return before if usable and before in self.cache_dict else f"{name}pre"
        second = model.layers[layer].second
        return f"{name}mid" if second == "none" else f"{name}mid_{second}"

    def _stream(self, layer: int, mlp_input: bool = False) -> Tensor:
        return self[self._stream_name(layer, mlp_input)]

    def _norm(
        self, layer: int, mlp_input: bool, pos_slice: Any, batch: Slice | None = None
    ) -> HeldNorm | None:
        """The norm that reads the stream at ``layer``; None where there is none."""
        model = self.model
        if layer == model.cfg.n_layers:
            if not model.cfg.final_norm:
                return None
            norm, name = model.final_norm, "ln_final"
            name = "decoder_final_ln" if model.cfg.n_decoder_layers else name
        else:
            block = model.layers[layer]
            norm = block.mlp_norm if mlp_input else block.ln1
            leaf = ("ln2" if block.second == "none" else "ln3") if mlp_input else "ln1"
            name = f"{model.layer_name(layer)}.{leaf}"
        scale = _sliced(self[f"{name}.hook_scale"], pos_slice)
        return HeldNorm(norm, scale if batch is None else batch.apply(scale, dim=0))

    def _normalised(
        self,
        method: str,
        streams: Tensor,
        layer: int | None,
        mlp_input: bool,
        pos_slice: Any,
        batch: Slice | None = None,
    ) -> Tensor:
        """Whole streams, each as the norm that reads the one at ``layer`` makes it."""
        layer = self._summable(method, layer, mlp_input)
        if layer == self.model.cfg.n_layers:
            return self.model.final_norm(streams)
        norm: Any = self._norm(layer, mlp_input, pos_slice, batch)  # blocks have their norms
        divided = norm.divide(streams)
        return divided if norm.shift is None else divided + norm.shift

    def _stacked(
        self,
        parts: _Parts,
        layer: int,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: Any,
        return_labels: bool,
        whole: bool,
        check: bool = True,
    ) -> Any:
        """Parts as one stack; ``whole`` says that they hold all that the stream is made of."""
        labels = [label for label, _ in parts]
        if parts:
            stack = torch.stack([_sliced(part, pos_slice) for _, part in parts])
        else:
            stack = _sliced(self._stream(layer, mlp_input), pos_slice)[None][:0]
        norm = self._norm(layer, mlp_input, pos_slice) if apply_ln else None
        if norm is not None:
            divided, shift = norm.divide(stack), norm.shift
            stack = divided
            if whole and shift is not None:
                stack = torch.cat([divided, shift.expand(1, *divided.shape[1:])])
                labels.append("norm_bias")
        if whole and check:
            self._check_sum(stack, layer, mlp_input, apply_ln, pos_slice)
        return (stack, labels) if return_labels else stack

    def _target(
        self,
        layer: int,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: Any,
        project: Tensor | None = None,
    ) -> Tensor:
        """What all parts together sum to."""
        target = _sliced(self._stream(layer, mlp_input), pos_slice)
        norm = self._norm(layer, mlp_input, pos_slice) if apply_ln else None
        if norm is not None:
            shift = norm.shift
            target = norm.divide(target) if shift is None else norm.divide(target) + shift
        return target if project is None else target @ project

    def _with_rest(
        self,
        stack: Tensor,
        labels: list[str],
        layer: int,
        pos_slice: Any,
        apply_ln: bool,
        incl_remainder: bool,
        return_labels: bool,
        project: Tensor | None = None,
    ) -> _Stack:
        if incl_remainder:
            whole = self._target(layer, False, apply_ln, pos_slice, project)
            stack = torch.cat([stack, (whole - stack.sum(0))[None]])
            labels = [*labels, "remainder"]
        return (stack, labels) if return_labels else stack

    @torch.no_grad()
    def _check_sum(
        self,
        stack: Tensor,
        layer: int,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: Any,
        project: Tensor | None = None,
    ) -> None:
        """Raise where parts do not sum to the stream of the run, as after an edit by a hook."""
        if self._stream_name(layer, mlp_input) not in self.cache_dict:
            return
        target = self._target(layer, mlp_input, apply_ln, pos_slice, project)
        gap = (stack.sum(0) - target).abs()
        size = torch.linalg.vector_norm(stack, 1, dim=0).amax()
        apart = bool((gap > 1e3 * torch.finfo(stack.dtype).eps * size).any())
        if apart and not self._holds_gradients():
            raise NonlinearResidualError(
                f"what components wrote adds up to {self._stream_name(layer, mlp_input)} except "
                f"for {float(gap.max()):.4g}: in this run a hook or a spliced module edited the "
                "stream between them; run without it, or read the stream with accumulated_resid"
            )

    def _holds_gradients(self) -> bool:
        """Whether these are gradients, which are the same at a sum and at what is added to it."""
        layers = [at for at in range(self.model.cfg.n_layers) if self._has("mlp_out", at)]
        both = [at for at in layers if self._has("resid_post", at)]
        return bool(both) and all(
            torch.equal(self["mlp_out", at], self["resid_post", at]) for at in both
        )

    def _has(self, name: str, layer: int) -> bool:
        return f"{self.model.layer_name(layer)}.hook_{name}" in self.cache_dict


def _slice(given: Any) -> Slice:
    return given if isinstance(given, Slice) else Slice(given)


def _sliced(x: Tensor, pos_slice: Any) -> Tensor:
    return _slice(pos_slice).apply(x, dim=-2)


def _per_output(norm: HeldNorm) -> HeldNorm:
    """The same for directions [..., pos, output, d_model]."""
    return HeldNorm(norm.norm, norm.scale.unsqueeze(-2))


def _refusing(name: str) -> Any:
    def method(self: TSTActivationCache, *args: Any, **kwargs: Any) -> Any:
        raise ArgumentError(
            f"{name} is about state-space layers, and every layer of this model is attention and "
            "an MLP; attention is in cache['pattern', layer]"
        )

    method.__name__, method.__doc__ = name, "Refused: these models have no state-space layers."
    return method


for _name in dir(ActivationCache):
    if "ssm" in _name and not _name.startswith("_"):
        setattr(TSTActivationCache, _name, _refusing(_name))
