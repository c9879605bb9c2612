"""``tstlens codebook fit`` and ``browse``: a folder that loads, a page that stands alone."""

from __future__ import annotations

from tests.test_cli import run
from tstlens import codebooks


def test_fitted_codebooks_are_saved_loaded_and_browsed(tmp_path, monkeypatch, capsys):
    folder, page = tmp_path / "books", tmp_path / "codes.html"
    given = ["codebook", "fit", "italy-power-demand", "--hook", "blocks.0.hook_mlp_out"]
    given += ["--out", str(folder), "--n-codes", "8", "--epochs", "1", "--sae-steps", "0"]
    status, printed, _ = run(monkeypatch, capsys, *given, "--quiet")
    assert not status and "random tables" in printed and f"saved  {folder}" in printed
    model = codebooks.load(folder)
    assert list(model.acts_to_codebooks) == ["blocks.0.hook_mlp_out"]
    assert (folder / "README.md").read_text().count(str(folder)) >= 2
    status, _, complaint = run(monkeypatch, capsys, *given)
    assert status and "holds a model already" in complaint
    status, _, _ = run(monkeypatch, capsys, "codebook", "browse", str(folder), "--out", str(page))
    assert not status and page.read_text().startswith("<!")
