"""Every annotation of tstlens checked as it is called, as often as a test suite can afford.

One check costs about 50 µs, and the suite makes some twenty million calls: of a function's calls in
one test the first two are checked, then every 50th. A check is prepared when it is first due, as
preparing all of them takes ten times as long as importing tstlens.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any

import jaxtyping

__name__ = "jaxtyping.sampled"  # tstlens.arguments.warn passes over jaxtyping's frames

calls: Counter[CodeType] = Counter()  # in this test; by code, as functions are made in functions
_jaxtyped: Callable[..., Any] = jaxtyping.jaxtyped


def sampled(function: Any = None, *, typechecker: Any) -> Any:
    """As ``jaxtyping.jaxtyped``, for some of the calls."""
    if function is None:
        return functools.partial(sampled, typechecker=typechecker)
    if inspect.isclass(function):
        return _jaxtyped(function, typechecker=typechecker)
    checked, code = None, function.__code__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checked
        calls[code] += 1
        if calls[code] > 2 and calls[code] % 50:
            return function(*args, **kwargs)
        if checked is None:
            checked = _jaxtyped(function, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call


def install() -> None:
    """From here on, what is imported of tstlens is checked."""
    jaxtyping.jaxtyped = sampled
    jaxtyping.install_import_hook("tstlens", "beartype.beartype")
