"""Images beside a page: written whole, or refused with what is missing."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from tstlens.errors import ArgumentError
from tstlens.figures.drawing import write_png


def test_without_a_browser_the_error_says_what_is_missing_and_nothing_is_written(
    tmp_path, monkeypatch
):
    def no_browser(*_, **__):
        raise RuntimeError("\nKaleido requires Google Chrome to be installed.\n\nEither download")

    monkeypatch.setattr(go.Figure, "to_image", no_browser)
    with pytest.raises(ArgumentError, match=r"install chromium.*\(Kaleido requires Google Chrome"):
        write_png(go.Figure(), tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []
