"""The five parts of the suite, each a function from seeds to scores and what was checked first.

- which samples decide? Every input explanation against a planted mask;
- which component? Circuit methods against circuits that are known;
- which feature? Dictionaries against sparse features that were planted;
- which state? Codes of a model of a regime machine against its states;
- do 95 % intervals cover? Simulated effects whose mean is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.data import Pairs
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching import attribution, logit, logit_diff, sweep, window_sweep
from tstlens.patching.circuits import (
    Circuit,
    ComponentGraph,
    component_graph,
    edge_attribution,
    edge_sweep,
)
from tstlens.patching.windows import shares, window_places
from tstlens.probing import attribute, prediction_difference
from tstlens.randomness import seeded
from tstlens.stats import mean_interval, percentile_interval, t_interval
from tstlens.truth.components import ComponentTask, component_task
from tstlens.truth.features import PlantedFeatures, planted_features
from tstlens.truth.regime import RegimeMachine, RegimeSeries
from tstlens.truth.scores import Score, score_features, score_states, score_where
from tstlens.truth.tasks import PlantedTask
from tstlens.truth.training import fit_next_patch, fit_planted, regime_model, score_next_patch
from tstlens.zoo.converting import convert

LEARNED = 0.95  # accuracy from which a model has an answer that a method can be right about
_HELD_OUT = 2  # references that attributions never see, for the prediction difference


@dataclass(frozen=True, eq=False)
class Explained:
    """What is explained: some test series of one model.

    Args:
        model: the trained model.
        task: the series, their labels and the mask of deciding samples.
        references: [reference, series, channel, time], what samples are replaced by: backgrounds
            of training series, which hold no motif.
        held_out: the same, for the prediction difference alone.
        seed: of everything random.
    """

    model: HookedTST
    task: PlantedTask
    references: Tensor
    held_out: Tensor
    seed: int

    @property
    def repeated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Series, references and labels, one row per series and reference."""
        n = len(self.references)
        return (
            self.task.series.repeat(n, 1, 1),
            self.references.flatten(0, 1),
            self.task.labels.repeat(n),
        )

    def averaged(self, rows: Tensor) -> Tensor:
        """Rows of `repeated` as a mean over references, [series, ...]."""
        return rows.unflatten(0, (len(self.references), -1)).mean(0)


def explained(
    name: str, seed: int, n_series: int, n_references: int, progress: bool
) -> tuple[Explained, float]:
    """A model trained on a task, test series to explain, and its accuracy on all test series."""
    source, task, evaluation, _ = fit_planted(name, seed, progress=progress)
    model = convert(source, class_names=task.class_names)
    generator = torch.Generator().manual_seed(seed)
    n_needed = n_references + _HELD_OUT
    rows = torch.randint(len(task), (n_needed, n_series), generator=generator)
    backgrounds = task.background[rows]
    part = task.test[:n_series]
    return (
        Explained(model, part, backgrounds[:n_references], backgrounds[n_references:], seed),
        float(evaluation.accuracy),
    )


def maps(what: Explained) -> dict[str, tuple[str, Tensor]]:
    """Method -> kind of row and map [series, channel, time], larger where it matters more."""
    series = what.task.series
    generator = torch.Generator().manual_seed(what.seed + 17)
    gradients = _attributed(what, "integrated_gradients", "time")
    return {
        "causal patching, windows taken away": ("method", windows(what, away=True)),
        "causal patching, windows put in": ("method", windows(what, away=False)),
        "causal patching, single samples": ("method", _samples(what)),
        "causal patching, embedding": ("method", _embedding(what, exact=True)),
        "attribution patching, embedding": ("method", _embedding(what, exact=False)),
        "integrated gradients": ("method", gradients),
        "integrated gradients, same windows": ("method", over_windows(gradients)),
        "GradientSHAP": ("method", _gradient_shap(what)),
        "permutation SHAP, patches": ("method", _attributed(what, "permutation_shap", "patch")),
        "occlusion, patches": ("method", _attributed(what, "occlusion", "patch")),
        "distance from the mean": ("trivial", (series - what.references.mean((0, 1))).abs()),
        "random order": ("random", torch.rand(series.shape, generator=generator)),
        "the mask itself": ("answer", what.task.mask.float()),
    }


