"""Hooks that are checked when they are asked for, not silently ignored.

TransformerLens raises a bare KeyError for an unknown hook name and accepts one that can never
fire. Here the first names the closest hook point and the second says why it cannot fire.

Models that run every series twice, as it is and mirrored (TimesFM 2.5, ``both_signs``).

Both passes are rows of one run. What only computes on activations takes both, as a dictionary that
is spliced in meets both: streams, training and scores of SAEs and codebooks, patching. What says
where in a series an activation comes from, what it is of, or which way it moves the output refuses
such a model: a mirrored row is of no stretch of the series as given, and its share of the forecast
counts with its sign turned back, so that an edit of both passes works against itself.

One thread at a time: hooks belong to the model, so a run sees those of every other thread.

A run, an analysis, hooks put on for a while and dictionaries spliced in for a while each take the
model's turn. Other threads wait: long for a thread that is running the model, shortly for one that
only keeps hooks on it, and then they are told.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any, Literal, TypeVar, cast

from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from tstlens.arguments import check_gradients, check_slice, checked, shown
from tstlens.data.validate import usable_device
from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.points import Point, pos_axis, real_name, why_absent

Method = TypeVar("Method", bound=Callable[..., Any])


class Turn:
    """The turn of a model: ``with turn`` while something runs; re-entrant in its own thread.

    A copy, or what a pickle gives, is a turn of its own that nobody has.
    """

    idle_s, busy_s = 5.0, 600.0  # without a sign of life of the other thread

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder, self._busy, self._signs = "", 0, 0

    def __enter__(self) -> None:
        self._take()
        self._busy += 1

    def __exit__(self, *_: object) -> None:
        self._busy -= 1
        self._give()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the turn while the caller's own code goes on, which may never come to an end."""
        self._take()
        try:
            yield
        finally:
            self._give()

    def _take(self) -> None:
        if not self._lock.acquire(blocking=False):
            waited, seen = 0.0, self._signs
            while not self._lock.acquire(timeout=self.idle_s):
                waited = waited + self.idle_s if self._signs == seen else 0.0
                seen = self._signs
                if waited >= (self.busy_s if self._busy else self.idle_s):
                    raise HookError(
                        f"thread {self._holder!r} has hooks or dictionaries on this model, or is "
                        "running it, and has made no step for "
                        f"{waited:.0f} s; this thread would see its edits. Leave the `with` there "
                        "first, or give every thread a model of its own: copy.deepcopy(model)"
                    )
        self._holder = threading.current_thread().name
        self._signs += 1

    def _give(self) -> None:
        self._signs += 1
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()


