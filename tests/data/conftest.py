"""What the tests of the data share."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """Turn jaxtyping's checks off, which would catch bad input before our own errors do."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
