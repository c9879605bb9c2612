"""The front end that ``lagged_steps`` configures: steps with lags, for an encoder and a decoder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tstlens.errors import SeriesValueError
from tstlens.model.embed import sinusoids
from tstlens.model.families.lagged_steps import LaggedStepsConfig
from tstlens.model.families.scaling import check_observed, fill_missing, mean_and_std, mean_size
from tstlens.model.norms import LayerNorm, watched
from tstlens.model.state import TrunkState
from tstlens.shapes import Mask, Residual, Series

_EPS = 1e-5  # of the norm after the embedding, which no option of the source sets
_PerTarget = Float[Tensor, "batch target 1"]


class StepEmbed(nn.Module):
    """A linear map of every step's numbers, a place from a table, and a norm.

    ``W_E`` is [feature, d_model], ``W_pos`` [place, d_model]; the first position has the place
    ``first``.
    """

    W_pos: Tensor

    def __init__(self, n_features: int, n_places: int, first: int, d_model: int) -> None:
        super().__init__()
        self.first = first
        self.W_E = nn.Parameter(torch.zeros(n_features, d_model))
        table = sinusoids(n_places, d_model)  # here sines come first, then cosines
        self.register_buffer("W_pos", torch.cat([table[:, 0::2], table[:, 1::2]], 1))
        self.ln = LayerNorm(d_model, _EPS)
        self.hook_inputs = HookPoint()  # [batch, pos, feature]
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]

    def forward(self, inputs: Float[Tensor, "batch pos feature"]) -> Residual:
        if watched(self.hook_inputs):
            inputs = self.hook_inputs(inputs.clone())
        embedded = self.hook_embed(inputs @ self.W_E)
        places = self.W_pos[None, self.first : self.first + inputs.shape[1]]
        if watched(self.hook_pos_embed):
            places = self.hook_pos_embed(places.expand(len(inputs), -1, -1).clone())
        return self.ln(embedded + places)


class LaggedSteps(nn.Module):
    """From a series with its covariates to positions of the encoder and of the decoder.

    A channel of a static number or category counts with its mean over time (a category with the
    whole number nearest to it), so that edits of it at few steps move it a little.
    """

    def __init__(self, part: LaggedStepsConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_category = nn.ParameterList(
            torch.zeros(size, width)
            for size, width in zip(part.categories, part.d_categories, strict=True)
        )
        n_places = part.context_length + part.prediction_length
        self.encoder = StepEmbed(part.n_features, n_places, 0, d_model)
        self.decoder = StepEmbed(part.n_features, n_places, part.context_length, d_model)
        if "loc" in part.statistics:
            self.hook_loc = HookPoint()  # [batch, target, 1]
        if "scale" in part.statistics:
            self.hook_scale = HookPoint()  # [batch, target, 1]
        self.hook_scaled = HookPoint()  # [batch, target, time]
        self.hook_lags = HookPoint()  # [batch, target, step of context and future, lag]
        self.hook_static = HookPoint()  # [batch, feature]

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        part = self.cfg
        n_targets, n_time = part.n_targets, series.shape[2]
        known = series[:, n_targets:]  # [batch, covariate, time]
        if bool(known.isnan().any()):
            raise SeriesValueError(
                "expected covariates without NaN; only values that are forecast may be missing"
            )
        values, observed = fill_missing(series[:, :n_targets], mask)
        loc, scale = self._statistics(values, observed)
        scaled = self.hook_scaled((values - loc) / scale)
        reach = max(part.lags)
        lags = torch.stack([scaled[:, :, reach - lag : n_time - lag] for lag in part.lags], -1)
        lags = self.hook_lags(lags)
        of_steps = known[:, : part.n_time_features, reach:].transpose(1, 2)
        static = self.hook_static(self._static(known[:, part.n_time_features :], loc, scale))
        inputs = torch.cat(
            [
                lags.transpose(1, 2).flatten(2),  # [batch, step, target * lag]
                static[:, None].expand(-1, n_time - reach, -1),
                of_steps,
            ],
            -1,
        )
        state = TrunkState(
            statistics={n: {"loc": loc, "scale": scale}[n] for n in part.statistics},
            decoder_embedded=self.decoder(inputs[:, part.context_length :]),
        )
        return self.encoder(inputs[:, : part.context_length]), state

    def _statistics(self, values: Series, observed: Tensor) -> tuple[_PerTarget, _PerTarget]:
        """Location and scale of every target, from the observed samples of the context."""
        part = self.cfg
        context = slice(max(part.lags), part.past_length)
        values, observed = values[..., context], observed[..., context]
        loc, scale = torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])
        if part.scaling == "mean":
            if part.default_scale is None:
                check_observed(observed, "the context of every channel")
            scale = mean_size(values, observed, part.smallest_scale, part.default_scale)
        elif part.scaling == "std":
            loc, scale = mean_and_std(values, observed, part.smallest_scale)
            loc = self.hook_loc(loc)
        return loc, scale if part.scaling == "none" else self.hook_scale(scale)

    def _static(
        self, static: Float[Tensor, "batch static time"], loc: Tensor, scale: Tensor
    ) -> Float[Tensor, "batch feature"]:
        known = static.mean(-1)  # [batch, static]
        numbers, categories = known.split([self.cfg.n_static_real, len(self.W_category)], 1)
        codes = categories.round().long()
        self.cfg.check_codes(codes)
        embedded = [table[codes[:, i]] for i, table in enumerate(self.W_category)]
        sizes = [loc.abs().log1p().squeeze(-1), scale.log().squeeze(-1)]
        return torch.cat([*embedded, numbers, *sizes], 1)
