"""Fits that diverge: an error, and the weights as they last were finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from tstlens.errors import ArgumentError


class LastGood:
    """What a fit trains in place, and its last finite weights.

    Args:
        module: what is trained.
        lr: learning rate, for the error.
    """

    def __init__(self, module: nn.Module, lr: float) -> None:
        self.module, self.lr = module, lr
        self.state: Mapping[str, Any] = copy.deepcopy(module.state_dict())

    def check_loss(self, loss: float, when: str) -> None:
        """Before a step is taken by it.

        Raises:
            ArgumentError: the loss is not finite; the last finite weights are put back.
        """
        if not math.isfinite(loss):
            self.refuse(f"the loss is no longer finite {when} (it was {loss})")

    def keep(self, when: str) -> None:
        """Look at the weights and remember them.

        Raises:
            ArgumentError: they are not finite; the last ones that were are put back.
        """
        if not all_finite(self.module):
            self.refuse(f"the weights are no longer finite {when}")
        self.state = copy.deepcopy(self.module.state_dict())

    def refuse(self, what: str) -> NoReturn:
        """Put the last finite weights back and raise :class:`ArgumentError`."""
        self.module.load_state_dict(self.state, strict=False)  # something may be spliced in
        self.module.eval()
        raise ArgumentError(
            f"lr: {what}; try a lower lr than {self.lr:g}. The last finite weights were put back"
        )


def all_finite(module: nn.Module) -> bool:
    """Whether every weight is finite."""
    return all(bool(weight.isfinite().all()) for weight in module.parameters())
