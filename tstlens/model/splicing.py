"""Dictionaries spliced in at hook points: sparse autoencoders, transcoders, codebooks.

A spliced dictionary stands where a hook point was: the activation goes in, its reconstruction goes
on. The hook point's name is replaced by those of the dictionary, as in sae-lens'
``HookedSAETransformer``: ``blocks.0.hook_mlp_out.hook_sae_acts_post`` and so on. With the error
term what the dictionary misses is added back, so the output stays as it was until a hook changes a
latent. Any module with ``encode`` and ``decode`` can be spliced in; nothing here needs sae-lens.

Spliced dictionaries belong to ``model.splices``: ``to``, ``train``, ``parameters`` and
``state_dict`` reach them. ``save_pretrained`` keeps them apart from the model's own weights.

What stands at a hook point while a dictionary is spliced in there.

Which hook points a dictionary can stand at, and how wide it has to be there.

sae-lens' methods for dictionaries: added, put in for a while, run with.

The names, arguments and meaning are those of sae-lens' ``HookedSAETransformer``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens import storage
from tstlens.arguments import checked, warn
from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.model.hooking import CheckedHooks
from tstlens.model.norms import listened_to
from tstlens.model.state import TrunkState
from tstlens.points import Hook, Point, select

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Watched:
    """What a codebook did in the last run.

    Args:
        snap: of ``tstlens.codebooks``: what it read, the k-hot vector and the output, in the graph.
        keep: bool, one per activation, False at padding and where the codebook is bypassed; None
            where all count.
    """

    snap: Any
    keep: Tensor | None


class Splice(nn.Module):
    """Puts a dictionary's reconstruction in the place of an activation.

    The dictionary is no child of this module (it belongs to ``model.splices``), but its hook points
    are, so that they are named after the place.

    Args:
        dictionary: with ``encode`` and ``decode``.
        reads: the hook point whose activation is encoded.
        writes: the hook point whose activation is replaced.
        replaced: what stood there.
        use_error_term: add back what the dictionary misses.
        bypass: positions that keep the activation.
        head: the one head that is replaced; None for all.
    """

    dictionary: Any
    replaced: Any
    hook_sae_error: HookPoint
    hook_sae_output: HookPoint

    def __init__(
        self,
        dictionary: nn.Module,
        reads: str,
        writes: str,
        replaced: nn.Module,
        use_error_term: bool,
        bypass: tuple[int, ...],
        head: int | None,
    ) -> None:
        super().__init__()
        self.__dict__["dictionary"] = dictionary
        self.__dict__["replaced"] = replaced
        self.__dict__["cfg_of_model"] = replaced.__dict__.get("cfg_of_model")
        self.reads, self.writes = reads, writes
        self.use_error_term, self.bypass, self.head = use_error_term, bypass, head
        self.readers: list[Callable[[Tensor], None]] = []
        self.on = True
        self.pos_mask: Tensor | None = None  # of the run that goes on, told by the model
        self.watched: dict[str, Watched] | None = None
        self._taken: Tensor | None = None
        for name, child in dictionary.named_children():
            if isinstance(child, HookPoint):
                setattr(self, name, child)
        for name in ("hook_sae_error", "hook_sae_output"):
            if not hasattr(self, name):
                setattr(self, name, HookPoint())

    def switch(self, on: bool) -> None:
        """Let the dictionary replace the activation, or let the activation pass as it is."""
        self.on = on
        self.mark(on)

    def mark(self, spliced: bool) -> None:
        """Make fast paths that ask whether anybody listens count the dictionary as somebody."""
        points = [point for point in self.children() if isinstance(point, HookPoint)]
        for module in (self, *points):
            if spliced:
                module.__dict__["intercepts"] = True
            else:
                module.__dict__.pop("intercepts", None)

    def joins_heads(self, d_head: int) -> bool:
        """Whether a dictionary at q, k, v or z reads all heads as one vector."""
        width = getattr(getattr(self.dictionary, "cfg", None), "d_in", d_head)
        return self.head is None and width != d_head

    def take(self, activation: Tensor) -> None:
        """The activation that a transcoder reads, kept until the place that it writes is run."""
        self._taken = activation

    def forget(self) -> None:
        """Forget what a run has left here."""
        self._taken = self.pos_mask = None

    def forward(self, activation: Tensor) -> Tensor:
        try:
            replaced = self._reconstruct(activation) if self.on else activation
        finally:
            self._taken = None
        for reader in self.readers:
            reader(replaced)
        return replaced

    def _reconstruct(self, activation: Tensor) -> Tensor:
        original = activation if self.head is None else activation[..., self.head, :]
        given = self._input(original)
        keep = self._bypassed(original)
        result = self._decode(given, keep).to(original.dtype).view(original.shape)
        if self.use_error_term:
            with torch.no_grad():
                clean = result
                if any(listened_to_by_hooks(point) for point in self._points()):
                    with self._without_hooks(), self._unwatched():
                        clean = self._decode(given).to(original.dtype).view(original.shape)
                error = original - clean
                if keep is not None:
                    error = error.masked_fill(keep, 0.0)
            result = result + self.hook_sae_error(error)
        if keep is not None:
            result = torch.where(keep, original, result)
        result = self.hook_sae_output(result)
        if self.head is None:
            return result
        whole = activation.clone()
        whole[..., self.head, :] = result
        return whole

    def _input(self, original: Tensor) -> Tensor:
        given = original
        if self.reads != self.writes:
            if self._taken is None:
                raise HookError(
                    f"{self.writes} is to be written from {self.reads}, which did not run before "
                    "it; start the run earlier, or check the order of the two"
                )
            given = self._taken if self.head is None else self._taken[..., self.head, :]
        width = getattr(getattr(self.dictionary, "cfg", None), "d_in", None)
        if width is None or given.shape[-1] == width:
            return given
        if given.ndim == 4 and given.shape[-2] * given.shape[-1] == width:
            # sae-lens joins heads itself, but only for z and only outside of training.
            reshapes = getattr(self.dictionary, "hook_z_reshaping_mode", False)
            return given if reshapes else given.flatten(-2)
        raise ArgumentError(
            f"expected activations of width {width} at {self.reads} for the dictionary, got "
            f"{list(given.shape)}"
        )

    def _decode(self, given: Tensor, bypassed: Tensor | None = None) -> Tensor:
        dictionary: Any = self.dictionary
        trace = getattr(dictionary, "trace", None)
        if trace is not None:  # a codebook, whose gradient needs what was encoded
            snap = trace(given)
            if self.watched is not None:
                keep = self._kept(snap.given.shape[:-2], bypassed)
                self.watched[self.reads] = Watched(snap, keep)
            return snap.output
        decoded = dictionary.decode(dictionary.encode(given))
        skip = getattr(dictionary, "W_skip", None)  # of transcoders, whose decode leaves it out
        return decoded if skip is None else decoded + given @ skip.T

    def _kept(self, places: torch.Size, bypassed: Tensor | None) -> Tensor | None:
        """bool [row, pos, ...], False at padding and where the dictionary is bypassed."""
        masks = [] if bypassed is None else [~bypassed.flatten(2)[..., 0]]
        if self.pos_mask is not None and places[:2] == self.pos_mask.shape:
            masks.append(self.pos_mask)
        if not masks or len(places) < 2:
            return None
        keep = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        return keep.view(*keep.shape, *(1,) * (len(places) - 2)).expand(places)

    def _bypassed(self, original: Tensor) -> Tensor | None:
        """bool, broadcast over the activation, True at positions that keep it."""
        if not self.bypass:
            return None
        if original.ndim < 3:
            raise ArgumentError(f"{self.writes} has no positions that could bypass a dictionary")
        n_pos = original.shape[1]
        keep = torch.zeros(n_pos, dtype=torch.bool, device=original.device)
        keep[select(self.bypass, n_pos, "positions to leave alone")] = True
        return keep.view(1, n_pos, *(1,) * (original.ndim - 2))

    def _points(self) -> Iterator[HookPoint]:
        return (point for point in self.dictionary.modules() if isinstance(point, HookPoint))

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        watched, self.watched = self.watched, None
        try:
            yield
        finally:
            self.watched = watched

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        held = [(point, [getattr(point, name) for name in _HOOKS]) for point in self._points()]
        try:
            for point, _ in held:
                for name in _HOOKS:
                    setattr(point, name, OrderedDict())
            yield
        finally:
            for point, hooks in held:
                for name, value in zip(_HOOKS, hooks, strict=True):
                    setattr(point, name, value)


def listened_to_by_hooks(point: HookPoint) -> bool:
    """Whether a hook sits on a point, whatever is spliced in there."""
    return any(getattr(point, name) for name in _HOOKS)


def joined_width(point: Point) -> int | None:
    """Entries of an activation at every position, heads joined; None where it is not known."""
    n_heads = point.n_heads if point.joins else None
    return point.width if point.width is None else point.width * (n_heads or 1)


def check_width(point: Point, dictionary: Any, head: int | None = None, out: bool = False) -> None:
    """Raise unless a dictionary's sizes fit a hook point.

    Args:
        point: the hook point.
        dictionary: the dictionary's config, or None.
        head: the one head that is meant.
        out: what the dictionary writes instead of what it reads.
    """
    point.require_features()
    width = getattr(dictionary, "d_in", None)
    width = getattr(dictionary, "d_out", width) if out else width
    if head is not None and point.n_heads is None:
        raise ArgumentError(f"head={head} was given, but {point.name} has no heads")
    if point.width is None or width is None:
        return
    fitting = {point.width: f"{point.layout[-1]}={point.width}"}
    n_heads = (point.n_heads or 1) if point.joins else 1
    total = point.width * n_heads
    if point.joins and head is None:
        fitting[total] = f"all heads={total}"
    if width not in fitting:
        raise ArgumentError(
            f"expected a dictionary of width {' or '.join(fitting.values())} at {point.name}, got "
            f"{'d_out' if out else 'd_in'}={width}; was it trained on another model or hook point?"
        )
    groups = getattr(dictionary, "n_groups", 1)
    if width == total and n_heads > 1 and groups > 1 and groups % n_heads:
        raise ArgumentError(
            f"expected n_groups=1, or a multiple of n_heads={n_heads} so that no group holds parts "
            f"of two heads at {point.name}, got n_groups={groups}"
        )


_NO_PRE = ("matching_pursuit",)


def _architecture(dictionary: nn.Module) -> str | None:
    named = getattr(getattr(dictionary, "cfg", None), "architecture", None)
    return str(named()) if callable(named) else None


class SplicedDictionaries(CheckedHooks):
    """A hooked model that dictionaries can be spliced into, with sae-lens' method names."""

    cfg: Any
    processing: tuple[str, ...]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pos_mask: Tensor | None = None  # of the run that goes on
        self._spliced: dict[str, Splice] = {}  # by the hook point that each reads
        self.splices = nn.ModuleDict()

    def setup(self) -> None:
        """As TransformerLens'; a dictionary's hook points are named after where it is spliced."""
        # Last, so that the points of a dictionary get the names of where it stands.
        self._modules["splices"] = self._modules.pop("splices")
        super().setup()
        for name in [name for name in self.hook_dict if name.startswith("splices.")]:
            key, rest = name.removeprefix("splices.").split(".", 1)
            point = self.hook_dict.pop(name)
            point.name = f"{self._spliced[key.replace('/', '.')].writes}.{rest}"
            self.hook_dict[point.name] = self.mod_dict[point.name] = point

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; what a transcoder read in a run that stopped early is forgotten."""
        with self._turn:
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.pos_mask = None
                for splice in self._spliced.values():
                    splice.forget()

    @property
    def acts_to_saes(self) -> dict[str, Any]:
        """The spliced dictionaries by the hook point that each reads."""
        return {name: splice.dictionary for name, splice in self._spliced.items()}

    def point(self, name: str) -> Point:
        """See :meth:`CheckedHooks.point`; also of a place where a dictionary stands."""
        stands = self.splice_at(name) is not None
        return self._described(name, self._why_absent(name)) if stands else super().point(name)

    def _layout(self, name: str) -> tuple[str, ...]:
        """That of the place where a dictionary stands, and of its own hook points there."""
        writes, _, leaf = name.rpartition(".")
        own = self.splice_at(writes)
        if own is None:
            here = self.splice_at(name)
            point: Any = self.hook_dict[name] if here is None else here.replaced
            return getattr(point, "layout", ())
        at_output = leaf in ("hook_sae_error", "hook_sae_output")
        layout = self._layout(writes if at_output else own.reads)
        if own.head is not None or (own.joins_heads(self.cfg.d_head) and not at_output):
            layout = tuple(axis for axis in layout if axis != "head")
        return layout if at_output or not layout else (*layout[:-1], "latent")

    def _needs(self, name: str) -> str | None:
        splice = self.splice_at(name.rpartition(".")[0])
        return super()._needs(name) if splice is None else getattr(splice.replaced, "needs", None)

    def splice_at(self, hook_name: str) -> Splice | None:
        """What stands at a hook point, or None where it is as it was."""
        found = [splice for splice in self._spliced.values() if splice.writes == hook_name]
        return found[0] if found else None

    @checked
    def splice(
        self,
        dictionary: nn.Module,
        hook_name: str,
        hook_name_out: str | None = None,
        *,
        use_error_term: bool = False,
        bypass: Sequence[int] = (),
        head: int | None = None,
    ) -> None:
        """Splice any module with ``encode`` and ``decode`` in at a hook point; it stays there.

        Args:
            dictionary: ``decode(encode(x))`` reconstructs the activation along its last axis. At
                q, k, v and z a dictionary of d_head reads every head by itself, one of
                n_heads * d_head all of them joined.
            hook_name: the hook point to read.
            hook_name_out: the hook point to replace; None for the same.
            use_error_term: add back what the dictionary misses.
            bypass: positions that keep the activation as it is; negative counts from the end.
            head: at q, k, v and z, the one head to reconstruct; None for all.

        A dictionary whose metadata say that it was trained on weights processed otherwise (see
        ``HookedTST.process_weights_``) is spliced in with a warning.
        """
        out = hook_name_out or hook_name
        for method in ("encode", "decode"):
            if not callable(getattr(dictionary, method, None)):
                raise ArgumentError(
                    f"expected a dictionary with encode and decode, got a "
                    f"{type(dictionary).__name__} without {method}"
                )
        for name, splice in self._spliced.items():
            if splice.dictionary is dictionary and name != hook_name:
                raise HookError(
                    f"this dictionary is spliced in at {name} already, and its hook points have "
                    "one name each; splice copy.deepcopy(dictionary), or reset_saes() first"
                )
        before = dict(self._spliced)
        if hook_name in self._spliced:
            self._take_out(hook_name)
        try:
            self._check(dictionary, hook_name, out, head)
            replaced = self.hook_dict[out]
            splice = Splice(
                dictionary, hook_name, out, replaced, use_error_term, tuple(bypass), head
            )
            self._put_in(splice)
        except BaseException:
            self._restore(before)
            raise
        self._compare_processing(dictionary, hook_name)

    def _compare_processing(self, dictionary: nn.Module, hook_name: str) -> None:
        """Say so where a dictionary was trained on weights that were processed otherwise."""
        metadata = getattr(getattr(dictionary, "cfg", None), "metadata", None)
        known = getattr(metadata, "processing", None)
        ours = ("tstlens_version", "tstlens_fit")
        if known is None and any(getattr(metadata, name, None) for name in ours):
            known = ()  # trained before weights could be processed
        if known is not None and set(known) != set(self.processing):
            was, now = (", ".join(words) or "as they were" for words in (known, self.processing))
            warn(
                f"the dictionary at {hook_name} was trained on weights {was}, and this model's are "
                f"{now}: it may read activations that it has not seen; process the model alike "
                "(model.process_weights_, model.processing), or train a dictionary on this one"
            )

    @checked
    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take spliced dictionaries out; the hook points that they replaced come back.

        Args:
            act_names: the hook points that they read; None for all.
        """
        for splice in self._splices_at(act_names):
            self._take_out(splice.reads)

    def require_features(self, name: str) -> None:
        """Raise :class:`HookError` unless a hook point's last axis holds features."""
        self.point(name).require_features()

    def why_silent(self, name: str) -> str | None:
        """Why a hook point cannot fire as the model is set, or None if it can."""
        reason = super().why_silent(name)
        if reason is not None:
            return reason
        place, _, leaf = name.rpartition(".")
        splice = self.splice_at(place)
        if splice is None:
            return None
        if not splice.on:
            return f"{name} is silent while snapping is off: model.set_snapping(True)"
        if leaf == "hook_sae_error" and not splice.use_error_term:
            return f"{name} only fires with use_error_term=True"
        if leaf in getattr(splice.dictionary, "silent_hooks", ()) or (
            leaf == "hook_sae_acts_pre" and _architecture(splice.dictionary) in _NO_PRE
        ):
            return f"{name} never fires: this kind of dictionary has no such activation"
        return None

    @checked
    def set_snapping(self, on: bool, hooks: str | Sequence[str] | None = None) -> None:
        """Switch spliced dictionaries on or off without taking them out.

        Off, the model computes what it does without them, bit for bit.

        Args:
            on: whether activations are replaced.
            hooks: the hook points that they read; None for all.

        Raises:
            UnknownHookError: nothing that reads one of these is spliced in.
        """
        for splice in self._splices_at(hooks):
            splice.switch(on)
        self._rewire()

    @checked
    @contextmanager
    def snapping(self, on: bool, hooks: str | Sequence[str] | None = None) -> Iterator[Any]:
        """As :meth:`set_snapping`, for a while.

        Example:
            ``with model.snapping(False): model(series)``
        """
        with self._turn.held():
            before = [(splice, splice.on) for splice in self._splices_at(hooks)]
            try:
                self.set_snapping(on, hooks)
                yield self
            finally:
                for splice, was in before:
                    splice.switch(was)
                self._rewire()

    def _splices_at(self, hooks: str | Sequence[str] | None) -> list[Splice]:
        names = [hooks] if isinstance(hooks, str) else hooks
        for name in names or ():
            if name not in self._spliced:
                raise UnknownHookError(name, self._spliced, "Nothing that reads it is spliced in")
        return [self._spliced[name] for name in (self._spliced if names is None else names)]

    def _tell_padding(self, state: TrunkState) -> None:
        """Let spliced dictionaries and hooks know which positions of this run hold padding."""
        self.pos_mask = state.pos_mask
        for splice in self._spliced.values():
            splice.pos_mask = state.pos_mask

    def save_spliced(self, folder: Path) -> None:
        """Write every spliced dictionary to ``folder/saes/<hook point it reads>``."""
        for name, splice in self._spliced.items():
            save = getattr(splice.dictionary, "save_model", None)
            if save is None:
                raise ArgumentError(
                    f"the dictionary at {name} is a {type(splice.dictionary).__name__} without "
                    "save_model; take it out with reset_saes() and save it yourself"
                )
            storage.fill(folder / "saes" / name, save)

    def _why_absent(self, name: str) -> str:
        if self.splice_at(name) is not None:
            return (
                f"A dictionary is spliced in there: hook {name}.hook_sae_input or "
                f"{name}.hook_sae_output, or take it out with reset_saes()"
            )
        if ".hook_sae_" in name:
            return "It belongs to a dictionary: splice one in first, model.add_sae(sae)"
        return super()._why_absent(name)

    def _check(self, dictionary: nn.Module, name: str, out: str, head: int | None) -> None:
        read, written = self.point(name), self.point(out)
        self.require_live([p.name for p in (read, written) if self.splice_at(p.name) is None])
        if self.splice_at(out) is not None:
            raise UnknownHookError(out, self.hook_dict, self._why_absent(out))
        if listened_to(self.hook_dict[out]):
            raise HookError(
                f"hooks sit on {out}, which the dictionary replaces, so they would not fire; call "
                f"model.reset_hooks(), or splice first and hook {out}.hook_sae_input"
            )
        cfg = getattr(dictionary, "cfg", None)
        check_width(read, cfg, head)
        if out != name:
            check_width(written, cfg, head, out=True)

    def _put_in(self, splice: Splice) -> None:
        self._spliced[splice.reads] = splice
        self.splices[splice.reads.replace(".", "/")] = splice.dictionary
        splice.switch(splice.on)
        self._set(splice.writes, splice)
        self._rewire()

    def _take_out(self, name: str) -> None:
        splice = self._spliced.pop(name)
        del self.splices[name.replace(".", "/")]
        splice.mark(False)
        self._set(splice.writes, splice.replaced)
        own_setup = getattr(splice.dictionary, "setup", None)
        if callable(own_setup):
            own_setup()  # its hook points get their own names back
        self._rewire()

    @contextmanager
    def _for_a_while(self, restores: bool = True) -> Iterator[None]:
        """What is put in inside the block comes out at its end, and what was there comes back."""
        with self._turn.held():
            before = dict(self._spliced)
            try:
                yield
            finally:
                if restores:
                    self._restore(before)

    def _restore(self, before: dict[str, Splice]) -> None:
        for name in reversed(list(self._spliced)):
            if self._spliced[name] is not before.get(name):
                self._take_out(name)
        for name, splice in before.items():
            if name not in self._spliced:
                self._put_in(splice)
        self._spliced = {name: self._spliced[name] for name in before}
        self.setup()

    def _set(self, name: str, module: nn.Module) -> nn.Module:
        parent, _, leaf = name.rpartition(".")
        above = self.get_submodule(parent)
        for owner in (above, above.dictionary) if isinstance(above, Splice) else (above,):
            setattr(owner, leaf, module)
        return module

    def _rewire(self) -> None:
        """Tell the points that transcoders read whom to pass their activation on to."""
        for module in self.modules():
            if isinstance(module, Splice | Hook) and module.readers:
                module.readers.clear()
                if isinstance(module, Hook):
                    del module.__dict__["intercepts"]
        for splice in self._spliced.values():
            if splice.reads == splice.writes or not splice.on:
                continue
            source: Any = self.get_submodule(splice.reads)
            if not isinstance(source, Splice | Hook):
                source = self._set(splice.reads, Hook.like(source))
            if isinstance(source, Hook):
                source.__dict__["intercepts"] = True
            source.readers.append(splice.take)
        self.setup()

    def _follow_dictionaries(self) -> None:
        """After a move or cast: sae-lens keeps device and dtype beside the weights."""
        for dictionary in self.splices.values():
            first = next(dictionary.parameters(), None)
            if first is not None and hasattr(dictionary, "dtype"):
                dictionary.to(device=first.device, dtype=first.dtype)

    @checked
    def add_sae(
        self,
        sae: nn.Module,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> None:
        """Splice an SAE, a transcoder or a codebook in where its metadata say; it stays there.

        A dictionary that reads the same hook point is replaced.

        Args:
            sae: with ``cfg.metadata.hook_name`` (and ``hook_name_out`` for a transcoder).
            use_error_term: add back what the dictionary misses, so that the output is what it is
                without it. None takes the dictionary's own setting.
            exclude_special_tokens: positions that bypass the dictionary. A series has no special
                tokens, so True is refused where sae-lens would look them up.

        Raises:
            ArgumentError: no hook name, a width that does not fit, or True for special tokens.
            UnknownHookError: the model has no such hook point, or something is spliced in there.
            HookError: the point cannot fire, has no feature axis, or has hooks on it.

        Source: ``HookedSAETransformer.add_sae`` of sae-lens.
        """
        metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
        hook_name = getattr(metadata, "hook_name", None)
        if not hook_name:
            raise ArgumentError(
                "expected a dictionary that knows its hook point, got none in "
                "cfg.metadata.hook_name; set it, or use model.splice(dictionary, hook_name)"
            )
        if use_error_term is None:
            use_error_term = bool(getattr(sae, "use_error_term", False))
        self.splice(
            sae,
            hook_name,
            getattr(metadata, "hook_name_out", None),
            use_error_term=use_error_term,
            bypass=_positions(exclude_special_tokens),
            head=getattr(metadata, "hook_head_index", None),
        )

    @checked
    @contextmanager
    def saes(
        self,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator[Any]:
        """Dictionaries spliced in for a while; what was there before comes back at the end.

        Args:
            saes: one or several, see :meth:`add_sae`.
            reset_saes_end: False leaves them in.
            use_error_term: for all of them; None takes each one's own setting.
            exclude_special_tokens: see :meth:`add_sae`.
        """
        # An SAE of sae-lens can be iterated over, as a relic.
        one = isinstance(saes, nn.Module) and not isinstance(saes, nn.ModuleList)
        given: Any = [saes] if one else saes
        if not isinstance(given, Iterable):
            raise ArgumentError(f"expected one or several SAEs, got {type(saes).__name__}")
        with self._for_a_while(reset_saes_end):
            for sae in given:
                self.add_sae(sae, use_error_term, exclude_special_tokens)
            yield self

    @checked
    def run_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **model_kwargs: Any,
    ) -> Any:
        """The output with dictionaries spliced in for this run; see :meth:`saes`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*model_args, **model_kwargs)

    @checked
    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """``run_with_cache`` with dictionaries spliced in for this run; see :meth:`saes`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_cache(
                *model_args,
                return_cache_object=return_cache_object,
                remove_batch_dim=remove_batch_dim,
                **kwargs,
            )

    @checked
    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        exclude_special_tokens: bool | Sequence[int] = False,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """``run_with_hooks`` with dictionaries spliced in for this run; see :meth:`saes`."""
        with self.saes(saes, reset_saes_end, None, exclude_special_tokens):
            return self.run_with_hooks(
                *model_args,
                fwd_hooks=list(fwd_hooks),
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **model_kwargs,
            )


def _positions(excluded: bool | Sequence[int]) -> Sequence[int]:
    if isinstance(excluded, bool):
        if excluded:
            raise ArgumentError(
                "exclude_special_tokens=True looks special tokens up in a tokenizer, and a series "
                "has none; give the positions to leave alone, such as [0]"
            )
        return ()
    return excluded
