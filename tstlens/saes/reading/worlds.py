"""Many edits of one activation at once: each is a world along the batch axis.

The series run once; a world starts at the block that the dictionary writes to, from the clean
residual stream, adds its change to the activation there, and everything after it is computed anew.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.errors import SeriesShapeError
from tstlens.model import HookedTST
from tstlens.saes.reading.by_head import by_head
from tstlens.saes.reading.place import Place, directions, encode, on_device, place_of, scale


class Worlds:
    """A clean run to start edits from.

    Args:
        model: the model.
        dictionary: the SAE or codebook.
        data: the series.
        place: the dictionary's hooks; from its metadata where None.
        batch_size: series, and worlds, per forward pass.
    """

    def __init__(
        self,
        model: HookedTST,
        dictionary: Any,
        data: TimeSeriesData,
        *,
        place: Place | None = None,
        batch_size: int = 128,
    ) -> None:
        self.model = model
        dictionary = by_head(model, dictionary)
        self.place = place or place_of(model, dictionary)
        self.directions = directions(dictionary).to(device=model.cfg.device, dtype=model.cfg.dtype)
        self.series, self.mask = on_device(model, data)
        self.batch_size = batch_size
        latents, observed, scales, outputs, entering = [], [], [], [], []
        for start in range(0, len(data), batch_size):
            part = data[start : start + batch_size]
            batch = encode(model, dictionary, self.place, part)
            latents.append(batch.latents)
            observed.append(batch.observed)
            factor = scale(dictionary, batch.inputs)
            scales.append(torch.ones_like(batch.latents[..., 0]) if factor is None else factor)
            with torch.no_grad():
                series, mask = on_device(model, part)
                outputs.append(central(model, model(series, mask=mask)))
                if self.place.layer is not None:
                    entering.append(model(series, mask=mask, stop_at_layer=self.place.layer))
            self.rows = batch.rows_per_series
        self.latents = torch.cat(latents)  # [row, pos, latent]
        self.observed = torch.cat(observed)  # [row, pos]
        self.scales = torch.cat(scales)  # [row, pos]
        self.output = torch.cat(outputs)  # [series, ...]
        self.entering = torch.cat(entering) if entering else None
        with torch.no_grad():
            _, self.state = model.embed_series(self.series, self.mask)

    def row_index(self, series: Int[Tensor, " world"]) -> Int[Tensor, " row"]:
        """Rows of the trunk that belong to these series, in order."""
        offsets = torch.arange(self.rows, device=series.device)
        return (series[:, None] * self.rows + offsets).flatten()

    @torch.no_grad()
    def outputs(
        self,
        series: Int[Tensor, " world"],
        amounts: Float[Tensor, "row pos"],
        latents: Int[Tensor, " world"],
    ) -> Float[Tensor, " world *output"]:
        """Outputs with ``amounts`` of a latent's direction added.

        Args:
            series: which series each world starts from.
            amounts: activation to add at each row and position of these worlds; padded positions
                are left alone whatever is asked.
            latents: whose direction, one per world.
        """
        parts = []
        amounts = amounts.unflatten(0, (-1, self.rows))
        for start in range(0, len(series), self.batch_size):
            at = slice(start, start + self.batch_size)
            rows = self.row_index(series[at])
            amount = amounts[at].flatten(0, 1) * self.scales[rows] * self.observed[rows]
            vector = self.directions[latents[at]].repeat_interleave(self.rows, 0)
            parts.append(self._run(series[at], rows, amount[:, :, None] * vector[:, None]))
        return torch.cat(parts)

    def _run(self, series: Tensor, rows: Tensor, change: Tensor) -> Tensor:
        head = self.place.head

        def add(activation: Tensor, hook: Any) -> Tensor:
            del hook
            if head is None:
                return activation + change.view_as(activation)
            edited = activation.clone()
            edited[:, :, head] += change
            return edited

        hooks = [(self.place.writes, add)]
        if self.entering is None:
            mask = None if self.mask is None else self.mask[series]
            output = self.model.run_with_hooks(self.series[series], mask=mask, fwd_hooks=hooks)
            return central(self.model, output)
        output = self.model.run_with_hooks(
            self.entering[rows],
            start_at_layer=self.place.layer,
            state=self.state.rows(series),
            fwd_hooks=hooks,
        )
        return central(self.model, output)


def central(model: HookedTST, output: Tensor) -> Tensor:
    """Logits and forecasts as they are; of a forecast's quantiles or distribution, the middle.

    That is the median: the middle quantile (the mean of the two in the middle where there is none)
    or the location of a normal or Student's t distribution; the mean of a negative binomial.

    Args:
        model: whose output it is.
        output: [*world, class], [*world, channel, horizon], or the latter with quantiles or
            parameters last; one world axis.

    Raises:
        SeriesShapeError: other axes.
    """
    if output.ndim in (2, 3):
        return output
    if output.ndim != 4:
        raise SeriesShapeError(
            "expected outputs [batch, class] or [batch, channel, horizon], with quantiles or "
            f"parameters last where there are any, got {list(output.shape)}"
        )
    distribution = getattr(model.cfg.head, "distribution", None)
    if distribution == "negative_binomial":
        count, logits = output.unbind(-1)
        return count * logits.exp()
    if distribution is not None:
        return output[..., -2]  # (..., loc, scale)
    n = output.shape[-1]
    return output[..., (n - 1) // 2 : n // 2 + 1].mean(-1)
