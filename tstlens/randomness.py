"""The caller's random state, left alone: what draws from it, and is not ours, draws in here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from the global state of torch, NumPy and Python repeat; afterwards it is as it was.

    For what draws from there and cannot be told otherwise (initial weights, dropout, captum,
    scikit-learn). Whatever can be given a generator gets one of its own.
    """
    cuda = torch.cuda.is_initialized()
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    kept_cuda = torch.cuda.get_rng_state_all() if cuda else []
    try:
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
        if cuda:
            torch.cuda.set_rng_state_all(kept_cuda)
