"""The codebook: each activation becomes the sum of the k entries of a table most like it.

The encoder is a lookup and gives a k-hot vector, the decoder is the table, so a codebook is a
dictionary as an SAE is, with sae-lens' hook points and file format. Choosing codes has no
derivative; what goes backward is

- to what lies upstream: the gradient at the output, as it is (straight through);
- to the k-hot vector: the gradient of the sum of codes;
- to the similarities: that of the k-hot vector (straight through), which goes no further;
- to the table: what ``cfg.gradient`` says.

What can mislead: with ``normalize`` a position's mean and scale pass the codebook by; and codes
are not comparable across tables, nor across seeds.

Source: Tamkin, Taufeeque, Goodman 2023 (arXiv 2310.17230); straight through: Bengio et al. 2013
(arXiv 1308.3432).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from tstlens.arguments import Amount, Count, Seed, check_fields, checked
from tstlens.data.validate import check_dtype_name, usable_device
from tstlens.errors import ArgumentError, SeriesShapeError

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
        restore: with ``normalize``, put mean and scale back. False is the way of the paper's own
            code: what goes on is the sum of the codes as it is, in normalised units, so that
            nothing passes the codes by. A model that was not trained with it then reads
            activations of another size than it knows, and explained variance, which is of the
            activation, is low or below 0; fit both together (``train_model=True``).
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

    d_in: Amount = 0
    d_sae: int = 0
    apply_b_dec_to_input: bool = False
    metadata: Any = field(default_factory=SAEMetadata)  # sae-lens first gives it a dict
    n_codes: Count = 256
    k: Count = 1
    n_groups: Amount = 1
    similarity: Similarity = "cosine"
    normalize: bool = False
    restore: bool = True
    gradient: GradientMode = "both"
    seed: Seed = 0

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
        if not (self.normalize or self.restore):
            raise ArgumentError("restore=False leaves out what normalize=True takes off: give both")
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
    def restores(self) -> bool:
        """Whether mean and scale are taken off on the way in and put back on the way out."""
        return self.normalize and self.restore

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
        return Codebook(self)


_EPS = 1e-5  # of the inner norm, as torch's LayerNorm


@dataclass(frozen=True)
class Snap:
    """What happened to activations on their way through a codebook; all in the graph.

    Args:
        given: the activations as the table sees them (normalised where it asks for that).
        similarities: of every code, as hooks left them.
        acts: the k-hot vector, as hooks left it.
        output: what stands for the activations, in their own units.
    """

    given: Float[Tensor, "*place group d_group"]
    similarities: Float[Tensor, "*place latent"]
    acts: Float[Tensor, "*place latent"]
    output: Float[Tensor, "*place d_in"]


class _KHot(torch.autograd.Function):
    """The k largest of the last axis as ones; backward, the identity."""

    @staticmethod
    def forward(ctx: Any, similarities: Tensor, k: int) -> Tensor:
        chosen = similarities.topk(k, dim=-1).indices
        return torch.zeros_like(similarities).scatter_(-1, chosen, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class Codebook(SAE[CodebookConfig]):
    """A table of codes per group, and the lookup that snaps activations to them.

    Activations [..., d_in] become k-hot [..., n_groups * n_codes], group by group, and the sum of
    the active codes [..., d_in]. ``table`` [group, code, d_group] is the one parameter.

    Args:
        cfg: sizes and options.
        use_error_term: for sae-lens; give it to ``model.add_codebook`` instead.

    Example:
        >>> import torch
        >>> from tstlens.codebooks import Codebook, CodebookConfig
        >>> codebook = Codebook(CodebookConfig(d_in=8, n_codes=16, k=2, n_groups=2))
        >>> acts = codebook.encode(torch.randn(4, 10, 8))
        >>> acts.shape, codebook.ids(acts).shape, codebook.decode(acts).shape
        (torch.Size([4, 10, 32]), torch.Size([4, 10, 2, 2]), torch.Size([4, 10, 8]))
    """

    table: nn.Parameter

    def __init__(self, cfg: CodebookConfig, use_error_term: bool = False) -> None:
        if not cfg.d_in or not cfg.n_groups:
            raise ArgumentError(
                f"expected a config with a width and groups, got d_in={cfg.d_in}, "
                f"n_groups={cfg.n_groups}; 0 asks the hook point: model.add_codebooks(config, "
                "hooks=[...])"
            )
        usable_device(cfg.device)
        super().__init__(cfg, use_error_term)
        self._statistics: tuple[Tensor, Tensor] | None = None

    @property
    def n_codes(self) -> int:
        """Codes per group."""
        return self.cfg.n_codes

    @property
    def n_groups(self) -> int:
        """Groups, each with a table of its own."""
        return self.cfg.n_groups

    @property
    def k(self) -> int:
        """Codes that are active at once in each group."""
        return self.cfg.k

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """The table as sae-lens' decoder [group * code, d_in], zero outside a group's own run."""
        return self.table[0] if self.n_groups == 1 else torch.block_diag(*self.table)

    def initialize_weights(self) -> None:
        """Normal entries such that k of them add up to unit variance; see :meth:`sample`."""
        cfg = self.cfg
        generator = torch.Generator().manual_seed(cfg.seed)
        table = torch.randn(cfg.n_groups, cfg.n_codes, cfg.d_group, generator=generator)
        self.table = nn.Parameter((table / cfg.k).to(self.device, self.dtype))

    def get_activation_fn(self) -> Any:
        """None to speak of: codes are active or not."""
        return nn.Identity()

    @checked
    @torch.no_grad()
    def sample(self, activations: Float[Tensor, "... d_in"], seed: Seed = 0) -> Codebook:
        """Make the table of activations drawn without replacement, each over k; in place.

        Args:
            activations: of observed positions only.
            seed: the same seed draws the same.

        Raises:
            ArgumentError: fewer activations than codes.
        """
        rows = self.as_seen(activations.reshape(-1, activations.shape[-1]))  # [row, group, d]
        if len(rows) < self.n_codes:
            raise ArgumentError(
                f"expected at least n_codes={self.n_codes} activations to draw from, got "
                f"{len(rows)}; give more series or fewer codes"
            )
        generator = torch.Generator().manual_seed(seed)
        for group in range(self.n_groups):
            drawn = torch.randperm(len(rows), generator=generator)[: self.n_codes]
            self.table[group] = rows[drawn.to(rows.device), group] / self.k
        return self

    @checked
    @torch.no_grad()
    def set_k(self, k: Count) -> Codebook:
        """Change how many codes are active; the table is scaled so that their sum is as before."""
        if k > self.n_codes:
            raise ArgumentError(f"expected k in 1..{self.n_codes}, got {k}")
        self.table.mul_(self.k / k)
        self.cfg.k = k
        return self

    def similarities(
        self, given: Float[Tensor, "*place group d_group"]
    ) -> Float[Tensor, "*place group code"]:
        """How like every code of its group an activation is, in the config's sense.

        Args:
            given: as :class:`Snap` has it.
        """
        table, kind = self.table, self.cfg.similarity
        if kind == "cosine":
            given, table = normalize(given, dim=-1), normalize(table, dim=-1)
        if kind != "euclidean":
            return torch.einsum("...gd,gcd->...gc", given, table)
        middle = self.k * table.mean(1)  # nearer to zero, distances lose fewer digits
        given, table = given - middle, self.k * table - middle[:, None]
        inner = torch.einsum("...gd,gcd->...gc", given, table)
        return 2 * inner - given.pow(2).sum(-1, keepdim=True) - table.pow(2).sum(-1)

    @checked
    def trace(self, x: Float[Tensor, "... d_in"]) -> Snap:
        """Activations through the codebook, hooks and all, with what happened on the way."""
        with torch.autocast(x.device.type, enabled=False):  # codes as in full precision
            x = self._checked(self.hook_sae_input(x.to(self.dtype)))
            given, mean, scale = self._parts(x)
            similarities, acts = self._look_up(given)
            output = self._sum(acts, mean, scale)
            return Snap(given, similarities, acts, output + (x - x.detach()))

    def snap(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """The activations' codes summed; backward, straight through."""
        return self.trace(x).output

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """As sae-lens': :meth:`snap`, and ``hook_sae_output``."""
        output = self.snap(x)
        if self.use_error_term:
            output = output + self.hook_sae_error((x - self._plain(x)).detach())
        return self.hook_sae_output(output)

    @checked
    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... latent"]:
        """The k-hot vector, group after group."""
        with torch.autocast(x.device.type, enabled=False):
            x = self._checked(self.hook_sae_input(x.to(self.dtype)))
            given, mean, scale = self._parts(x)
            self._statistics = (mean, scale) if self.cfg.restores else None
            return self._look_up(given)[1]

    @checked
    def decode(
        self, acts: Float[Tensor, "... latent"], given: Float[Tensor, "... d_in"] | None = None
    ) -> Float[Tensor, "... d_in"]:
        """The sum of the active codes. Gradients end at the table and at ``acts``.

        Args:
            acts: k-hot, or any weights of the codes.
            given: the activations whose mean and scale are put back, with ``normalize`` and
                ``restore``; None for those that :meth:`encode` read last, as with sae-lens' SAEs.

        Raises:
            ArgumentError: mean and scale are needed and not known.
        """
        mean = scale = None
        if self.cfg.restores:
            if given is not None:
                _, mean, scale = self._parts(self._checked(given.to(self.dtype)))
            elif self._statistics is not None:
                mean, scale = self._statistics
            self._statistics = None
            if mean is None or mean.shape[:-2] != acts.shape[:-1]:
                raise ArgumentError(
                    "this codebook normalises what it reads (normalize=True), so decode(acts) "
                    "needs given=, the activations whose mean and scale it puts back"
                )
        return self._sum(acts, mean, scale)

    @checked
    def ids(
        self,
        acts: Float[Tensor, "*place latent"],
        similarities: Float[Tensor, "*place latent"] | None = None,
        keep: Bool[Tensor, "*place"] | None = None,
    ) -> Int[Tensor, "*ids"]:
        """Which codes are active: [..., k], with a group axis before k where there are several.

        Args:
            acts: the k-hot vector.
            similarities: the most similar code comes first; where None the smallest number does.
            keep: [...], False at padded positions.

        Returns:
            Numbers within a group, 0..n_codes - 1; -1 at padded positions, and where an
            intervention left fewer than k codes.
        """
        acts = self._by_group(acts).detach()
        _check_keep(keep, acts)
        if similarities is None:
            order = -torch.arange(self.n_codes, device=acts.device, dtype=acts.dtype).expand_as(
                acts
            )
        else:
            order = self._by_group(similarities.detach()).clamp(min=torch.finfo(acts.dtype).min)
        found = order.masked_fill(acts == 0, float("-inf")).topk(self.k, dim=-1)
        ids = found.indices.masked_fill(found.values == float("-inf"), -1)
        if keep is not None:
            ids = ids.masked_fill(~keep[..., None, None], -1)
        return ids.squeeze(-2) if self.n_groups == 1 else ids

    @checked
    @torch.no_grad()
    def usage(
        self, acts: Float[Tensor, "*place latent"], keep: Bool[Tensor, "*place"] | None = None
    ) -> Int[Tensor, "group code"]:
        """Positions at which each code is active.

        Args:
            acts: the k-hot vector.
            keep: [...], False at positions that do not count, such as padding.
        """
        active = self._by_group(acts) != 0
        _check_keep(keep, active)
        if keep is not None:
            active = active & keep[..., None, None]
        return active.flatten(0, -3).sum(0) if active.ndim > 2 else active.long()

    def losses(self, snap: Snap, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Terms to add to the task's loss, each a mean over entries of the activations kept.

        Terms of the loss rather than gradients put in by hand, so a scaled loss scales them too.

        Args:
            snap: of this codebook.
            keep: bool [...], False at positions that do not count, such as padding.

        Returns:
            ``reconstruction``: squared error that trains the table, not what lies upstream (zero
            in gradient mode ``"task"``); ``commitment``: the same error the other way round.

        Raises:
            SeriesShapeError: a mask that does not fit.
        """
        given, acts = snap.given, self._by_group(snap.acts.detach())
        if keep is not None:
            if keep.shape != given.shape[: keep.ndim] or keep.ndim != given.ndim - 2:
                raise SeriesShapeError(
                    f"expected keep {list(given.shape[:-2])}, got {list(keep.shape)}"
                )
            given, acts = given[keep], acts[keep]
        if not given.numel():
            raise ArgumentError("expected at least one observed position, got none")
        summed = torch.einsum("...gc,gcd->...gd", acts, self.table)
        reconstruction = mse_loss(summed, given.detach())
        if self.cfg.gradient == "task":
            reconstruction = torch.zeros_like(reconstruction)
        commitment = mse_loss(given, summed.detach())
        return {"reconstruction": reconstruction, "commitment": commitment}

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Refused: a code's length is part of what it says, and there is no encoder."""
        raise ArgumentError("a codebook has no encoder that the norms of its codes could go into")

    def as_seen(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... group d_group"]:
        """Activations as the table sees them: by group, normalised where the config says so."""
        return self._parts(self._checked(x))[0]

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.cfg.d_in:
            raise SeriesShapeError(
                f"expected activations [..., d_in={self.cfg.d_in}], got {list(x.shape)}"
            )
        return x

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., group, d_group] as the table sees it, with mean and scale [..., group, 1]."""
        parts = x.to(self.dtype).unflatten(-1, (self.n_groups, self.cfg.d_group))
        if not self.cfg.normalize:
            none = parts.new_zeros(1)
            return parts, none, none + 1
        mean = parts.mean(-1, keepdim=True)
        scale = (parts.var(-1, unbiased=False, keepdim=True) + _EPS).sqrt()
        return (parts - mean) / scale, mean.detach(), scale.detach()

    def _look_up(self, given: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            similarities = self.similarities(given).flatten(-2)
        # A leaf, so that gradients reach it and the k-hot vector even where all else is frozen.
        similarities.requires_grad_(torch.is_grad_enabled())
        similarities = self.hook_sae_acts_pre(similarities)
        acts = _KHot.apply(self._by_group(similarities), self.k)
        return similarities, self.hook_sae_acts_post(acts.flatten(-2))  # type: ignore[union-attr]

    def _sum(self, acts: Tensor, mean: Tensor | None, scale: Tensor | None) -> Tensor:
        table = self.table.detach() if self.cfg.gradient == "reconstruction" else self.table
        summed = torch.einsum("...gc,gcd->...gd", self._by_group(acts.to(table.dtype)), table)
        summed = self.hook_sae_recons(summed.flatten(-2))
        if not self.cfg.restores or mean is None or scale is None:
            return summed
        return (summed.unflatten(-1, (self.n_groups, -1)) * scale + mean).flatten(-2)

    def _by_group(self, acts: Tensor) -> Tensor:
        latents = self.n_groups * self.n_codes
        if not isinstance(acts, Tensor) or acts.shape[-1:] != (latents,):
            got = list(acts.shape) if isinstance(acts, Tensor) else type(acts).__name__
            raise SeriesShapeError(f"expected a k-hot vector [..., latent={latents}], got {got}")
        return acts.unflatten(-1, (self.n_groups, self.n_codes))

    @torch.no_grad()
    def _plain(self, x: Tensor) -> Tensor:
        given, mean, scale = self._parts(x)
        chosen = self.similarities(given).topk(self.k, dim=-1).indices
        acts = torch.zeros_like(given[..., :1].expand(*given.shape[:-1], self.n_codes))
        summed = torch.einsum("...gc,gcd->...gd", acts.scatter(-1, chosen, 1.0), self.table)
        return (summed * scale + mean if self.cfg.restores else summed).flatten(-2)


if CodebookConfig.architecture() not in SAE_CLASS_REGISTRY:
    register_sae_class(CodebookConfig.architecture(), Codebook, CodebookConfig)


def _check_keep(keep: Tensor | None, acts: Tensor) -> None:
    if keep is not None and (keep.shape != acts.shape[:-2] or keep.dtype != torch.bool):
        raise SeriesShapeError(
            f"expected keep as bool {list(acts.shape[:-2])}, one per place, got {keep.dtype} "
            f"{list(keep.shape)}"
        )
