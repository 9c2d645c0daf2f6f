"""One rule per head by mixed-integer programming, and trade-offs between profiles (MoA, arXiv 2406.14909)."""

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

INFEASIBLE = 2  # scipy's status


class Problem(NamedTuple):
    """Heads H = L K, in the order of layers, rules R, profile lengths P, bounded lengths N.

    losses: influence that each head loses under each rule, for each profile. densities: of each rule at each length;
    their mean over heads must lie in `bounds`. heads_per_layer: K. rules_per_layer: different rules a layer may use.
    """

    losses: Float[np.ndarray, "P H R"]
    densities: Float[np.ndarray, "N R"]
    bounds: tuple[float, float]
    heads_per_layer: int
    rules_per_layer: int | None = None

    def scaled(self) -> "Problem":
        """Losses as shares of what losing everything that the rules may lose would cost, per profile."""
        worst = self.losses.max(2).sum(1)
        return self._replace(losses=self.losses / np.where(worst > 0, worst, 1)[:, None, None])

    def total(self, choice: Int[np.ndarray, " H"]) -> Float[np.ndarray, " P"]:
        """Influence lost in each profile when head h has rule `choice[h]`."""
        return self.losses[:, np.arange(self.losses.shape[1]), choice].sum(1)


class Effort(NamedTuple):
    """When the solver may stop: seconds for one solution, and its distance from the best in relative terms."""

    seconds: float = 30.0
    gap: float = 1e-3


NORMAL = Effort()


def solve(
    problem: Problem, profile: int, most: Float[np.ndarray, " P"] | None = None, effort: Effort = NORMAL
) -> Int[np.ndarray, " H"] | None:
    """The rule of each head that loses least in one profile, with at most `most` lost in each; None if there is none.

    Raises ValueError when the solver ended without an answer either way.
    """
    _, heads, rules = problem.losses.shape
    layers = heads // problem.heads_per_layer
    limited = problem.rules_per_layer is not None
    used = layers * rules if limited else 0  # whether a layer uses a rule, behind whether a head has it
    cost = np.concatenate([problem.losses[profile].ravel(), np.zeros(used)])
    found = milp(
        cost,
        integrality=np.ones(heads * rules + used),
        bounds=Bounds(0, 1),
        constraints=list(_constraints(problem, used, most)),
        options={"time_limit": effort.seconds, "mip_rel_gap": effort.gap},
    )
    if found.x is None:
        if found.status == INFEASIBLE:
            return None
        raise ValueError(f"MoA: no plan was found in {effort.seconds} s ({found.message}); raise the time limit")
    return found.x[: heads * rules].reshape(heads, rules).argmax(1)


def _constraints(problem: Problem, used: int, most: np.ndarray | None) -> Any:
    """The rows of the programme, over x[h,r] and then y[l,r]."""
    _, heads, rules = problem.losses.shape
    widen = lambda matrix: sparse.hstack([matrix, sparse.csr_array((matrix.shape[0], used))]).tocsr()
    one_each = sparse.kron(sparse.eye_array(heads), np.ones((1, rules)))
    yield LinearConstraint(widen(one_each), 1, 1)
    density = sparse.csr_array(np.tile(problem.densities, heads) / heads)
    yield LinearConstraint(widen(density), *problem.bounds)
    if most is not None:
        yield LinearConstraint(widen(sparse.csr_array(problem.losses.reshape(len(most), -1))), -np.inf, most)
    if used:
        layers = heads // problem.heads_per_layer
        own_layer = sparse.kron(
            sparse.kron(sparse.eye_array(layers), np.ones((problem.heads_per_layer, 1))), sparse.eye_array(rules)
        )
        yield LinearConstraint(sparse.hstack([sparse.eye_array(heads * rules), -own_layer]).tocsr(), -np.inf, 0)
        few = sparse.kron(sparse.eye_array(layers), np.ones((1, rules)))
        few = sparse.hstack([sparse.csr_array((layers, heads * rules)), few]).tocsr()
        yield LinearConstraint(few, 0, problem.rules_per_layer)


def pareto(problem: Problem, cuts: int = 4, effort: Effort = NORMAL) -> list[Int[np.ndarray, " H"]]:
    """Choices that no other one found beats in every profile, by the epsilon-constraint method.

    Each profile is minimised while each other one is held below the borders that cut its range (between its own best
    and the worst it gets where another is best) into `cuts` parts. Raises ValueError where no choice meets the bounds.
    """
    problem = problem.scaled()
    best = [solve(problem, p, None, effort) for p in range(len(problem.losses))]
    corners = [choice for choice in best if choice is not None]
    if len(corners) < len(best):
        low, high = problem.bounds
        raise ValueError(
            f"MoA: no plan keeps between {low:.3g} and {high:.3g} of the keys at every length; widen the bounds "
            "(SearchSpace.density, fill) or allow more rules a layer"
        )
    totals = np.stack([problem.total(choice) for choice in corners])
    borders = [np.linspace(low, high, cuts + 1)[1:] for low, high in zip(totals.min(0), totals.max(0), strict=True)]
    found = list(corners)
    for p in range(len(borders)):
        others = [each if i != p else (np.inf,) for i, each in enumerate(borders)]
        for most in itertools.product(*others) if len(borders) > 1 else ():
            if (choice := solve(problem, p, np.array(most) + 1e-9, effort)) is not None:
                found.append(choice)
    return undominated(found, np.stack([problem.total(choice) for choice in found]))


def undominated(choices: list[np.ndarray], totals: Float[np.ndarray, "n P"]) -> list[np.ndarray]:
    """The choices that no other is at least as good as in every total and better in one; of equals the first."""
    kept = []
    for i, mine in enumerate(totals):
        beaten = (totals <= mine).all(1) & (totals < mine).any(1)
        equal = (totals[:i] == mine).all(1)
        if not beaten.any() and not equal.any():
            kept.append(choices[i])
    return kept
