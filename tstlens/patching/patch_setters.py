"""The patch setters of ``transformer_lens.patching``, with their names and results.

A setter puts the entries that an index stands for from a clean activation into a corrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tstlens.arguments import shown
from tstlens.errors import ArgumentError
from tstlens.patching.sites import AXIS_ALIASES


class PatchSetter:
    """One of TransformerLens' patch setters: which entries of an activation an index stands for.

    Args:
        name: the setter's name.
        index_axis_names: what an index holds, in this order.
        activation_axes: the activation's first axes after the rows.
    """

    def __init__(
        self, name: str, index_axis_names: tuple[str, ...], activation_axes: tuple[str, ...]
    ) -> None:
        self.__name__ = name
        self.index_axis_names, self.activation_axes = index_axis_names, activation_axes
        self.__doc__ = (
            f"Patch the entries at [{', '.join(index_axis_names)}] of an activation "
            f"[row, {', '.join(activation_axes)}, ...], in place; returns the activation."
        )

    def __repr__(self) -> str:
        return f"<function {self.__name__}>"

    def __call__(
        self, corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
    ) -> Tensor:
        """Patch.

        Args:
            corrupted_activation: [row, ...], changed in place.
            index: the layer and the entries.
            clean_activation: [row, ...].

        Returns:
            The corrupted activation.

        Raises:
            ArgumentError: an index of another length.
        """
        if len(index) != len(self.index_axis_names):
            raise ArgumentError(
                f"{self.__name__} takes an index ({', '.join(self.index_axis_names)}), got "
                f"{shown(list(index))}"
            )
        entries = dict(zip(map(_axis, self.index_axis_names), index, strict=True))
        at = (slice(None), *(entries.get(axis, slice(None)) for axis in self.activation_axes))
        corrupted_activation[at] = clean_activation[at]
        return corrupted_activation

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise :class:`ArgumentError` unless these name what an index holds, in its order."""
        expected, given = (list(map(_axis, axes)) for axes in (self.index_axis_names, names))
        if "query" in self.activation_axes:
            given = ["query" if axis == "pos" else axis for axis in given]
        if given != expected:
            raise ArgumentError(
                f"{self.__name__} takes ({', '.join(self.index_axis_names)}) in this order, got "
                f"({', '.join(names)})"
            )


def _axis(name: str) -> str:
    return AXIS_ALIASES.get(name, name)


_PER_QUERY = ("head", "query", "key")
layer_pos_patch_setter = PatchSetter("layer_pos_patch_setter", ("layer", "pos"), ("pos",))
layer_pos_head_vector_patch_setter = PatchSetter(
    "layer_pos_head_vector_patch_setter", ("layer", "pos", "head_index"), ("pos", "head")
)
layer_head_vector_patch_setter = PatchSetter(
    "layer_head_vector_patch_setter", ("layer", "head_index"), ("pos", "head")
)
layer_head_pattern_patch_setter = PatchSetter(
    "layer_head_pattern_patch_setter", ("layer", "head_index"), _PER_QUERY
)
layer_head_pos_pattern_patch_setter = PatchSetter(
    "layer_head_pos_pattern_patch_setter", ("layer", "head_index", "dest_pos"), _PER_QUERY
)
layer_head_dest_src_pos_pattern_patch_setter = PatchSetter(
    "layer_head_dest_src_pos_pattern_patch_setter",
    ("layer", "head_index", "dest_pos", "src_pos"),
    _PER_QUERY,
)
