"""The loss of a model's output: what ``return_type="loss"`` gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.shapes import Labels


class HasLoss:
    """The part of a model that compares its output with labels or true values."""

    cfg: Any

    def loss(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Mean cross-entropy (nats) of a classifier, mean squared error of a forecaster."""
        if target is None:
            raise ArgumentError("return_type='loss' needs target=: labels or true values")
        for name, given in (("output", output), ("target", target)):
            if not isinstance(given, Tensor):
                raise LabelError(
                    f"expected {name} as a tensor, got {type(given).__name__}; "
                    f"try torch.as_tensor({name})"
                )
        if target.is_floating_point() and self.cfg.n_classes is None:
            if target.shape != output.shape:
                raise SeriesShapeError(
                    f"expected a target like the output {list(output.shape)}, "
                    f"got {list(target.shape)}"
                )
            return nn.functional.mse_loss(output, target)
        if target.is_floating_point() or output.ndim != 2:
            kind = "integer labels [batch]" if output.ndim == 2 else "a float target"
            raise LabelError(
                f"expected {kind} for an output {list(output.shape)}, "
                f"got {target.dtype} {list(target.shape)}"
            )
        self.check_labels(target, len(output), output.shape[1])
        return nn.functional.cross_entropy(output, target.long())

    @staticmethod
    def check_labels(labels: Labels, n: int, n_classes: int) -> None:
        """Raise :class:`LabelError` unless labels are [n] within 0..n_classes-1."""
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise LabelError(f"expected integer labels as a tensor [{n}], got {got}")
        if labels.ndim != 1 or len(labels) != n:
            raise LabelError(f"expected one label per series [{n}], got {list(labels.shape)}")
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
            bad = labels[(labels < 0) | (labels >= n_classes)][0]
            raise LabelError(f"expected labels in 0..{n_classes - 1}, got {int(bad)}")
