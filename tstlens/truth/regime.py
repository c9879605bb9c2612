"""RegimeMachine: series from a finite-state machine whose states a single patch does not tell.

Each patch of a series is written by a state; several states write the same prototype. Who reads
one patch knows the prototype but not the state, and so not which patches may follow; who
remembers the patches before it does. The states of every position come along.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tstlens.arguments import Count, Seed, check_fields, checked
from tstlens.data.series import TimeSeriesData
from tstlens.data.validate import row_indices
from tstlens.errors import ArgumentError, SeriesShapeError

_MOST_PATHS = 2_000_000  # of states


class RegimeBounds(NamedTuple):
    """The best that is possible from the last few patches, without noise.

    Args:
        accuracy: of the most probable next prototype.
        valid_mass: probability that the best forecast puts on prototypes that may follow.
        state_accuracy: of the most probable state now.
    """

    accuracy: float
    valid_mass: float
    state_accuracy: float


@dataclass(frozen=True, eq=False, repr=False)
class RegimeSeries(TimeSeriesData):
    """Series of a `RegimeMachine`, with the state behind every patch.

    Args:
        states: ``[n, pos]`` the state that wrote each patch.
        patch_len: samples in one patch; ``time = pos * patch_len``.

    The other fields are those of `TimeSeriesData`; there are no labels and nothing is padded.
    """

    states: Tensor = None  # type: ignore[assignment]  # fields before it have defaults
    patch_len: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = (len(self), self.n_time // max(self.patch_len, 1))
        if not isinstance(self.states, Tensor) or self.states.shape != shape:
            got = list(self.states.shape) if isinstance(self.states, Tensor) else self.states
            raise SeriesShapeError(f"expected states [n={shape[0]}, pos={shape[1]}], got {got}")

    @property
    def patches(self) -> Float[Tensor, "n pos patch_len"]:
        """The series cut into patches."""
        return self.series[:, 0].unflatten(1, (-1, self.patch_len))

    @property
    def next_patches(self) -> Float[Tensor, "n next patch_len"]:
        """What a forecaster at each position but the last should say: the patch after it."""
        return self.patches[:, 1:]

    @property
    def inputs(self) -> RegimeSeries:
        """All but the last patch: what a forecaster reads that is asked for `next_patches`."""
        series = self.series[..., : -self.patch_len]
        return replace(self, series=series, states=self.states[:, :-1])

    def __getitem__(self, index: Any) -> RegimeSeries:
        rows = row_indices(index, len(self)).to(self.series.device)
        return replace(self, series=self.series[rows], states=self.states[rows])

    def to(self, device: torch.device | str) -> RegimeSeries:
        """The same data on another device."""
        return replace(self, series=self.series.to(device), states=self.states.to(device))

    def __repr__(self) -> str:
        n_pos = self.states.shape[1]
        return (
            f"RegimeSeries({self.name!r}, n={len(self)}, pos={n_pos}, patch_len={self.patch_len})"
        )


_FORBIDDEN = 1e6  # beside costs between 0 and 1
_ATTEMPTS = 200


def _transitions(
    n_states: int, n_edges: int, n_prototypes: int, generator: np.random.Generator
) -> tuple[Int[np.ndarray, " state"], Int[np.ndarray, "state edge"]]:
    """Which prototype each state writes, in parts as equal as can be, and who may follow it.

    The union of ``n_edges`` permutations of the states, the first of them one cycle through all:
    every state is reached from every other and has as many ways in as out. The successors of a
    state differ in their prototypes, no state follows itself, states are not visited in a rhythm,
    and no two states are indistinguishable.
    """
    for _ in range(_ATTEMPTS):
        prototype = generator.permutation(np.arange(n_states) % n_prototypes)
        successors = _successors(prototype, n_edges, n_prototypes, generator)
        if successors is None or not _mixing(successors):
            continue
        if _told_apart(prototype, successors, n_prototypes):
            return prototype, successors
    raise ArgumentError(
        f"found no machine with n_states={n_states}, n_edges={n_edges}, "
        f"n_prototypes={n_prototypes}; take fewer edges or more prototypes"
    )


def _successors(
    prototype: np.ndarray, n_edges: int, n_prototypes: int, generator: np.random.Generator
) -> np.ndarray | None:
    from scipy.optimize import linear_sum_assignment

    n = len(prototype)
    tour = generator.permutation(n)
    successors = np.empty((n, n_edges), dtype=np.int64)
    successors[tour, 0] = np.roll(tour, -1)
    taken = np.zeros((n, n_prototypes), dtype=bool)
    for edge in range(n_edges):
        if edge:
            cost = generator.random((n, n)) + _FORBIDDEN * taken[:, prototype]
            np.fill_diagonal(cost, _FORBIDDEN)
            rows, columns = linear_sum_assignment(cost)
            if cost[rows, columns].max() >= _FORBIDDEN:
                return None
            successors[rows, edge] = columns
        taken[np.arange(n), prototype[successors[:, edge]]] = True
    return successors


def _mixing(successors: np.ndarray) -> bool:
    """Whether, after enough steps, any state can follow any other (Wielandt's bound)."""
    n = len(successors)
    reach = np.zeros((n, n), dtype=bool)
    np.put_along_axis(reach, successors, True, axis=1)
    for _ in range(int(np.ceil(np.log2(n * n))) + 1):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    return bool(reach.all())


def _told_apart(prototype: np.ndarray, successors: np.ndarray, n_prototypes: int) -> bool:
    """Whether what follows tells any two states apart (the refinement of Moore's algorithm)."""
    block = prototype
    while True:
        # Two states stay together if the same prototypes lead both into the same blocks.
        leads = np.full((len(prototype), n_prototypes), -1)
        np.put_along_axis(leads, prototype[successors], block[successors], axis=1)
        signature = np.column_stack([block, leads])
        finer = np.unique(signature, axis=0, return_inverse=True)[1].reshape(-1)
        if len(np.unique(finer)) == len(np.unique(block)):
            return len(np.unique(finer)) == len(prototype)
        block = finer


@dataclass(frozen=True)
class RegimeMachine:
    """A finite-state machine that writes one patch per step.

    It answers whether a dictionary or a probe finds the *states* of what a model tracks, rather
    than what the patch at hand looks like. The machine is drawn so that the answer is clean:
    prototypes are shared by about ``n_states / n_prototypes`` states (aliased); they are
    orthogonal and of equal size, so that a mean of prototypes says which were mixed in which
    shares; the successors of a state have different prototypes, so that who knows the state and
    sees the next patch knows the next state; every state is reached from every other, and all
    are equally frequent. What can mislead: at the first positions of a series nobody can know
    the state, so score positions after the first few, or against `forecast`, the best possible
    reader of the same patches.

    Args:
        n_states: states.
        n_edges: states that may follow each state, at least 2.
        n_prototypes: different patches, fewer than the states.
        patch_len: samples in one patch, at least ``n_prototypes``.
        noise: standard deviation of the Gaussian noise on every sample; the root mean square of
            a prototype is 1.
        edge_probabilities: of a state's successors in the order of `successors`; None for equal.
        seed: of the machine: prototypes, edges.

    Raises:
        ArgumentError: sizes that no such machine has.

    Source: the TokFSM experiment of Tamkin, Taufeeque and Goodman 2023, arXiv 2310.17230, whose
    states are told apart by their last tokens; aliasing and the patches are ours.

    Example:
        >>> machine = RegimeMachine(seed=0)
        >>> data = machine.sample(4, n_pos=10, seed=1)
        >>> data.series.shape, data.states.shape
        (torch.Size([4, 1, 120]), torch.Size([4, 10]))
        >>> one, many = machine.bounds(1), machine.bounds(4)
        >>> round(one.state_accuracy, 2), round(many.state_accuracy, 2)
        (0.25, 0.97)
    """

    n_states: int = 36
    n_edges: int = 3
    n_prototypes: int = 9
    patch_len: int = 12
    noise: float = 0.2
    edge_probabilities: tuple[float, ...] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)
        n, edges, shown = self.n_states, self.n_edges, self.n_prototypes
        if not 2 <= shown < n:
            raise ArgumentError(
                f"n_prototypes: expected 2 to {n - 1}, fewer than the {n} states so that some "
                f"share a prototype, got {shown}"
            )
        if not 2 <= edges < shown:
            raise ArgumentError(
                f"n_edges: expected 2 to {shown - 1}, fewer than the {shown} prototypes since the "
                f"successors of a state differ in theirs and some must not follow, got {edges}"
            )
        if self.patch_len < shown:
            raise ArgumentError(
                f"patch_len: expected at least n_prototypes={shown}, which are orthogonal, "
                f"got {self.patch_len}"
            )
        if not 0 <= self.noise < float("inf"):
            raise ArgumentError(f"noise: expected 0 or more, got {self.noise}")
        given = self.edge_probabilities
        if given is not None and (
            len(given) != edges or min(given) <= 0 or abs(sum(given) - 1) > 1e-6
        ):
            raise ArgumentError(
                f"edge_probabilities: expected {edges} positive numbers that add up to 1, "
                f"got {given}"
            )

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        key = np.random.SeedSequence((self.seed, 0))
        return _transitions(
            self.n_states, self.n_edges, self.n_prototypes, np.random.default_rng(key)
        )

    @property
    def _shares(self) -> tuple[float, ...]:
        """Probability of each successor."""
        return self.edge_probabilities or (1 / self.n_edges,) * self.n_edges

    @cached_property
    def prototype_of(self) -> Int[Tensor, " state"]:
        """The prototype that each state writes."""
        return torch.from_numpy(self._drawn[0])

    @cached_property
    def successors(self) -> Int[Tensor, "state edge"]:
        """The states that may follow each state."""
        return torch.from_numpy(self._drawn[1])

    @cached_property
    def transition(self) -> Float[Tensor, "state next"]:
        """Probability of each next state; rows add up to 1."""
        matrix = torch.zeros(self.n_states, self.n_states, dtype=torch.float64)
        shares = torch.tensor(self._shares, dtype=torch.float64).expand(self.n_states, -1)
        return matrix.scatter_(1, self.successors, shares)

    @cached_property
    def valid_transitions(self) -> Bool[Tensor, "state next"]:
        """True where a state may follow another."""
        return self.transition > 0

    @cached_property
    def stationary(self) -> Float[Tensor, " state"]:
        """Share of the time spent in each state: the left eigenvector of ``transition``."""
        return _stationary(self.transition)

    @cached_property
    def prototypes(self) -> Float[Tensor, "prototype patch_len"]:
        """The patches without noise: orthogonal mixtures of slow cosines, root mean square 1."""
        time = torch.arange(self.patch_len, dtype=torch.float64) + 0.5
        rate = torch.arange(self.n_prototypes, dtype=torch.float64)[:, None]
        waves = torch.cos(torch.pi * rate * time / self.patch_len)
        waves = waves / waves.norm(dim=1, keepdim=True)  # orthonormal rows
        generator = torch.Generator().manual_seed(self.seed)
        mixed = torch.randn(len(rate), len(rate), generator=generator, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(mixed)
        return rotation @ waves * self.patch_len**0.5

    @cached_property
    def shown_next(self) -> Float[Tensor, "state prototype"]:
        """Probability of each prototype at the step after each state."""
        shown = torch.nn.functional.one_hot(self.prototype_of, self.n_prototypes).double()
        return self.transition @ shown

    @cached_property
    def valid_next(self) -> Bool[Tensor, "state prototype"]:
        """True where a prototype may follow a state."""
        return self.shown_next > 0

    @checked
    def successor(self, state: int, prototype: int) -> int:
        """The state that follows ``state`` when ``prototype`` is seen next.

        Raises:
            ArgumentError: this prototype cannot follow.
        """
        if not 0 <= state < self.n_states:
            raise ArgumentError(f"expected a state in 0..{self.n_states - 1}, got {state}")
        for following in self.successors[state].tolist():
            if int(self.prototype_of[following]) == prototype:
                return following
        may = sorted(self.prototype_of[self.successors[state]].tolist())
        raise ArgumentError(
            f"prototype {prototype} cannot follow state {state}; expected one of {may}"
        )

    @checked
    def sample(
        self, n: Count, n_pos: Count = 32, *, seed: Seed = 0, split: str = "train"
    ) -> RegimeSeries:
        """Series of the machine, each from a state of its own drawing.

        Args:
            n: series.
            n_pos: patches of each; a series has ``n_pos * patch_len`` samples.
            seed: of states and noise. Give train and test different ones.
            split: what to call it.

        Raises:
            ArgumentError: sizes below 1.
        """
        generator = np.random.default_rng(np.random.SeedSequence((self.seed, 1, seed)))
        shares, successors = np.array(self._shares), self.successors.numpy()
        states = np.empty((n, n_pos), dtype=np.int64)
        states[:, 0] = generator.choice(self.n_states, size=n, p=self.stationary.numpy())
        for pos in range(1, n_pos):
            edge = generator.choice(self.n_edges, size=n, p=shares / sum(self._shares))
            states[:, pos] = successors[states[:, pos - 1], edge]
        written = self.prototypes.numpy()[self.prototype_of.numpy()[states]]
        patches = written + self.noise * generator.standard_normal(written.shape)
        return RegimeSeries(
            torch.from_numpy(patches.reshape(n, 1, -1).astype(np.float32)),
            name=f"regime-machine-{self.seed}",
            split=split,
            states=torch.from_numpy(states),
            patch_len=self.patch_len,
        )

    @checked
    def nearest_prototype(self, patches: Float[Tensor, "*any patch_len"]) -> Int[Tensor, "*any"]:
        """The prototype closest to each patch, observed or forecast.

        Example:
            >>> machine = RegimeMachine()
            >>> machine.nearest_prototype(machine.prototypes[[4, 2]])
            tensor([4, 2])
        """
        self._check_patches(patches)
        return torch.cdist(patches.double(), self.prototypes.to(patches.device)).argmin(-1)

    @checked
    def prototype_shares(
        self, forecast: Float[Tensor, "*any patch_len"]
    ) -> Float[Tensor, "*any prototype"]:
        """The probabilities of prototypes that a point forecast stands for.

        The forecast with the least squared error is the mean of the prototypes that may come,
        weighted by their probabilities. They are orthogonal, so the weights can be read off; what
        is off the simplex is put on its nearest point.

        Args:
            forecast: predicted patches, ``[..., patch_len]``.

        Returns:
            ``[..., prototype]``, each at least 0, adding up to 1.

        Source: Duchi et al. 2008 (projection onto the simplex).

        Example:
            >>> machine = RegimeMachine()
            >>> mean = 0.75 * machine.prototypes[0] + 0.25 * machine.prototypes[3]
            >>> machine.prototype_shares(mean)[[0, 3]]
            tensor([0.7500, 0.2500], dtype=torch.float64)
        """
        self._check_patches(forecast)
        prototypes = self.prototypes.to(forecast.device)
        weights = forecast.double() @ prototypes.T / self.patch_len
        ordered = weights.sort(-1, descending=True).values
        above = (ordered.cumsum(-1) - 1) / torch.arange(
            1, self.n_prototypes + 1, device=forecast.device
        )
        kept = (ordered > above).sum(-1, keepdim=True)
        return (weights - above.gather(-1, kept - 1)).clamp(min=0)

    @checked
    def valid_transition_mass(
        self,
        probabilities: Float[Tensor, "*any prototype"],
        states: Int[Tensor, "*any"],
    ) -> Float[Tensor, "*any"]:
        """Probability that a forecast of the next prototype puts on those that may follow.

        Args:
            probabilities: ``[..., prototype]`` of the *next* patch: of a classifier, or
                `prototype_shares` of a point forecast.
            states: ``[...]`` the true state *now*, at the position that forecasts.

        Returns:
            ``[...]``, from 0 to 1. By chance it is ``n_edges / n_prototypes``; from the patch
            alone it is ``bounds(1).valid_mass``.

        Raises:
            SeriesShapeError: shapes that do not belong together.
            ArgumentError: rows that do not add up to 1, or a state that does not exist.

        Source: the transition accuracy of arXiv 2310.17230.

        Example:
            >>> machine = RegimeMachine()
            >>> uniform = torch.full((1, 9), 1 / 9)
            >>> machine.valid_transition_mass(uniform, torch.tensor([7]))
            tensor([0.3333])
        """
        if probabilities.shape != (*states.shape, self.n_prototypes):
            raise SeriesShapeError(
                f"expected probabilities {[*states.shape, self.n_prototypes]} for states "
                f"{list(states.shape)}, got {list(probabilities.shape)}; point forecasts become "
                "probabilities with prototype_shares"
            )
        total = probabilities.sum(-1)
        if bool((probabilities < -1e-6).any() | ((total - 1).abs() > 1e-3).any()):
            raise ArgumentError(
                "expected probabilities of prototypes, at least 0 and adding up to 1; logits "
                "become probabilities with softmax(-1)"
            )
        if states.numel() and not 0 <= int(states.min()) <= int(states.max()) < self.n_states:
            raise ArgumentError(
                f"expected states in 0..{self.n_states - 1}, got {int(states.min())}.."
                f"{int(states.max())}"
            )
        valid = self.valid_next.to(probabilities.device)[states]
        return (probabilities * valid).sum(-1)

    @checked
    def state_probabilities(
        self, data: RegimeSeries, *, history: bool = True
    ) -> Float[Tensor, "n pos state"]:
        """What the best possible reader knows about the state, who knows the machine.

        Args:
            data: series of this machine.
            history: read every patch up to and including the position; False reads the patch at
                the position alone.

        Returns:
            ``[n, pos, state]`` probabilities (the forward algorithm of a hidden Markov model).
        """
        self._check_patches(data.patches)
        distance = torch.cdist(data.patches.double(), self.prototypes.to(data.series.device))
        # Without noise, prototypes are told apart however small their difference.
        spread = max(self.noise, 1e-3)
        likelihood = (-(distance**2) / (2 * spread**2)).softmax(-1)[..., self.prototype_of]
        stationary = self.stationary.to(likelihood)
        transition = self.transition.to(likelihood)
        known = torch.empty_like(likelihood)
        before = stationary.expand(len(likelihood), -1)
        for pos in range(likelihood.shape[1]):
            joint = before * likelihood[:, pos]
            known[:, pos] = joint / joint.sum(-1, keepdim=True)
            before = known[:, pos] @ transition if history else stationary
        return known

    def most_probable_states(self, data: RegimeSeries) -> Int[Tensor, "n pos"]:
        """The state that the best possible reader takes it for, at every position."""
        # Rounded: states that are equally likely must not be told apart by the last bit.
        return self.state_probabilities(data).round(decimals=9).argmax(-1)

    @checked
    def forecast(
        self, data: RegimeSeries, *, history: bool = True
    ) -> Float[Tensor, "n pos prototype"]:
        """The best possible forecast of the next prototype at every position.

        Args:
            data: series of this machine.
            history: as for `state_probabilities`.
        """
        known = self.state_probabilities(data, history=history)
        return known @ self.shown_next.to(known)

    @checked
    def bounds(self, n_patches: int) -> RegimeBounds:
        """The best that is possible from the last ``n_patches`` patches without noise, exactly.

        Every path of states of that length is followed. With one patch it shows what aliasing
        costs; the gap to many patches is what memory is worth.

        Args:
            n_patches: patches read, the one at the position included.

        Raises:
            ArgumentError: less than 1, or more than there is memory for.
        """
        n_paths = self.n_states * self.n_edges ** max(n_patches - 1, 0)
        if n_patches < 1 or n_paths > _MOST_PATHS:
            raise ArgumentError(
                f"n_patches: expected at least 1 and at most {_MOST_PATHS:,} paths of states, "
                f"got {n_patches} ({n_paths:,} paths)"
            )
        shares = self.transition.gather(1, self.successors)
        state = torch.arange(self.n_states)  # of each path, where it ends
        weight, word = self.stationary, self.prototype_of  # paths that write the same are one word
        for _ in range(n_patches - 1):
            weight = (weight[:, None] * shares[state]).flatten()
            state = self.successors[state].flatten()
            word = word.repeat_interleave(self.n_edges) * self.n_prototypes
            word = (word + self.prototype_of[state]).unique(return_inverse=True)[1]
        joint = torch.zeros(int(word.max()) + 1, self.n_states, dtype=torch.float64)
        joint.index_put_((word, state), weight, accumulate=True)  # probability of word and state
        following = joint @ self.shown_next  # probability of word and next prototype
        forecast = following / joint.sum(1, keepdim=True)
        return RegimeBounds(
            accuracy=float(following.amax(1).sum()),
            valid_mass=float((joint * (forecast @ self.valid_next.double().T)).sum()),
            state_accuracy=float(joint.amax(1).sum()),
        )

    def _check_patches(self, patches: Tensor) -> None:
        if patches.ndim < 1 or patches.shape[-1] != self.patch_len:
            raise SeriesShapeError(
                f"expected patches [..., patch_len={self.patch_len}], got {list(patches.shape)}"
            )


def _stationary(transition: Float[Tensor, "state next"]) -> Float[Tensor, " state"]:
    """The distribution that a step leaves as it is: one linear system."""
    n = len(transition)
    system = torch.cat([transition.T - torch.eye(n).double(), torch.ones(1, n).double()])
    wanted = torch.zeros(n + 1).double()
    wanted[-1] = 1
    return torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0].clamp(min=0)
