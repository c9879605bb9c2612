"""What every test shares: run-time shape checks, seeds, the reference folder, reasons to skip."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

from tests import shape_checks

REPOSITORY = Path(__file__).resolve().parents[1]

# Every annotation of tstlens is checked when a test calls it. The hook has to be in place before
# the first import of tstlens, hence here. TSTLENS_TYPECHECK=0 turns it off.
# Benchmarks measure what users run, so a run of theirs goes without.
BENCHMARKS = any("benchmarks" in argument for argument in sys.argv)
TYPECHECKED = os.environ.get("TSTLENS_TYPECHECK", "1") != "0" and not BENCHMARKS
if TYPECHECKED:
    shape_checks.install()

# Folders with the source code of model families whose pins conflict with ours: tests that compare
# with the original import it from there, and are skipped where this is not set.
sys.path.extend(filter(None, os.environ.get("TSTLENS_SOURCES", "").split(os.pathsep)))

settings.register_profile("tstlens", derandomize=True, deadline=None)
settings.load_profile("tstlens")


def _why_no_saes() -> str | None:
    """The reason why sae-lens cannot be imported here, or None where it can."""
    if importlib.util.find_spec("sae_lens") is None:
        return "sae-lens is not installed: pip install 'tstlens[saes]'"
    version = importlib.metadata.version("transformer-lens")
    if int(version.split(".")[0]) >= 4:
        return f"sae-lens does not import beside TransformerLens {version}"
    return None


def _why_no_browser() -> str | None:
    """The reason why kaleido cannot draw here, or None where it can."""
    if importlib.util.find_spec("kaleido") is None:
        return "kaleido is not installed"
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    if os.environ.get("BROWSER_PATH") or any(shutil.which(name) for name in names):
        return None
    return "no Chrome or Chromium on the path, and BROWSER_PATH is not set"


NO_SAES = _why_no_saes()
NO_BROWSER = _why_no_browser()
NO_NETWORK = (
    None if os.environ.get("TSTLENS_NETWORK") == "1" else "downloads: set TSTLENS_NETWORK=1 to run"
)


def pytest_report_header() -> list[str]:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformer-lens", "sae-lens", "aeon", "plotly")
        if name != "sae-lens" or importlib.util.find_spec("sae_lens") is not None
    )
    notes = [f"not run: {why}" for why in (NO_SAES, NO_BROWSER, NO_NETWORK) if why]
    checks = "on" if TYPECHECKED else "off (TSTLENS_TYPECHECK=0)"
    return [f"tstlens: {versions}; run-time shape checks {checks}", *notes]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the folders that import sae-lens, where it cannot be imported (see the header)."""
    if NO_SAES and collection_path.parent == REPOSITORY / "tests":
        return True if collection_path.name in {"saes", "codebooks"} else None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {"saes": NO_SAES, "browser": NO_BROWSER, "network": NO_NETWORK}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The longest file first, so that no process is left alone with it at the end.
        items.sort(key=lambda item: item.path.name != "test_tutorials.py")


def _seed() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _seed()
    shape_checks.calls.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Again: what a test draws must not depend on which fixtures were made for it."""
    _seed()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that the tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """Weights and published results of an outside classifier (see CONTRIBUTING), or a skip."""
    home = os.environ.get("TSTLENS_REFERENCE", REPOSITORY.parent / "shared" / "reference")
    folder = Path(home) / "kalnare"
    if not folder.is_dir():
        pytest.skip(f"the reference results are not part of the repository; looked in {folder}")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as the tests' only wait for each other on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """Turn jaxtyping's checks off, which would catch bad input before our own errors do."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
