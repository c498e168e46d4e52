"""What a recipe's parameters may be in a run from the page: numbers within bounds, and models and data that are here.

Whoever may start a run there is not the owner of the machine. So a run from the page ends within about the time of the
default scale, and fetches nothing that its reader has named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from paperworks.errors import UsageError
from paperworks.hub import datasets, models
from paperworks.lab.recipe import Between, Model, Parameter, Recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """One parameter as the page offers it.

    Attributes:
        name: Its name.
        default: Its value at the default scale.
        help: What it means.
        whole: Whether a number is a whole one.
        low: The least that a number may be, None where it is none.
        high: The most.
        choices: What to choose from where it is no number.
    """

    name: str
    default: Any
    help: str
    whole: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()

    def why_not(self, value: Any) -> str:
        """Why a value is not offered, "" where it is."""
        if self.high is None:
            if value in self.choices:
                return ""
            offered = ", ".join(map(_spelt, self.choices))
            return (
                f"{self.name} is one of {offered} in a run from the page, not {value!r}; the command line takes others"
            )
        assert self.low is not None
        if value > self.high:
            told = f"{self.name} is at most {self.high:.12g} in a run from the page, not {value}"
            return f"{told}; the command line takes more"
        if value < self.low:
            return f"{self.name} is at least {self.low:.12g} in a run from the page, not {value}"
        return ""


@dataclass(frozen=True)
class Offer:
    """What the page offers of a recipe.

    Attributes:
        scales: The scales whose values are all offered.
        fields: The parameters.
    """

    scales: tuple[str, ...]
    fields: tuple[Field, ...]


def offered(recipe: Recipe) -> Offer:
    """What a run from the page may be told of a recipe.

    A number without bounds is at most what the default scale or the tiny one gives it, and a text that is not marked as
    a model or data is one of these two.

    Example:
        >>> from paperworks.lab.recipe import find
        >>> offer = offered(find("hydra"))
        >>> [(field.low, field.high) for field in offer.fields if field.name == "new_tokens"], offer.scales
        ([(1, 384)], ('tiny', 'default'))
    """
    fields = {name: _field(recipe, parameter) for name, parameter in recipe.parameters.items()}
    scales = tuple(
        scale
        for scale, values in recipe.scales.items()
        if not any(fields[name].why_not(_plain(value)) for name, value in values.items())
    )
    return Offer(scales, tuple(fields.values()))


def checked(recipe: Recipe, parameters: Mapping[str, object], scale: str) -> dict[str, Any]:
    """The values of all parameters, as JSON holds them, where the page offers those that are given.

    Args:
        recipe: The recipe.
        parameters: Some of its parameters, typed or as text.
        scale: The scale that gives the others.

    Raises:
        UsageError: A parameter or the scale is unknown, or a value is not offered.
    """
    options = recipe.plain(parameters, scale)
    offer = offered(recipe)
    if scale not in offer.scales:
        raise UsageError(
            f"{recipe.paper} at scale {scale} is more than a run from the page may take; "
            f"on a machine of your own: paperworks run {recipe.paper} --scale {scale}"
        )
    fields = {field.name: field for field in offer.fields}
    for name in recipe.parse(parameters):
        if reason := fields[name].why_not(options[name]):
            raise UsageError(reason)
    return options


def why_refused(recipe: Recipe, parameters: Mapping[str, object], scale: str) -> str:
    """Why the page would not start a run of these parameters at this scale, "" where it would."""
    try:
        checked(recipe, parameters, scale)
    except UsageError as error:
        return str(error)
    return ""


def _field(recipe: Recipe, parameter: Parameter) -> Field:
    default = _plain(parameter.default)
    tiny = _plain(recipe.scales.get("tiny", {}).get(parameter.name, parameter.default))
    field = Field(parameter.name, default, parameter.help, whole=parameter.type is int)
    if parameter.type not in (int, float):
        return replace(field, choices=_choices(parameter, default, tiny))
    bounds = parameter.bounds or Between(min(default, tiny, 0), max(default, tiny))
    return replace(field, low=bounds.low, high=bounds.high)


def _choices(parameter: Parameter, default: Any, tiny: Any) -> tuple[Any, ...]:
    if parameter.type is bool:
        return (True, False)
    choices = [_plain(choice) for choice in parameter.choices]
    if parameter.names is None:
        return tuple(choices or dict.fromkeys((default, tiny)))
    here = _here(isinstance(parameter.names, Model))
    named = [name for name, there in here.items() if there and any(fnmatchcase(name, p) for p in parameter.names.names)]
    own = [name for name in parameter.names.names if name not in here and not set(name) & set("*?[")]
    # The default is the recipe's own word, whatever it has to be fetched from.
    if choices:
        return tuple(choice for choice in choices if choice == default or here.get(choice, True))
    return tuple(dict.fromkeys((default, *own, *named)))


def _here(model: bool) -> dict[str, bool]:
    """For each name that the hub knows whether what it names is on this machine."""
    try:
        return {entry.name: entry.available for entry in (models() if model else datasets())}
    except UsageError as error:
        # The operator's matter; a reader still sees the page.
        _log.warning("%s", error)
        return {}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
