"""What a codebook is made of."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from sae_lens.saes.sae import SAEConfig, SAEMetadata

from tstlens.arguments import check_fields
from tstlens.data.validate import check_dtype_name, usable_device
from tstlens.errors import ArgumentError

Similarity = Literal["cosine", "inner_product", "euclidean"]
GradientMode = Literal["task", "reconstruction", "both"]


@dataclass
class CodebookConfig(SAEConfig):
    """Sizes and options of a codebook.

    Args:
        d_in: width of the activation. At q, k, v and z: ``n_heads * d_head`` reads all heads,
            with ``n_groups=n_heads`` each by a table of its own; ``d_head`` gives all heads one
            table. 0 is the width of the hook point that it is put at (by ``add_codebooks``).
        d_sae: ``n_groups * n_codes``; follows from the two.
        n_codes: entries of each table.
        k: codes that are active at once in each group; their sum stands for the activation.
        n_groups: equal runs of the activation with a table each. 0 is one per head at q, k, v and
            z, and one elsewhere (by ``add_codebooks``).
        similarity: what the ``k`` codes are the largest of. ``"euclidean"`` is minus the squared
            distance between the activation and ``k`` times the code, as ``k`` of them add up.
        normalize: snap the activation less its mean over its standard deviation (each group by
            itself), and undo both on the way out. Scale and mean of a position then pass the
            codebook by: they are no part of what the codes tell.
        gradient: what trains the table: the gradient of the ``"task"``, that of the
            ``"reconstruction"`` term of :meth:`Codebook.losses`, or ``"both"``. The task's
            gradient always goes on to what lies upstream, as if nothing were spliced in.
        seed: of the table's first entries.
        dtype: of the table.
        device: of the table.
        apply_b_dec_to_input: False: a codebook has no bias.
        normalize_activations: "none": see ``normalize``.
        reshape_activations: "none": the splice joins heads.
        metadata: sae-lens' own, with ``hook_name``.

    Raises:
        ArgumentError: sizes that are not possible together.

    Example:
        >>> from tstlens.codebooks import CodebookConfig
        >>> CodebookConfig(d_in=128, n_codes=64, k=2, n_groups=8).d_sae
        512
    """

    d_in: int = 0
    d_sae: int = 0
    apply_b_dec_to_input: bool = False
    metadata: Any = field(default_factory=SAEMetadata)  # sae-lens first gives it a dict
    n_codes: int = 256
    k: int = 1
    n_groups: int = 1
    similarity: Similarity = "cosine"
    normalize: bool = False
    gradient: GradientMode = "both"
    seed: int = 0

    @classmethod
    def architecture(cls) -> str:
        """sae-lens' name."""
        return "codebook"

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            super().__post_init__()
        except ValueError as error:
            raise ArgumentError(f"sae-lens refuses this configuration: {error}") from error
        check_dtype_name(self.dtype)
        for name, least in (("d_in", 0), ("n_codes", 1), ("k", 1), ("n_groups", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"expected {name} >= {least}, got {getattr(self, name)}")
        for name, known in (("similarity", Similarity), ("gradient", GradientMode)):
            if getattr(self, name) not in get_args(known):
                raise ArgumentError(
                    f"expected {name} to be one of {', '.join(get_args(known))}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.k > self.n_codes:
            raise ArgumentError(f"expected k <= n_codes={self.n_codes}, got k={self.k}")
        for name, only in (
            ("apply_b_dec_to_input", False),
            ("normalize_activations", "none"),
            ("reshape_activations", "none"),
        ):
            if getattr(self, name) != only:
                raise ArgumentError(
                    f"a codebook takes {name}={only!r} only, got {getattr(self, name)!r}"
                )
        if not self.n_groups:
            return
        if self.d_in % self.n_groups:
            raise ArgumentError(
                f"expected n_groups to divide d_in={self.d_in}, got n_groups={self.n_groups}"
            )
        wanted = self.n_groups * self.n_codes
        if self.d_sae not in (0, wanted):
            raise ArgumentError(
                f"expected d_sae = n_groups * n_codes = {wanted}, got {self.d_sae}; leave it out"
            )
        self.d_sae = wanted

    @property
    def d_group(self) -> int:
        """Entries of the activation that one table stands for."""
        return self.d_in // self.n_groups

    def at(self, hook_name: str, width: int, n_heads: int | None) -> CodebookConfig:
        """This config for a hook point: ``d_in`` and ``n_groups`` filled in where they are 0.

        Args:
            hook_name: goes into the metadata.
            width: of the activation, all heads joined.
            n_heads: where the hook point has heads, else None.
        """
        metadata = copy.deepcopy(self.metadata)
        metadata.hook_name = hook_name
        return replace(
            self,
            d_in=self.d_in or width,
            n_groups=self.n_groups or (n_heads or 1 if self.d_in in (0, width) else 1),
            d_sae=0,
            metadata=metadata,
        )

    def build(self) -> Any:
        """A new codebook of this config."""
        usable_device(self.device)
        from tstlens.codebooks.codebook import Codebook

        return Codebook(self)
