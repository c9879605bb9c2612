"""A feature graph as plain data: latents, what they do to the metric, and through whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.metrics import Better
from tstlens.results import Result
from tstlens.stats import correlation, rank_correlation, sign_agreement

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class FeatureNode:
    """A latent of one of the dictionaries, or all that the dictionary misses.

    Args:
        layer: which dictionary, counted from the input.
        hook: the hook point that it writes.
        latent: which latent; None for the error.
        control: drawn at random, not chosen for its effect.
    """

    layer: int
    hook: str
    latent: int | None
    control: bool = False

    @property
    def label(self) -> str:
        """ "12", or "error"."""
        return "error" if self.latent is None else str(self.latent)

    @property
    def name(self) -> str:
        """``blocks.0.hook_mlp_out/12``, ``blocks.0.hook_mlp_out/error``."""
        return f"{self.hook}/{self.label}"


@dataclass(frozen=True, eq=False, repr=False)
class FeatureGraph(Result):
    """Latents of dictionaries and the paths between them, each with its effect on a metric.

    An effect is what the metric would lose with the latent at its baseline: positive where the
    latent raises the metric.

    Args:
        nodes: the strongest latents of each dictionary, its error, and latents drawn at random.
        node_effects: [series, node] estimated by gradients.
        edge_effects: [series, node, node] estimated effect of the first through the second; NaN
            where there is no edge.
        kept: bool [node, node], the strongest edges among the latents that were chosen.
        exact_nodes: [series, node] measured by setting the node to its baseline; NaN where not
            measured.
        exact_edges: [series, node, node] the same of edges.
        latent_effects: per dictionary [series, latent], the estimate for every latent.
        value: [series] the metric of the clean run.
        metric: its name.
        unit: its unit.
        baseline: what latents are compared with: "zero", "mean" or "series".
        made: how.
        better: which direction of the metric is an improvement, if one is.
    """

    nodes: tuple[FeatureNode, ...]
    node_effects: Float[Tensor, "series node"]
    edge_effects: Float[Tensor, "series node node"]
    kept: Bool[Tensor, "node node"]
    exact_nodes: Float[Tensor, "series node"]
    exact_edges: Float[Tensor, "series node node"]
    latent_effects: tuple[Float[Tensor, "series _"], ...]
    value: Float[Tensor, " series"]
    metric: str
    unit: str
    baseline: str
    made: dict[str, Any] = field(default_factory=dict)
    better: Better | None = None

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points of the dictionaries, from the input to the output."""
        found = {node.layer: node.hook for node in self.nodes}
        return tuple(found[layer] for layer in sorted(found))

    def node_table(self) -> pd.DataFrame:
        """One row per node, strongest first in each dictionary.

        ``effect`` with its standard error ``se`` over series (the estimate), and ``exact`` (NaN
        where it was not measured); ``control`` for latents drawn at random.
        """
        import pandas as pd

        rows = [
            {
                "node": node.name,
                "layer": node.layer,
                "hook": node.hook,
                "latent": -1 if node.latent is None else node.latent,
                "kind": "error" if node.latent is None else "latent",
                "control": node.control,
            }
            for node in self.nodes
        ]
        frame = pd.DataFrame(rows)
        frame["effect"] = self.node_effects.mean(0).numpy()
        frame["se"] = _standard_error(self.node_effects).numpy()
        frame["exact"] = self.exact_nodes.mean(0).numpy()
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].sort_values(["layer", "control"], kind="stable", ignore_index=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge, strongest first.

        ``source`` and ``target`` nodes, the estimated ``effect`` of the first through the second
        with its standard error ``se`` over series, the measured one (``exact``, NaN where it was
        not), whether it is ``kept`` in the graph, and whether an end is a ``control``.
        """
        import pandas as pd

        mean, error = self.edge_effects.mean(0), _standard_error(self.edge_effects)
        exact = self.exact_edges.mean(0)
        rows = []
        for first, then in (~mean.isnan()).nonzero().tolist():
            a, b = self.nodes[first], self.nodes[then]
            rows.append(
                {
                    "source": a.name,
                    "target": b.name,
                    "effect": float(mean[first, then]),
                    "se": float(error[first, then]),
                    "exact": float(exact[first, then]),
                    "kept": bool(self.kept[first, then]),
                    "control": a.control or b.control,
                }
            )
        columns = ["source", "target", "effect", "se", "exact", "kept", "control"]
        frame = pd.DataFrame(rows, columns=columns)
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    @checked
    def top_latents(self, series: int | None = None, n: int = 10) -> pd.DataFrame:
        """The latents with the largest estimated effect, in one series or on average.

        Args:
            series: index of the series; None for the mean over all.
            n: how many, over all dictionaries.

        Raises:
            ArgumentError: no such series, or n below 1.
        """
        import pandas as pd

        if n < 1:
            raise ArgumentError(f"expected n of at least 1, got {n}")
        if series is not None and not 0 <= series < len(self.value):
            raise ArgumentError(f"expected a series in 0..{len(self.value) - 1}, got {series}")
        parts = []
        for hook, effects in zip(self.hooks, self.latent_effects, strict=True):
            values = effects.mean(0) if series is None else effects[series]
            index = np.arange(len(values))
            parts.append(pd.DataFrame({"hook": hook, "latent": index, "effect": values.numpy()}))
        frame = pd.concat(parts, ignore_index=True)
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:n]].reset_index(drop=True)

    def agreement(self) -> pd.DataFrame:
        """How well the estimates agree with the measured effects, for nodes and for edges.

        Means over series of those that were measured, controls among them: ``n``, ``pearson``,
        ``spearman``, ``sign`` (share with the same sign, among those of at least 1 % of the
        largest), and ``slope`` of the estimate over the measured effect (1 where sizes agree).
        """
        import pandas as pd

        rows = {
            "nodes": _agreement(self.exact_nodes.mean(0), self.node_effects.mean(0)),
            "edges": _agreement(self.exact_edges.mean(0), self.edge_effects.mean(0)),
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("of")

    def controls(self) -> pd.DataFrame:
        """The chosen latents and edges beside those drawn at random: mean size of their effects.

        ``estimated`` over all of a kind, ``exact`` over those that were measured (``n_exact``).
        Random ones are active latents; had the choice no meaning, they would be as large.
        """
        import pandas as pd

        latent = torch.tensor([node.latent is not None for node in self.nodes])
        control = torch.tensor([node.control for node in self.nodes])
        edge = ~self.edge_effects[0].isnan() & latent[:, None] & latent
        drawn = edge & (control[:, None] | control)
        kinds = {
            "strongest latents": (latent & ~control, self.node_effects, self.exact_nodes),
            "random latents": (latent & control, self.node_effects, self.exact_nodes),
            "kept edges": (edge & self.kept, self.edge_effects, self.exact_edges),
            "edges of random latents": (drawn, self.edge_effects, self.exact_edges),
        }
        rows = {}
        for name, (which, estimated, exact) in kinds.items():
            guess, truth = estimated.mean(0)[which].abs(), exact.mean(0)[which].abs()
            truth = truth[~truth.isnan()]
            rows[name] = {
                "n": int(which.sum()),
                "estimated": float(guess.mean()) if len(guess) else float("nan"),
                "n_exact": len(truth),
                "exact": float(truth.mean()) if len(truth) else float("nan"),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("of")

    def coverage(self) -> pd.DataFrame:
        """What of a dictionary's estimated effect the shown latents and its error make up.

        One row per dictionary: ``latents`` (sum over all of them), ``shown`` (over the strongest),
        ``error`` (what the dictionary misses), all signed, mean over series. An error as large as
        the latents says that the graph is about what the dictionaries happen to see.
        """
        import pandas as pd

        rows = []
        for layer, (hook, effects) in enumerate(zip(self.hooks, self.latent_effects, strict=True)):
            sums = {}
            for name, wanted in (("shown", False), ("error", True)):
                which = [
                    index
                    for index, node in enumerate(self.nodes)
                    if node.layer == layer and (node.latent is None) is wanted and not node.control
                ]
                total = float(self.node_effects[:, which].sum(1).mean())
                sums[name] = total if which else float("nan")
            rows.append({"hook": hook, "latents": float(effects.sum(1).mean()), **sums})
        return pd.DataFrame(rows).set_index("hook")

    def __repr__(self) -> str:
        n_latents = sum(node.latent is not None and not node.control for node in self.nodes)
        return (
            f"FeatureGraph({' -> '.join(self.hooks)}, {n_latents} latents, "
            f"{int(self.kept.sum())} edges, {self.metric}, {len(self.value)} series)"
        )


def _standard_error(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.full_like(values[0], torch.nan)
    return values.std(0) / len(values) ** 0.5


def _agreement(exact: Tensor, estimate: Tensor) -> dict[str, Any]:
    measured = ~exact.isnan() & ~estimate.isnan()
    truth, guess = exact[measured].double().numpy(), estimate[measured].double().numpy()
    return {
        "n": len(truth),
        "pearson": correlation(truth, guess),
        "spearman": rank_correlation(truth, guess),
        "sign": sign_agreement(truth, guess),
        "slope": float(truth @ guess / (truth @ truth)) if truth.any() else float("nan"),
    }
