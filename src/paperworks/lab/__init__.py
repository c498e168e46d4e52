"""The lab pits methods against their baselines on real work and keeps what it measured.

A recipe is a function with typed keyword parameters; a run is one execution of it. What a run records is in
the store at once, so that nothing is lost when the run is stopped.

Example:
    >>> from paperworks.lab import Run, recipe
    >>> @recipe(paper="coin", tiny={"flips": 10})
    ... def coin(run: Run, flips: int = 1000) -> None:
    ...     '''Heads of a coin.'''
    ...     run.record("heads", flips / 2, better="higher")
    >>> trial = Run("coin")
    >>> coin(trial, flips=20)
    >>> trial.measurements[0].value
    10.0
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paperworks.lab.measure import Effect
from paperworks.lab.recipe import Between, Data, Model, Parameter, Recipe, recipe
from paperworks.lab.run import Measurement, Run

if TYPE_CHECKING:
    from paperworks.lab.executors import execute
    from paperworks.lab.store import Store

__all__ = [
    "Between",
    "Data",
    "Effect",
    "Measurement",
    "Model",
    "Parameter",
    "Recipe",
    "Run",
    "Store",
    "execute",
    "recipe",
]

# SQLAlchemy takes a while to load, and listing recipes does not need it.
_LATER = {"Store": "paperworks.lab.store", "execute": "paperworks.lab.executors"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