def in_turn(method: Method) -> Method:
    """The method of a model, run while no other thread has hooks on it or runs it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return method(self, *args, **kwargs)

    return cast(Method, call)


class CheckedHooks(HookedRootModule):
    """A ``HookedRootModule`` whose hook requests are checked."""

    cfg: Any
    layer_of: Callable[[str], int | None]
    crosses: Callable[[str], bool]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._turn = Turn()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with self._turn:  # or another thread's hooks would be copied, for good
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @checked
    def set_use_fused(self, use_fused: bool) -> None:
        """False computes every hook point in every run, watched or not.

        Unwatched attention and norms otherwise run through fused kernels, whose rounding differs
        (about 1e-6 in float32): with False ``model(x)`` and ``model.run_with_cache(x)[0]`` agree
        bit for bit. It is slower.
        """
        self.cfg.use_fused = use_fused

    @checked
    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Fire ``attn.hook_result``, one vector per head and position."""
        self.cfg.use_attn_result = use_attn_result

    @checked
    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Fire ``hook_q_input``, ``hook_k_input`` and ``hook_v_input``, one copy per head."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    @checked
    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Fire ``hook_mlp_in``, the stream as the MLP reads it, before its norm."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    @checked
    def set_use_attn_mlp_sum(self, use_attn_mlp_sum: bool) -> None:
        """Fire ``hook_attn_mlp_sum``, all that a block of a pre-norm model adds to the stream."""
        self.cfg.use_attn_mlp_sum = use_attn_mlp_sum

    @checked
    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Refused: TransformerLens' ``hook_attn_in`` is not here; its three parts are.

        Raises:
            ArgumentError: True, with what to set instead.
        """
        if use_attn_in:
            raise ArgumentError(
                "there is no hook_attn_in here; model.set_use_split_qkv_input(True) gives every "
                "head's hook_q_input, hook_k_input and hook_v_input: edit the three alike"
            )

    @checked
    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Refused: no model here groups its queries, so every head has keys and values of its own.

        Raises:
            ArgumentError: True, which would change nothing.
        """
        if ungroup_grouped_query_attention:
            raise ArgumentError(
                "nothing to ungroup: in these models every head has keys and values of its own; "
                "leave set_ungroup_grouped_query_attention out"
            )

    def point(self, name: str) -> Point:
        """What a hook point is in this model: its axes, sizes and layer, and where runs stop.

        Args:
            name: as in ``hook_dict``, or in TransformerLens 4's words (``blocks.0.hook_in``).

        Raises:
            UnknownHookError: there is no such hook point.

        Example:
            >>> from tstlens import HookedTST
            >>> point = HookedTST.from_pretrained("japanese-vowels").point("blocks.1.attn.hook_z")
            >>> point.axes, point.feature_shape, point.layer, point.stop
            (('pos', 'head', 'feature'), (8, 16), 1, 2)
        """
        silent = self.why_silent(name)
        return self._described(real_name(name, self.hook_dict), silent)

    def why_silent(self, name: str) -> str | None:
        """Why a hook point cannot fire as the model is set, or None if it can.

        Raises:
            UnknownHookError: there is no such hook point.
        """
        name = real_name(name, self.hook_dict)
        if name not in self.hook_dict:
            raise UnknownHookError(name, self.hook_dict, self._why_absent(name))
        needs = self._needs(name)
        if needs is not None and not getattr(self.cfg, needs):
            return f"{name} only fires with model.set_{needs}(True)"
        return None

    def _needs(self, name: str) -> str | None:
        return getattr(self.hook_dict[name], "needs", None)

    def require_live(
        self, names: Any, start: int | None = None, stop: int | None = None
    ) -> list[str]:
        """The hook points that were asked for, all of which can fire; in such a run, if one is.

        Args:
            names: a name, a predicate of names, several of these, or None for all that can fire.
            start: the layer that the run starts at; None starts with the series.
            stop: the layer that the run stops before; None runs through the head.

        Raises:
            UnknownHookError: no such hook point, or none that a predicate accepts.
            HookError: a named hook point, or all that a predicate accepts, would never fire.
        """
        if names is None:
            return [name for name in self.hook_dict if self.why_silent(name) is None]
        if not isinstance(names, str) and not callable(names):
            if not isinstance(names, Iterable):
                raise ArgumentError(
                    "expected names_filter as a hook name, a list of them, a predicate or None, "
                    f"got {shown(names)}"
                )
            return [point for name in names for point in self._live(name, start, stop)]
        return self._live(names, start, stop)

    def _live(self, name: Any, start: int | None, stop: int | None) -> list[str]:
        if isinstance(name, str):
            accepted = [real_name(name, self.hook_dict)]
        else:
            if not callable(name):
                raise UnknownHookError(name, (), "A hook goes by its name, or a predicate")
            accepted = [point for point in self.hook_dict if name(point)]
            if not accepted:
                raise UnknownHookError(
                    getattr(name, "__name__", type(name).__name__),
                    (),
                    f"This predicate accepts none of the {len(self.hook_dict)} hook points, "
                    f"{next(iter(self.hook_dict))!r} and so on; model.hook_dict lists them all",
                )
        silent = {point: self.why_silent(point) for point in accepted}
        reasons = {point: why or self._outside(point, start, stop) for point, why in silent.items()}
        if all(reasons.values()):
            raise HookError(f"{reasons[accepted[0]]}; as things are the hook would never fire")
        return [point for point, why in silent.items() if why is None]

    @checked
    def add_hook(
        self,
        name: Any,
        hook: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """As TransformerLens', with unknown and silent hook points refused.

        A predicate is asked about hook points that can fire as the model is set.
        """
        if not callable(hook):
            raise ArgumentError(f"expected hook as a function of (activation, hook), got {hook!r}")
        for point in self.require_live([name]):
            super().add_hook(point, hook, dir, is_permanent, level, prepend)

    @checked
    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """As TransformerLens'; waits for other threads' runs, whose hooks these may be."""
        super().reset_hooks(*args, **kwargs)

    @checked
    @contextmanager
    def hooks(  # type: ignore[override]
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Any:
        """As TransformerLens', with unknown and silent hook points refused before any is added.

        Other threads cannot run the model meanwhile; see :mod:`tstlens.model.hooking`.
        """
        with self._turn.held():
            forward, backward = (  # by name, so that predicates reach live points only
                [(point, hook) for name, hook in pairs for point in self.require_live([name])]
                for pairs in (_pairs(fwd_hooks), _pairs(bwd_hooks))
            )
            added: Any = (forward, backward, reset_hooks_end, clear_contexts)
            with super().hooks(*added):
                yield self

    @checked
    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As TransformerLens', with hooks in layers that do not run refused too."""
        forward, backward = _pairs(fwd_hooks), _pairs(bwd_hooks)
        self._require_run(kwargs, [name for name, _ in (*forward, *backward)])
        return super().run_with_hooks(
            *model_args,
            fwd_hooks=forward,
            bwd_hooks=backward,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
            **kwargs,
        )

    @checked
    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: Any = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As TransformerLens', with names that would stay empty refused."""
        if names_filter is not None:
            names_filter = self._require_run(kwargs, names_filter)
        if incl_bwd:
            check_gradients("incl_bwd=True", self, *model_args)
        try:
            return super().run_with_cache(
                *model_args,
                names_filter=names_filter,
                device=device,
                remove_batch_dim=remove_batch_dim,
                incl_bwd=incl_bwd,
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                pos_slice=_positions(pos_slice),
                **kwargs,
            )
        except RuntimeError as error:
            if incl_bwd and "scalar outputs" in str(error):
                raise ArgumentError(
                    "incl_bwd=True needs one number to differentiate, got an output of many; "
                    "give return_type='loss' and target="
                ) from error
            if incl_bwd and "does not require grad" in str(error):
                raise ArgumentError(
                    "incl_bwd=True needs gradients, and none are recorded here: leave "
                    "torch.no_grad(), and let the series or the weights require them"
                ) from error
            raise

    @checked
    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Any] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Any], list[Any], list[Any]]:
        """As TransformerLens'; a predicate (or None) is asked about live hook points only.

        ``pos_slice`` cuts what has positions: the series, the front end's own activations and
        the pooled vector are cached whole.
        """
        wanted = self.require_live(names_filter)
        saved: dict[str, Any] = {} if cache is None else cache
        positions = _positions(pos_slice)
        device = None if device is None else usable_device(device)
        self.is_caching = True

        def save(activation: Tensor, hook: HookPoint, ending: str) -> None:
            name, kept = str(hook.name), activation.detach().to(device)
            axis = pos_axis(name, self._layout(name))
            if axis is not None and positions.mode != "identity":
                if positions.mode == "slice":
                    check_slice(positions.slice, kept.shape[axis], "pos_slice")  # type: ignore[arg-type]
                try:
                    kept = positions.apply(kept, dim=axis)
                except IndexError as error:
                    raise ArgumentError(
                        f"pos_slice={pos_slice!r} lies outside the {kept.shape[axis]} positions "
                        f"of {name}"
                    ) from error
            saved[name + ending] = kept[0] if remove_batch_dim else kept

        fwd_hooks = [(name, partial(save, ending="")) for name in wanted]
        bwd_hooks = [(name, partial(save, ending="_grad")) for name in wanted if incl_bwd]
        return saved, fwd_hooks, bwd_hooks

    @checked
    def add_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Any] | None = None,
    ) -> Any:
        """As TransformerLens', with unknown and silent names refused."""
        names = self.require_live(names_filter)
        device = None if device is None else usable_device(device)
        return super().add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)

    def _require_run(self, kwargs: dict[str, Any], names: Any) -> list[str]:
        start, stop = kwargs.get("start_at_layer"), kwargs.get("stop_at_layer")
        first, last = self._layer_range(start, stop)
        return self.require_live(
            names, None if start is None else first, None if stop is None else last
        )

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        return start or 0, self.cfg.n_layers if stop is None else stop

    def _outside(self, name: str, start: int | None, stop: int | None) -> str | None:
        first, last = start or 0, self.cfg.n_layers if stop is None else stop
        ran = f"only layers {first}..{last - 1} run" if first < last else "no layer runs"
        layer, after = self._span(name)
        if layer is None:
            before = f"{name} comes before the trunk, and start_at_layer={start} begins after it"
            return None if start is None else before
        if after is None:
            beyond = f"{name} comes after the trunk, and stop_at_layer={stop} ends before it"
            return None if stop is None else beyond
        if first <= layer < last:
            return None
        if self.crosses(name):
            return f"{name} belongs to layer {layer}, the decoder's first, and {ran}"
        return f"{name} is in layer {layer}, and {ran}"

    def _span(self, name: str) -> tuple[int | None, int | None]:
        """:attr:`Point.start` and :attr:`Point.stop`."""
        layer = self.cfg.n_encoder_layers if self.crosses(name) else self.layer_of(name)
        if layer is not None:
            return layer, layer + 1
        after = name.split(".")[0] in ("head", "ln_final", "decoder_final_ln")
        return (self.cfg.n_layers, None) if after else (None, 0)

    def _layout(self, name: str) -> tuple[str, ...]:
        return getattr(self.hook_dict[name], "layout", ())

    def _described(self, name: str, silent: str | None = None) -> Point:
        cfg = self.cfg
        sizes = {word: getattr(cfg, word) for word in ("d_model", "d_mlp", "d_head")}
        start, stop = self._span(name)
        return Point(
            name,
            self._layout(name),
            {"head": cfg.n_heads, **sizes},
            self.layer_of(name),
            start,
            stop,
            silent,
        )

    def _why_absent(self, name: str) -> str:
        return why_absent(name, bool(self.cfg.n_decoder_layers))


