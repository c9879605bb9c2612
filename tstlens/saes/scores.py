"""A dictionary's scores beside its controls, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tstlens.arguments import checked
from tstlens.results import Result
from tstlens.saes.checks import check_at_least

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class DictionaryScore:
    """One dictionary's numbers.

    Args:
        name: "trained", "random, topk", "random, pursuit" or "neurons".
        n_latents: size of the dictionary.
        explained_variance: 1 - squared error / squared distance from the mean; 1 is perfect, 0 is
            the mean, below 0 is worse than the mean.
        mse: mean squared error per entry, in the activation's units.
        l0: active latents per activation, mean.
        density: [latent], share of activations at which each latent is active.
        task: the task's measures with the dictionary spliced in, without error term.
    """

    name: str
    n_latents: int
    explained_variance: float
    mse: float
    l0: float
    density: Float[np.ndarray, " latent"]
    task: dict[str, float]

    @property
    def n_dead(self) -> int:
        """Latents that are active nowhere in these data."""
        return int((self.density == 0).sum())


@dataclass(frozen=True)
class Scores(Result):
    """A dictionary's scores beside its controls, all raw.

    Args:
        rows: the trained dictionary first, then the controls.
        task: the task's measures of the model as it is ("original"), with the activation replaced
            by zeros ("zero") and by its mean over these data ("mean").
        hook: the hook point that is read.
        n_activations: activations scored; padding is left out.
        data: name and split.
        made: model, architecture, seed of the controls.
    """

    rows: tuple[DictionaryScore, ...]
    task: dict[str, dict[str, float]]
    hook: str
    n_activations: int
    data: str
    made: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        each = "; ".join(
            f"{row.name}: explained variance {row.explained_variance:.3f}, l0 {row.l0:.1f}"
            for row in self.rows
        )
        return f"Scores({self.hook}, {self.n_activations} activations of {self.data}; {each})"

    @property
    def trained(self) -> DictionaryScore:
        """The dictionary that was scored."""
        return self.rows[0]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per dictionary; measures of the task spliced, original, zero and mean ablated."""
        import pandas as pd

        table = []
        for row in self.rows:
            entry: dict[str, Any] = {
                "dictionary": row.name,
                "latents": row.n_latents,
                "explained_variance": row.explained_variance,
                "mse": row.mse,
                "l0": row.l0,
                "dead": row.n_dead,
            }
            for measure, value in row.task.items():
                entry[measure] = value
                for kind, found in self.task.items():
                    entry[f"{measure}_{kind}"] = found[measure]
            table.append(entry)
        return pd.DataFrame(table)

    @checked
    def density_histogram(self, bins: int = 24) -> pd.DataFrame:
        """Latents by log10 of their density, one row per dictionary and bin; dead ones left out."""
        import pandas as pd

        check_at_least(1, bins=bins)
        lowest = np.log10(1 / self.n_activations)
        edges = np.linspace(lowest, 0, bins + 1)
        table = []
        for row in self.rows:
            alive = np.log10(row.density[row.density > 0])
            counts, _ = np.histogram(alive.clip(lowest, 0), edges)
            table += [
                {"dictionary": row.name, "log10_density": left, "latents": int(count)}
                for left, count in zip(edges[:-1], counts, strict=True)
            ]
        return pd.DataFrame(table)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON values; densities are left out."""
        return {
            "hook": self.hook,
            "data": self.data,
            "n_activations": self.n_activations,
            "task": self.task,
            "dictionaries": self.to_dataframe().to_dict(orient="records"),
            "made": self.made,
        }