def windows(what: Explained, away: bool) -> Tensor:
    """Shares of samples in the effects of windows, see :func:`tstlens.patching.window_sweep`.

    Args:
        what: the model and series.
        away: windows of the series become the reference's; False puts the series' windows into the
            reference.
    """
    series, references, labels = what.repeated
    clean, corrupted = (references, series) if away else (series, references)
    found = window_sweep(what.model, clean, corrupted, logit(labels), progress=False)
    return what.averaged(found.effect()) * (-1 if away else 1)


def over_windows(values: Tensor) -> Tensor:
    """What `windows` would make of effects that add up: it tells what smoothing alone does."""
    n_series, _, n_time = values.shape
    inside = window_places(n_time)
    observed = torch.ones(n_series, n_time, dtype=torch.bool)
    sums = values.double() @ inside.double().T
    return shares(sums, inside, observed)[0].to(values.dtype)


def _samples(what: Explained) -> Tensor:
    series, references, labels = what.repeated
    axes = ("channel", "time")
    found = sweep(what.model, references, series, "series", axes, logit(labels), progress=False)
    return -what.averaged(found.effect())


def _embedding(what: Explained, exact: bool) -> Tensor:
    series, references, labels = what.repeated
    find: Any = sweep if exact else attribution
    found = find(what.model, references, series, "embed", ("pos",), logit(labels), progress=False)
    return -_spread(what, what.averaged(found.effect())[:, None])


def _attributed(what: Explained, method: str, unit: Any) -> Tensor:
    """captum's or shap's values, a mean over the references as baselines."""
    found = [
        attribute(
            what.model,
            what.task.series,
            what.task.labels,
            method=method,
            baseline=reference,
            unit=unit,
            n_steps=32,
            n_samples=1,  # permutations per reference, each walked both ways
            seed=what.seed + number,
            progress=False,
        ).values
        for number, reference in enumerate(what.references)
    ]
    values = torch.stack(found).mean(0)
    return values if unit == "time" else _spread(what, values)


def _gradient_shap(what: Explained) -> Tensor:
    return attribute(
        what.model,
        what.task.series,
        what.task.labels,
        method="gradient_shap",
        baseline="samples",
        background=what.references.flatten(0, 1),
        unit="time",
        seed=what.seed,
        progress=False,
    ).values


def _spread(what: Explained, values: Tensor) -> Tensor:
    """Values by position as values by sample; a map without channels is the same for each."""
    _, n_channels, n_time = what.task.series.shape
    cells = [what.model.time_cell(pos, n_time) for pos in range(values.shape[2])]
    lengths = torch.tensor([cell.stop - cell.start for cell in cells])
    return values.repeat_interleave(lengths, dim=2).expand(-1, n_channels, -1)


def lost_probability(what: Explained, found: Tensor) -> float:
    """Prediction difference with as many entries replaced, by another background, as decide."""
    falls = prediction_difference(
        what.model,
        what.task.series,
        what.task.labels,
        found.abs(),
        n_top=what.task.mask.flatten(1).sum(1),
        replacement=what.held_out,
        unit="time",
    )
    return float(falls.mean())


def where_scores(
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    n_series: int = 24,
    n_references: int = 4,
    progress: bool = True,
) -> tuple[list[Score], dict[str, float]]:
    """AUPRC and prediction difference of every method, and the accuracy of every model.

    A model below 95 % is not scored on; its accuracy is in the checks all the same.

    Args:
        names: where-tasks.
        seeds: of task, model and references.
        n_series: test series explained per model.
        n_references: backgrounds that samples are replaced by.
        progress: show a bar.

    Returns:
        Scores, and "accuracy, task, seed" -> accuracy.
    """
    scores, checks = [], {}
    todo = [(name, seed) for name in names for seed in seeds]
    for name, seed in tqdm(todo, desc="where", disable=not progress):
        what, accuracy = explained(name, seed, n_series, n_references, False)
        checks[f"accuracy, {name}, seed {seed}"] = accuracy
        if accuracy < LEARNED:
            continue
        for method, (kind, found) in maps(what).items():
            values = {
                "AUPRC": score_where(found, what.task.mask).mean,
                "prediction difference": lost_probability(what, found),
            }
            scores += [
                Score(name, method, measure, seed, value, kind) for measure, value in values.items()
            ]
    return scores, checks


FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, for the faithfulness curve


