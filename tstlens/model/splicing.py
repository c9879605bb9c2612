"""Dictionaries spliced in at hook points: sparse autoencoders, transcoders, codebooks.

A spliced dictionary stands where a hook point was: the activation goes in, its reconstruction goes
on. The hook point's name is replaced by those of the dictionary, as in sae-lens'
``HookedSAETransformer``: ``blocks.0.hook_mlp_out.hook_sae_acts_post`` and so on. With the error
term what the dictionary misses is added back, so the output stays as it was until a hook changes a
latent. Any module with ``encode`` and ``decode`` can be spliced in; nothing here needs sae-lens.

Spliced dictionaries belong to ``model.splices``: ``to``, ``train``, ``parameters`` and
``state_dict`` reach them. ``save_pretrained`` keeps them apart from the model's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

from tstlens import storage
from tstlens.arguments import checked
from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.model.hooking import CheckedHooks
from tstlens.model.norms import listened_to
from tstlens.model.splice import Splice, Tapped
from tstlens.model.splice_places import check_width, require_features
from tstlens.model.state import TrunkState


class SplicedDictionaries(CheckedHooks):
    """A hooked model that dictionaries can be spliced into, with sae-lens' method names."""

    cfg: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
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
                for splice in self._spliced.values():
                    splice.forget()

    @property
    def acts_to_saes(self) -> dict[str, Any]:
        """The spliced dictionaries by the hook point that each reads."""
        return {name: splice.dictionary for name, splice in self._spliced.items()}

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
        require_features(name)

    def why_silent(self, name: str) -> str | None:
        """Why a hook point cannot fire as the model is set, or None if it can."""
        reason = super().why_silent(name)
        if reason is not None:
            return reason
        for splice in self._spliced.values():
            if not name.startswith(splice.writes + "."):
                continue
            if not splice.on:
                return f"{name} is silent while snapping is off: model.set_snapping(True)"
            leaf = name.removeprefix(splice.writes + ".")
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
        """Let spliced dictionaries know which positions of this run hold padding."""
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

    def _missing_advice(self, name: str) -> str:
        for splice in self._spliced.values():
            if name == splice.writes:
                return (
                    f"A dictionary is spliced in there: hook {name}.hook_sae_input or "
                    f"{name}.hook_sae_output, or take it out with reset_saes()"
                )
        if ".hook_sae_" in name:
            return "It belongs to a dictionary: splice one in first, model.add_sae(sae)"
        return super()._missing_advice(name)

    def _check(self, dictionary: nn.Module, name: str, out: str, head: int | None) -> None:
        known = self._spliced.values()
        if name not in self.hook_dict and not any(splice.writes == name for splice in known):
            raise UnknownHookError(name, self.hook_dict, self._missing_advice(name))
        self.require_live([point for point in (name, out) if point not in self._written()])
        if out in self._written():
            raise UnknownHookError(out, self.hook_dict, self._missing_advice(out))
        if listened_to(self.hook_dict[out]):
            raise HookError(
                f"hooks sit on {out}, which the dictionary replaces, so they would not fire; call "
                f"model.reset_hooks(), or splice first and hook {out}.hook_sae_input"
            )
        cfg = getattr(dictionary, "cfg", None)
        check_width(self.cfg, cfg, name, head)
        if out != name:
            check_width(self.cfg, cfg, out, head, out=True)

    def _written(self) -> set[str]:
        return {splice.writes for splice in self._spliced.values()}

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

    def _restore(self, before: dict[str, Splice]) -> None:
        for name in reversed(list(self._spliced)):
            if self._spliced[name] is not before.get(name):
                self._take_out(name)
        for name, splice in before.items():
            if name not in self._spliced:
                self._put_in(splice)
        self._spliced = {name: self._spliced[name] for name in before}
        self.setup()

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(parent), leaf, module)

    def _rewire(self) -> None:
        """Tell the points that transcoders read whom to pass their activation on to."""
        for module in self.modules():
            if isinstance(module, Splice | Tapped):
                module.listeners.clear()
            if isinstance(module, Tapped):
                module.__class__ = HookPoint  # type: ignore[assignment]
                del module.__dict__["listeners"], module.__dict__["intercepts"]
        for splice in self._spliced.values():
            if splice.reads == splice.writes or not splice.on:
                continue
            source: Any = self.get_submodule(splice.reads)
            if isinstance(source, HookPoint):
                source.__class__ = Tapped
                source.__dict__.setdefault("listeners", [])
                source.__dict__["intercepts"] = True
            source.__dict__["listeners"].append(splice)
        self.setup()

    def _follow_dictionaries(self) -> None:
        """After a move or cast: sae-lens keeps device and dtype beside the weights."""
        for dictionary in self.splices.values():
            first = next(dictionary.parameters(), None)
            if first is not None and hasattr(dictionary, "dtype"):
                dictionary.to(device=first.device, dtype=first.dtype)


_NO_PRE = ("matching_pursuit",)


def _architecture(dictionary: nn.Module) -> str | None:
    named = getattr(getattr(dictionary, "cfg", None), "architecture", None)
    return str(named()) if callable(named) else None
