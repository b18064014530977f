"""Least squares of relative error whose coefficients may not be negative: seconds over what a step computes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TOLERANCE = 1e-10  # Of the gradient, where every column has length 1 and every measurement is 1.


def non_negative(features: Array, seconds: Array, relative_to: Array | None = None) -> list[float]:
    """Coefficients >= 0, one a column, so that `features @ coefficients` is nearest to `seconds`, relative to each.

    Relative, so that short steps count as much as long ones; `relative_to` > 0 where it is not to the seconds themselves.
    Lawson and Hanson's active set (Solving Least Squares Problems, 1974, chapter 23): the column that would help most enters,
    and those that turn negative leave.
    """
    scale = seconds if relative_to is None else relative_to
    weighted, target = features / scale[:, None], seconds / scale
    length = np.maximum(np.linalg.norm(weighted, axis=0), 1e-300)
    columns = weighted / length
    solution = np.zeros(features.shape[1])
    inside = np.zeros(features.shape[1], dtype=bool)
    for _ in range(3 * features.shape[1]):
        gradient = np.where(inside, -np.inf, columns.T @ (target - columns @ solution))
        if inside.all() or gradient.max() <= TOLERANCE:
            break
        inside[int(np.argmax(gradient))] = True
        solution = _settled(columns, target, solution, inside)
    coefficients: list[float] = (solution / length).tolist()
    return coefficients


def _settled(columns: Array, target: Array, solution: Array, inside: NDArray[np.bool_]) -> Array:
    """Least squares over the columns inside, after those have left that would be negative."""
    while True:
        wanted = np.zeros_like(solution)
        wanted[inside] = np.linalg.lstsq(columns[:, inside], target, rcond=None)[0]
        below = inside & (wanted <= 0.0)
        if not below.any():
            return wanted
        step = np.min(solution[below] / (solution[below] - wanted[below]))
        solution = solution + step * (wanted - solution)
        inside &= solution > TOLERANCE
        solution[~inside] = 0.0