@dataclass(frozen=True, eq=False)
class Asked:
    """What methods are asked about.

    Args:
        task: model, graph and series.
        graph: all nodes and edges.
        pairs: that methods see.
        judged: others, that circuits are judged on.
        seed: of everything random.
    """

    task: ComponentTask
    graph: ComponentGraph
    pairs: Pairs
    judged: Pairs
    seed: int

    @property
    def runs(self) -> tuple[Tensor, Tensor]:
        """Clean and corrupted series."""
        return self.pairs.clean, self.pairs.corrupted

    @property
    def true_edges(self) -> Tensor:
        """bool [edge], with all parts where the planted graph does not tell them apart."""
        return torch.tensor([self.name_of(edge) in self.task.graph.edges for edge in self._names])

    @property
    def true_nodes(self) -> Tensor:
        """bool [sender]."""
        return torch.tensor([node.name in self.task.graph.nodes for node in self.graph.senders])

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(edge.name for edge in self.graph.edges)

    def name_of(self, edge: str) -> str:
        """An edge as the planted graph names it: ``pos1->L0H0.v``, or without its part."""
        return edge if self.task.graph.parts else edge.partition(".")[0]

    def collapsed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes of the edges that the planted graph tells apart, and which one each edge is."""
        names = [self.name_of(edge) for edge in self._names]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        group = torch.tensor([numbers[name] for name in names])
        sizes = torch.zeros(len(numbers), dtype=scores.dtype)
        return sizes.scatter_reduce(0, group, scores.abs(), "amax"), group


def metric_of(pairs: Pairs) -> Metric:
    """Logit of the clean series' class minus that of the corrupted one's."""
    other = pairs.target if pairs.predicted is None else pairs.predicted
    return logit_diff(pairs.target, other)


def asked(task: ComponentTask, n_pairs: int, seed: int) -> Asked:
    """Pairs to find circuits on, and others to judge them on."""
    pairs, judged = (task.pairs(n_pairs, seed=first + seed) for first in (1000, 2000))
    graph = component_graph(task.model, pairs.clean.shape[2])
    return Asked(task, graph, pairs, judged, seed)


def edge_scores(what: Asked) -> dict[str, tuple[str, Tensor, Tensor]]:
    """Method -> kind of row, scores of edges [edge] and of nodes [sender]."""
    model, metric = what.task.model, metric_of(what.pairs)
    generator = torch.Generator().manual_seed(what.seed + 29)
    found: dict[str, tuple[str, Tensor, Tensor]] = {}

    def by_edge(method: str, effects: Tensor, kind: str = "method") -> None:
        found[method] = (kind, effects, _outgoing(what.graph, effects))

    def by_node(method: str, nodes: Tensor, kind: str = "method") -> None:
        found[method] = (kind, _weaker_end(what.graph, nodes), nodes)

    runs = (model, *what.runs)
    exact = edge_sweep(*runs, metric, progress=False)
    by_edge("edge patching, exact", exact.effect().mean(0))
    for steps, method in ((0, "edge attribution (EAP)"), (5, "edge attribution (EAP-IG)")):
        estimate = edge_attribution(*runs, metric, steps, progress=False)
        by_edge(method, estimate.effect().mean(0))
    for find, method in ((sweep, "node patching, exact"), (attribution, "node attribution")):
        effects = [
            find(*runs, site, axes, metric, progress=False).effect().mean(0)
            for site, axes in (("embed", ("pos",)), ("z", ("layer", "head")))
        ]
        mlps = find(*runs, "mlp_out", ("layer",), metric, progress=False).effect().mean(0)
        layers = torch.cat([effects[1], mlps[:, None]], 1)  # heads, then the MLP, layer by layer
        by_node(method, torch.cat([effects[0], layers.flatten()]))
    by_node("size of the change", _changes(what), "trivial")
    by_edge("random", torch.randn(len(what.graph.edges), generator=generator), "random")
    by_edge("the graph itself", what.true_edges.float(), "answer")
    return found


def _outgoing(graph: ComponentGraph, effects: Tensor) -> Tensor:
    """A node counts as much as its strongest edge out."""
    sizes = torch.zeros(len(graph.senders), dtype=effects.dtype)
    return sizes.scatter_reduce(0, graph.index[:, 0], effects.abs(), "amax")


def _weaker_end(graph: ComponentGraph, nodes: Tensor) -> Tensor:
    """Node methods have no edges: an edge counts as much as the weaker of its two nodes."""
    places = {node.name: number for number, node in enumerate(graph.senders)}
    sizes = nodes.abs()
    return torch.stack(
        [
            sizes[sender]
            if graph.receivers[receiver][0].kind == "output"
            else torch.minimum(sizes[sender], sizes[places[graph.receivers[receiver][0].name]])
            for sender, receiver in graph.index.tolist()
        ]
    )


@torch.no_grad()
def _changes(what: Asked) -> Tensor:
    """How much each node's output differs between the two series: no effect on anything asked."""
    model: Any = what.task.model
    layers = range(model.cfg.n_layers)
    names = ["hook_embed", *(f"blocks.{layer}.attn.hook_z" for layer in layers)]
    names += [f"blocks.{layer}.hook_mlp_out" for layer in layers]
    clean, corrupted = (model.run_with_cache(run, names_filter=names)[1] for run in what.runs)
    sizes = [(clean["hook_embed"] - corrupted["hook_embed"]).norm(dim=-1).mean(0)]
    for layer in layers:
        z = f"blocks.{layer}.attn.hook_z"
        written = torch.einsum(
            "nphd,hdm->nphm", clean[z] - corrupted[z], model.blocks[layer].attn.W_O
        )
        sizes.append(written.norm(dim=(1, 3)).mean(0))
        mlp = f"blocks.{layer}.hook_mlp_out"
        sizes.append((clean[mlp] - corrupted[mlp]).norm(dim=(1, 2)).mean(0)[None])
    return torch.cat(sizes)


