"""What a search among codes found, beside neurons, latents and shuffled data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tstlens.errors import ArgumentError
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Score:
    """How well something marks what was searched for.

    Args:
        precision: share of the places where it is active at which the predicate holds; NaN where
            it is never active.
        recall: share of the places where the predicate holds at which it is active.
        support: places at which it is active.
    """

    precision: float
    recall: float
    support: int


@dataclass(frozen=True)
class Rival:
    """The best neuron or SAE latent at (at least) a code's recall on the training split.

    Args:
        place: hook point.
        index: which one.
        sign: 1 where it has to be above the threshold, -1 below.
        threshold: in the activation's units.
        train: its score on the split that it was picked on.
        test: on the other.
    """

    place: str
    index: int
    sign: int
    threshold: float
    train: Score
    test: Score


@dataclass(frozen=True)
class FoundCode:
    """One code that a search found.

    Args:
        hook: hook point.
        code: its number; ``group`` and ``head`` say of which table.
        group: its group.
        head: its head, or None.
        train: score on the split that it was picked on, which flatters it.
        test: score on the other, which does not.
        p: how often the best of all codes stands out as far on the training split when what is
            searched for is dealt out to the series at random; allows for having looked at all.
        null: precision that the best of all codes reaches then at this code's recall, 95th
            percentile; 0 where none has the recall.
        neuron: the best neuron at its recall, or None.
        latent: the best SAE latent at its recall, or None.
        several_groups: whether its codebook has more than one group.
        shared: whether heads share its table.
    """

    hook: str
    code: int
    group: int
    head: int | None
    train: Score
    test: Score
    p: float
    null: float
    neuron: Rival | None
    latent: Rival | None
    several_groups: bool = False
    shared: bool = False

    def where(self) -> dict[str, Any]:
        """Arguments that name the code to ``model.force_codes(**...)`` and ``effects``."""
        code: Any = {self.group: self.code} if self.several_groups else self.code
        named = {"codes": {self.hook: code}}
        return {**named, "head": self.head} if self.shared else named

    @property
    def name(self) -> str:
        """The code in words, such as "code 17 at blocks.0.hook_mlp_out"."""
        head = f" of head {self.head}" if self.head is not None else ""
        many = self.several_groups and self.head is None
        return f"code {self.code}{f' of group {self.group}' if many else head} at {self.hook}"


@dataclass(frozen=True, eq=False, repr=False)
class CodeSearch(Result):
    """Codes by precision on the training split, with their scores on the other.

    Args:
        codes: found codes, most precise (on the training split) first.
        asked: what was searched for, in words.
        unit: whether places are positions or series.
        base_rate: share of the test split's places at which the predicate holds: the precision of
            a random code.
        train_base_rate: the same of the training split.
        null: [code, permutation] precision, on the training split, of the best of all codes that
            have this code's recall, with what is searched for dealt out to the series at random.
        n_candidates: codes that had the recall and support to be ranked.
        made: data, splits, seeds, limits.
    """

    codes: tuple[FoundCode, ...]
    asked: str
    unit: str
    base_rate: float
    train_base_rate: float
    null: Float[np.ndarray, "code permutation"]
    n_candidates: int
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> FoundCode:
        """The first code.

        Raises:
            ArgumentError: no code had the recall and support asked for.
        """
        if not self.codes:
            raise ArgumentError(
                f"no code is active at enough places with {self.asked} (min_recall="
                f"{self.made.get('min_recall')}, min_support={self.made.get('min_support')}); "
                "ask for less"
            )
        return self.codes[0]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per code, in order.

        ``precision``, ``recall`` and ``support`` are of the test split, ``train_precision`` … of
        the other; ``p`` and ``null`` are of shuffled data. ``neuron`` and ``latent`` name the
        best rivals at the code's recall on the training split, with their precision and recall on
        the test split.
        """
        import pandas as pd

        rows = []
        for one in self.codes:
            row: dict[str, Any] = {
                "hook": one.hook,
                "group": one.group,
                "head": one.head,
                "code": one.code,
                **vars(one.test),
                **{f"train_{name}": value for name, value in vars(one.train).items()},
                "p": one.p,
                "null": one.null,
            }
            for kind in ("neuron", "latent"):
                rival: Rival | None = getattr(one, kind)
                row[kind] = None if rival is None else f"{rival.place}[{rival.index}]"
                row[f"{kind}_precision"] = np.nan if rival is None else rival.test.precision
                row[f"{kind}_recall"] = np.nan if rival is None else rival.test.recall
            rows.append(row)
        return pd.DataFrame(rows)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> FoundCode:
        return self.codes[index]

    def __repr__(self) -> str:
        head = f"CodeSearch({self.asked}: base rate {self.base_rate:.1%}"
        if not self.codes:
            return f"{head}, no code has the recall and support asked for)"
        lines = [
            f"{one.name}: precision {one.test.precision:.1%}, recall {one.test.recall:.1%}, "
            f"p {one.p:.3f}"
            for one in self.codes[:3]
        ]
        more = f"; and {len(self.codes) - 3} more" if len(self.codes) > 3 else ""
        return f"{head}; {'; '.join(lines)}{more})"
