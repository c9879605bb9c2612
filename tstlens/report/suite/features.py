"""Part (c) of the suite: which feature? Dictionaries against sparse features that were planted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.data.planted import PlantedFeatures, Score, planted_features, score_features
from tstlens.randomness import seeded

N_FEATURES, WIDTH, ACTIVE = 32, 16, 2.0
_N_TEST = 4000


def feature_scores(
    seeds: Sequence[int], *, n_train: int = 20000, steps: int = 2000, progress: bool = True
) -> tuple[list[Score], dict[str, float]]:
    """Mean correlation of planted features with the latents of trained and untrained dictionaries.

    Twice as many features as dimensions, two of them active on average; every dictionary has as
    many latents as there are features, but for PCA, ICA and the neurons, which cannot.

    Args:
        seeds: of features, rows and dictionaries.
        n_train: activations that dictionaries are fitted on.
        steps: of each SAE.
        progress: show a bar.
    """
    scores: list[Score] = []
    for seed in tqdm(seeds, desc="feature", disable=not progress):
        train, test = (
            planted_features(
                n, n_features=N_FEATURES, width=WIDTH, active=ACTIVE, seed=seed, split=split
            )
            for split, n in enumerate((n_train, _N_TEST))
        )
        for method, (kind, latents) in _latents(train, test, steps, seed).items():
            value = score_features(latents, test.truth, n_shuffles=1, seed=seed).mcc
            scores.append(Score("sparse features", method, "MCC", seed, value, kind))
    return scores, {}


@seeded(0)
def _latents(
    train: PlantedFeatures, test: PlantedFeatures, steps: int, seed: int
) -> dict[str, tuple[str, Tensor]]:
    from sklearn.decomposition import PCA, FastICA

    from tstlens import saes
    from tstlens.saes.controls import random_dictionary

    rows, judged = train.activations, test.activations
    options = {"d_sae": N_FEATURES, "steps": steps, "seed": seed, "progress": False}
    topk = saes.fit(rows, "topk", k=round(ACTIVE), **options)
    penalised = saes.fit(rows, "standard", l1_coefficient=1.0, **options)
    random = random_dictionary(topk, rows, round(ACTIVE), seed=seed)
    pca = PCA(random_state=seed).fit(rows.numpy())
    ica = FastICA(random_state=seed, whiten="unit-variance", max_iter=1000).fit(rows.numpy())
    generator = torch.Generator().manual_seed(seed + 41)
    with torch.no_grad():
        return {
            "SAE, TopK": ("method", topk.encode(judged)),
            "SAE, L1": ("method", penalised.encode(judged)),
            "ICA": ("method", torch.from_numpy(ica.transform(judged.numpy()))),
            "PCA": ("trivial", torch.from_numpy(pca.transform(judged.numpy()))),
            "neurons": ("trivial", judged),
            "random dictionary": ("random", random.encode(judged)),
            "noise": ("random", torch.randn(len(judged), N_FEATURES, generator=generator)),
            "the features themselves": ("answer", test.truth),
        }