def _positions(pos_slice: Any) -> Slice:
    """What ``pos_slice`` selects; TransformerLens would take floats, and True for position 1."""
    if pos_slice is None or isinstance(pos_slice, Slice):
        return Slice.unwrap(pos_slice)
    ends = isinstance(pos_slice, slice | tuple)  # start, stop and step, any of them None
    entries: Any = pos_slice.tolist() if hasattr(pos_slice, "tolist") else pos_slice
    if isinstance(pos_slice, slice):
        entries = (pos_slice.start, pos_slice.stop, pos_slice.step)
    entries = entries if isinstance(entries, list | tuple) else [entries]
    fits = [
        (isinstance(entry, Integral) and not isinstance(entry, bool)) or (ends and entry is None)
        for entry in entries
    ]
    step = entries[2] if ends and len(entries) == 3 else None
    too_many = ends and len(entries) > 3
    if not fits or not all(fits) or too_many or (step is not None and step < 1):
        raise ArgumentError(
            "expected pos_slice as a position, a slice of step 1 or more, positions (integers, "
            f"one at least) or None, got {shown(pos_slice)}"
        )
    selected: Any = pos_slice if ends else [int(entry) for entry in entries]
    return Slice(selected)


def _pairs(hooks: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """What was given as hooks, as a list of (name or predicate, function) pairs."""
    several = isinstance(hooks, Iterable) and not isinstance(hooks, str)
    pairs: list[Any] = list(hooks) if several else [hooks]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not callable(pair[1]):
            raise ArgumentError(
                f"expected hooks as a list of (hook name, function) pairs, got {hooks!r:.200}"
            )
    return [(name, function) for name, function in pairs]


def require_one_pass(model: Any, what: str) -> None:
    """Raise :class:`ArgumentError` for a model whose rows hold mirrored series too.

    Args:
        model: the model.
        what: what cannot be done, such as "to read its features".
    """
    if model.cfg.n_passes > 1:
        raise ArgumentError(
            "this model's trunk holds every channel and its mirror image, and an activation of the "
            "mirror image has no place in the series as given: convert the source with "
            f"both_signs=False {what}. Its first pass and weights are the same, so SAEs and "
            "codebooks of one model fit the other"
        )