@seeded(0)
def score_edges(what: Asked, edges: Tensor, nodes: Tensor) -> dict[str, float]:
    """AUROC of edges and nodes, and how faithful the edges are on pairs they were not found on.

    ``"faithfulness"`` keeps as many edges as the planted graph has; 1 is what the whole model
    does, and less than 1 is also what the planted graph itself gets where others do a little.
    ``"CMD"`` is the area between the curve of growing circuits and 1: smaller is better.
    """
    from sklearn.metrics import roc_auc_score

    sizes, group = what.collapsed(edges)
    truth, _ = what.collapsed(what.true_edges.float())
    n_true = int(truth.sum())
    strongest = torch.argsort(sizes, descending=True, stable=True)[:n_true]
    kept = torch.isin(group, strongest)
    metric = metric_of(what.judged)
    circuit = Circuit(what.graph, edges.double(), kept, metric.name, metric.unit)
    faithful = circuit.faithfulness(
        what.task.model, what.judged, metric=metric, fractions=FRACTIONS, progress=False
    )
    return {
        "edge AUROC": float(roc_auc_score(truth.numpy(), sizes.numpy())),
        "node AUROC": float(roc_auc_score(what.true_nodes.numpy(), nodes.abs().numpy())),
        "faithfulness": faithful.of_circuit,
        "CMD": faithful.cmd,
    }


def component_scores(
    names: Sequence[str], seeds: Sequence[int], *, n_pairs: int = 48, progress: bool = True
) -> tuple[list[Score], dict[str, float]]:
    """AUROC and faithfulness of every method, and how well each graph holds.

    A task whose graph does not hold under interchange interventions in 99 % of the held-out pairs
    is not scored on; the share is in the checks all the same.

    Args:
        names: of :func:`tstlens.model.planted.component_names`.
        seeds: of models and pairs.
        n_pairs: that methods see, and as many that circuits are judged on.
        progress: show a bar.

    Returns:
        Scores, and "interchange, task, seed" -> the lowest accuracy over interventions.
    """
    scores, checks = [], {}
    todo = [(name, seed) for name in names for seed in seeds]
    for name, seed in tqdm(todo, desc="component", disable=not progress):
        task = component_task(name, seed, progress=False)
        verified = task.verify(seed=seed)
        checks[f"interchange, {name}, seed {seed}"] = verified.worst
        if not verified.holds:
            continue
        what = asked(task, n_pairs, seed)
        for method, (kind, edges, nodes) in edge_scores(what).items():
            scores += [
                Score(name, method, measure, seed, value, kind)
                for measure, value in score_edges(what, edges, nodes).items()
            ]
    return scores, checks


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
    from tstlens.saes.scoring import random_dictionary

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


HOOK = "blocks.1.hook_resid_post"
_N_POS = 16
_SEEDS = (2**22, 2**23, 2**24)  # of series to fit, to choose states of codes, and to report on


