"""Pages: a result as one self-contained HTML file that is read in a browser, without a network.

``page(result, path)`` chooses by the kind of result, as ``draw`` does for figures;
``result.to_html(path)`` calls it.
"""

from __future__ import annotations

from tstlens.figures.browser.pages import page

__all__ = ["page"]
