"""What every result of an analysis can do: become a pandas frame and a figure.

A result is plain data: values with named axes and how they were made. ``figure()`` looks up the
drawing in :mod:`tstlens.figures`, the one place where an arrow of the house points to the right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class Result(ABC):
    """Base of the results that analyses return."""

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The numbers in long format, one row per entry."""

    def figure(self, **options: Any) -> go.Figure:
        """The plotly figure that :mod:`tstlens.figures` has for this kind of result.

        Args:
            **options: passed on to the drawing; each kind of result documents its own.
        """
        from tstlens import figures

        return figures.draw(self, **options)


class TableResult(Result):
    """Base of the results whose frame is their rows as they stand."""

    @abstractmethod
    def _rows(self) -> Any:
        """What pandas makes a frame of: one dict per row, or one array per column."""

    def to_dataframe(self) -> pd.DataFrame:
        """The numbers, one row per entry."""
        import pandas as pd

        return pd.DataFrame(self._rows())


class PagedResult(Result):
    """Base of the results that also become an HTML page of their own."""

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Write one self-contained page that needs no network.

        Args:
            path: the file; replaced as a whole, or not at all.
            **options: of the page; see :func:`tstlens.figures.page`.

        Returns:
            The path.
        """
        from tstlens import figures

        return figures.page(self, path, **options)