def state_scores(
    seeds: Sequence[int],
    *,
    steps: int = 2000,
    n_fit: int = 2000,
    n_score: int = 400,
    codes_per_state: int = 2,
    sae_steps: int = 2000,
    progress: bool = True,
) -> tuple[list[Score], dict[str, float]]:
    """NMI and precision of codes of a trained model, at one hook point in its middle.

    All rows give one of at most as many codes to every position; what a code stands for is chosen
    on other series than those of the report. Tuned codebooks are those of another model, trained
    together with its codes: they show what that buys, not what the frozen model holds.

    Args:
        seeds: of machine, model and codes.
        steps: of the model's training.
        n_fit: series that codes are fitted on.
        n_score: series of each of the two samples of the scores.
        codes_per_state: size of every table.
        sae_steps: of the SAE's training.
        progress: show a bar.

    Returns:
        Scores, and "share of the possible, seed" -> valid-transition mass of the model, from 0
        (what the patch alone allows) to 1 (the best possible).
    """
    scores, checks = [], {}
    for seed in tqdm(seeds, desc="state", disable=not progress):
        machine = RegimeMachine(seed=seed)
        model = regime_model(machine, n_pos=_N_POS, seed=seed)
        fit_next_patch(model, machine, n_pos=_N_POS, steps=steps, seed=seed, progress=False)
        fitted, choice, report = (
            machine.sample(n, _N_POS, seed=first + seed)
            for n, first in zip((n_fit, n_score, n_score), _SEEDS, strict=True)
        )
        mass = score_next_patch(model, machine, report)
        floor, top = mass.patch_only.mean(), mass.best.mean()
        share = (mass.valid_mass.mean() - floor) / (top - floor)
        checks[f"share of the possible, seed {seed}"] = float(share)
        n_codes = codes_per_state * machine.n_states
        samples = (fitted, choice, report)
        for method, (kind, on_choice, on_report) in _codes(
            model, machine, samples, n_codes, sae_steps, seed
        ).items():
            found = score_states(
                on_report, report.states, chosen_on=(on_choice, choice.states), n_shuffles=1
            )
            for measure, value in (("NMI", found.nmi), ("precision", found.purity)):
                scores.append(Score("regime machine", method, measure, seed, value, kind))
    return scores, checks


@seeded(0)
def _codes(
    model: HookedTST,
    machine: RegimeMachine,
    samples: tuple[RegimeSeries, RegimeSeries, RegimeSeries],
    n_codes: int,
    sae_steps: int,
    seed: int,
) -> dict[str, tuple[str, Tensor, Tensor]]:
    """Method -> kind of row, and codes [series, pos] of the last two samples."""
    from sklearn.cluster import KMeans

    from tstlens import codebooks, saes
    from tstlens.truth.regime_codebooks import fit_regime

    fitted, choice, report = samples
    rows = activations(model, fitted, HOOK)
    flat = rows.flatten(0, 1)
    sae = saes.fit(flat, "topk", d_sae=n_codes, k=4, steps=sae_steps, seed=seed, progress=False)
    kmeans = KMeans(n_codes, n_init="auto", random_state=seed).fit(flat.numpy())
    neurons = f"{HOOK.rsplit('.', 1)[0]}.mlp.hook_post"
    hidden = activations(model, fitted, neurons).flatten(0, 1)
    mean, spread = hidden.mean(0), hidden.std(0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed + 53)
    table = flat.mean(0) + flat.std(0) * torch.randn(n_codes, flat.shape[1], generator=generator)
    frozen, tuned = copy.deepcopy(model), copy.deepcopy(model)
    options = {"n_codes": n_codes, "seed": seed, "progress": False}
    codebooks.fit(
        frozen, fitted, [HOOK], similarity="euclidean", gradient="reconstruction", epochs=4,
        **options,
    )  # fmt: skip
    fit_regime(tuned, machine, [HOOK], n_series=len(fitted), **options)

    def strongest(data: RegimeSeries) -> Tensor:
        return sae.encode(activations(model, data, HOOK)).argmax(-1)

    def clusters(data: RegimeSeries) -> Tensor:
        found = activations(model, data, HOOK)
        return torch.from_numpy(kmeans.predict(found.flatten(0, 1).numpy())).view(found.shape[:2])

    def neuron(data: RegimeSeries) -> Tensor:
        return ((activations(model, data, neurons) - mean) / spread).argmax(-1)

    def codes_of(which: HookedTST) -> Callable[[RegimeSeries], Tensor]:
        return lambda data: which.code_ids(data.series)[HOOK][..., 0]

    def by_table(data: RegimeSeries) -> Tensor:
        return torch.cdist(activations(model, data, HOOK), table).argmin(-1)

    readers: dict[str, tuple[str, Callable[[RegimeSeries], Tensor]]] = {
        "codebook, tuned with the model": ("method", codes_of(tuned)),
        "codebook, model frozen": ("method", codes_of(frozen)),
        "k-means": ("method", clusters),
        "SAE, strongest latent": ("method", strongest),
        "neurons, strongest": ("trivial", neuron),
        "nearest prototype of the patch": (
            "trivial",
            lambda data: machine.nearest_prototype(data.patches),
        ),
        "random table": ("random", by_table),
        "shuffled k-means": ("random", lambda data: _shuffled(clusters(data), generator)),
        "best possible reader": ("answer", machine.most_probable_states),
    }
    with torch.no_grad():
        return {
            method: (kind, read(choice), read(report)) for method, (kind, read) in readers.items()
        }


