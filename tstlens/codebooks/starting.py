"""Where a table's entries begin: real activations, or the centroids of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tstlens.arguments import checked
from tstlens.codebooks.codebook import Codebook
from tstlens.codebooks.config import CodebookConfig
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.randomness import seeded
from tstlens.saes.harvest import ActivationRows

Start = Literal["kmeans", "sample", "normal"]

MOST_ROWS = 50_000  # activations that k-means reads


@checked
def start(
    model: HookedTST,
    data: TimeSeriesData,
    hooks: Iterable[str],
    config: CodebookConfig,
    how: Start = "kmeans",
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Codebook]:
    """Codebooks for several hook points, their tables made of the model's activations.

    Nothing is trained, and nothing stays on the model: put them in with ``model.codebooks(...)``.

    Args:
        model: its activations as it is, with what is spliced in.
        data: series, with their mask; padded positions are left out.
        hooks: the hook points.
        config: of every codebook; ``d_in=0`` and ``n_groups=0`` ask the hook point.
        how: ``"kmeans"`` takes centroids, ``"sample"`` activations drawn without replacement,
            ``"normal"`` numbers drawn at random; group by group.
        seed: of the draw and of k-means.
        batch_size: series per forward pass.

    Returns:
        Hook point -> codebook.

    Raises:
        ArgumentError: fewer activations than codes, or a way to start that is not known.
        UnknownHookError: the model has no such hook point.

    Example:
        >>> from tstlens import HookedTST, codebooks, load_dataset
        >>> model = HookedTST.from_pretrained("italy-power-demand")
        >>> data = load_dataset("ItalyPowerDemand", split="train")
        >>> config = codebooks.CodebookConfig(n_codes=16, k=1)
        >>> list(codebooks.start(model, data, ["blocks.0.hook_mlp_out"], config))
        ['blocks.0.hook_mlp_out']
    """
    if how not in get_args(Start):
        known = ", ".join(get_args(Start))
        raise ArgumentError(f"expected one of {known} to start from, got {how!r}")
    with model.codebooks():  # what is put in here comes out again
        books = model.add_codebooks(config, hooks)
    if how == "normal":
        return books
    for name, book in books.items():
        rows = activations(model, data, name, batch_size).view(-1, book.cfg.d_in)
        if how == "sample":
            book.sample(rows, seed)
        else:
            _centroids(book, rows, seed)
    return books


def activations(model: HookedTST, data: TimeSeriesData, hook: str, batch_size: int = 256) -> Tensor:
    """The observed activations of a hook point, [row, width], heads joined."""
    rows = ActivationRows(model, data, [hook])
    batches = torch.arange(len(rows)).split(batch_size)
    return torch.cat([rows(index)[0][hook] for index in batches])


@torch.no_grad()
@seeded(0)
def _centroids(book: Codebook, rows: Tensor, seed: int) -> None:
    """k-means in every group; with cosine similarity, of directions."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    book.sample(rows, seed)  # codes that no cluster takes keep an activation
    if len(rows) > MOST_ROWS:
        generator = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(len(rows), generator=generator)[:MOST_ROWS].to(rows.device)]
    given = book.as_seen(rows)
    for group in range(book.n_groups):
        part = given[:, group].double().cpu().numpy()
        points: Any = part
        if book.cfg.similarity == "cosine":
            points = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than codes
            options: dict[str, Any] = {"n_init": 1, "batch_size": 4096, "max_iter": 50}
            means = MiniBatchKMeans(book.n_codes, random_state=seed, **options).fit(points)
        of_row = means.predict(points)
        counts = np.bincount(of_row, minlength=book.n_codes)
        sums = np.zeros((book.n_codes, part.shape[1]))
        np.add.at(sums, of_row, part)
        taken = torch.as_tensor(counts > 0)
        centroids = torch.as_tensor(sums / np.maximum(counts, 1)[:, None])
        table = book.table[group]
        table[taken.to(table.device)] = centroids[taken].to(table) / book.k
