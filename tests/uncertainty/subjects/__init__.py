"""Who is examined by the room's contract test: a module here for each method, with its `REGRESSORS` and `CLASSIFIERS` by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RegressorSubject:
    """A regressor, and what of the contract applies to it.

    Attributes:
        make: A regressor that fits small data within a second or so, trained parts included.
        prior: Draws a task from its own prior: training X (n, d) and y (n,), new X (m, d) and new y (m,), noise included; None
            where there is no prior to draw from, with the reason in `exempt`.
        oracle: A regressor for tasks of `prior`, with the hyper-parameters of that prior where they are not learned.
        tasks: How many tasks coverage is counted over; of each one new target, chosen at random.
        tolerance: To which predictions agree when rows are permuted or targets are rescaled, relative to the spread of y; None
            where the order of rows is the method's business, with the reason in `exempt`.
        dims: Columns that `make` takes, any number if None.
        checks: Whether scikit-learn's own checks apply; a trained part may take a fixed number of columns.
        expected_failures: Of those checks, by name, each with the reason.
        exempt: Tests of the contract that do not apply, by name, each with the reason.
    """

    make: Callable[[], Any]
    prior: Callable[[np.random.Generator], tuple[Array, Array, Array, Array]] | None = None
    oracle: Callable[[], Any] | None = None
    tasks: int = 200
    tolerance: float | None = 1e-5
    dims: int | None = None
    checks: bool = True
    expected_failures: dict[str, str] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassifierSubject:
    """A classifier, with attributes as those of `RegressorSubject`."""

    make: Callable[[], Any]
    tolerance: float | None = 1e-5
    dims: int | None = None
    checks: bool = True
    expected_failures: dict[str, str] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)


def _collected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        found |= getattr(importlib.import_module(module.name), name, {})
    return found


def regressors() -> dict[str, RegressorSubject]:
    return _collected("REGRESSORS")


def classifiers() -> dict[str, ClassifierSubject]:
    return _collected("CLASSIFIERS")