@torch.no_grad()
def activations(model: HookedTST, data: RegimeSeries, hook: str) -> Tensor:
    """[series, pos, width] at a hook point."""
    return model.run_with_cache(data.series, names_filter=[hook])[1][hook]


def _shuffled(ids: Tensor, generator: torch.Generator) -> Tensor:
    return ids.flatten()[torch.randperm(ids.numel(), generator=generator)].view(ids.shape)


LEVEL = 0.95
TAILS = ("constant", "normal", "t3", "lognormal")
_MEANS = {"lognormal": float(np.exp(0.5))}  # of an effect that is there; 1 for the others


def coverage_scores(
    seeds: Sequence[int],
    *,
    sizes: Sequence[int] = (5, 8, 12, 24, 50),
    shares: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 1.0),
    tails: Sequence[str] = TAILS,
    repeats: int = 400,
    n_boot: int = 1000,
    progress: bool = True,
) -> tuple[list[Score], dict[str, float]]:
    """How often nominal 95 % intervals of a mean effect cover it.

    Args:
        seeds: of samples and resamples.
        sizes: independent series in a sample.
        shares: of series that have an effect at all; it is 0 in the others.
        tails: of the effects there are: all 1, normal around 1, t with 3 degrees of freedom
            around 1, lognormal.
        repeats: samples of every seed.
        n_boot: resamples.
        progress: show a bar.
    """
    scores: list[Score] = []
    cells = [(tail, share, n) for tail in tails for share in shares for n in sizes]
    for seed in seeds:
        for tail, share, n in tqdm(cells, desc=f"coverage {seed}", disable=not progress):
            place = [seed, TAILS.index(tail), round(1e6 * share), n]
            generator = np.random.default_rng(place)
            effects = drawn(tail, share, (n, repeats), generator)
            truth = share * _MEANS.get(tail, 1.0)
            own = mean_interval(effects, level=LEVEL, n_boot=n_boot, seed=generator)
            nowhere = np.where(np.isfinite(own[0]), 0.0, np.nan)
            low, high = t_interval(effects, LEVEL)
            found = {
                "tstlens": own,
                "plain t, the same samples": (low + nowhere, high),
                "plain t": (low, high),
                "percentile bootstrap": percentile_interval(effects, LEVEL, n_boot, generator),
            }
            task, measure = f"{tail}, {100 * share:g} % active", f"{n} series"
            for method, (low, high) in found.items():
                given = np.isfinite(low)
                covered = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
                if given.any():
                    kind = "method" if method == "tstlens" else "trivial"
                    value = float(covered[given].mean())
                    scores.append(Score(task, method, measure, seed, value, kind))
            without = float(np.isnan(nowhere).mean())
            scores.append(Score(task, "samples without one", measure, seed, without, "answer"))
    return scores, {}


def drawn(
    tail: str, share: float, shape: tuple[int, int], generator: np.random.Generator
) -> Float[np.ndarray, "series sample"]:
    """Effects of which a share is there and the others are 0."""
    there = generator.random(shape) < share
    effects = {
        "constant": lambda: np.ones(shape),
        "normal": lambda: 1 + generator.normal(size=shape),
        "t3": lambda: 1 + generator.standard_t(3, size=shape),
        "lognormal": lambda: generator.lognormal(size=shape),
    }[tail]()
    return np.where(there, effects, 0.0)
