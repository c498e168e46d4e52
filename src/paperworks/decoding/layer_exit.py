"""A model's own pass over a token, left at an intermediate layer: the layers above only keep keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperworks.decoding.cache import TreeCache, layer_count
from paperworks.decoding.target import Target


class Action(IntEnum):
    """What may be done behind a layer."""

    STOP = 0
    EXIT = 1
    CONTINUE = 2


Policy = Callable[[int, Tensor], Action]


class Ended(NamedTuple):
    """How a pass ended.

    Attributes:
        action: CONTINUE if all layers ran.
        layer: Layers that ran in full.
        hidden: The last one's output (1, 1, d); what the model's head reads if all ran.
    """

    action: Action
    layer: int
    hidden: Tensor


class ExitCache(TreeCache):
    """A cache that can break off each layer as soon as its keys and values are stored."""

    only_store = False

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states, and return to `read_token` where nothing else is wanted of the layer."""
        stored = super().update(*args, **kwargs)
        if self.only_store:
            raise _BrokenOff
        return stored


def read_token(target: Target, token: Tensor, cache: ExitCache, policy: Policy) -> Ended:
    """Read the token (1, 1) that comes next, in as many layers as `policy` wants.

    Layers above the one left run on its output as far as their keys and values: their own norm, projections and rotary
    position, whatever the architecture, without attention or MLP.

    Args:
        target: The model.
        token: The token.
        cache: What the model has read before, one row; the token's states are behind it, not yet committed, unless
            the pass was stopped.
        policy: Called with a layer's number from 1 and its output (1, 1, d).
    """
    ended: Ended | None = None
    passed_on: Any = None

    def run(layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal ended, passed_on
        if ended is not None:
            with suppress(_BrokenOff):
                forward(*args, **kwargs)
            return passed_on
        passed_on = forward(*args, **kwargs)
        hidden = _hidden(passed_on)
        action = policy(layer, hidden)
        if action == Action.STOP or (action == Action.EXIT and layer < last):
            ended = Ended(action, layer, hidden)
            cache.only_store = True
        if action == Action.STOP:
            raise _BrokenOff
        return passed_on

    last = len(layers_of(target))
    position = torch.tensor([[cache.lengths[0]]], device=token.device)
    try:
        with suppress(_BrokenOff):
            output = _double(target, run)(**target.inputs(token, position), past_key_values=cache, use_cache=True)
    finally:
        cache.only_store = False
    if passed_on is None:
        raise _not_found(target)
    return ended or Ended(Action.CONTINUE, last, output.last_hidden_state)


def layer_outputs(target: Target, tokens: Tensor, layers: list[int]) -> tuple[Tensor, Tensor]:
    """Outputs of some layers (numbers from 1) on whole texts, and what the head reads.

    Args:
        target: The model.
        tokens: (batch, length).
        layers: Numbers from 1, ascending.

    Returns:
        (layers, batch, length, d) and (batch, length, d).
    """
    seen: list[Tensor] = []

    def run(layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if layer in layers:
            seen.append(_hidden(output))
        return output

    final = _double(target, run)(input_ids=tokens, use_cache=False).last_hidden_state
    if len(seen) < len(layers) or any(hidden.shape != final.shape for hidden in seen):
        raise _not_found(target)
    return torch.stack(seen), final


def layers_of(target: Target) -> Any:
    """The model's layers.

    Raises:
        ValueError: they do not stand in one list.
    """
    count = layer_count(target.config)
    for module in target.base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise _not_found(target)


def _not_found(target: Target) -> ValueError:
    return ValueError(
        f"{type(target.model).__name__} has no list of its {layer_count(target.config)} layers, each of which makes a state of "
        "the next: use a model such as Llama, Qwen3 or GPT-2"
    )


class _BrokenOff(Exception):
    """The rest of a layer, or of the pass, is not wanted."""


def _double(target: Target, run: Callable[..., Any]) -> Any:
    """The base model with `run(layer, forward, ...)` in the place of each layer's forward.

    The model is shared, and stays as it is: layers, and modules on the way to them, are shallow copies, which have all in
    common with the model's but the layers below them.
    """
    layers = layers_of(target)
    doubles: list[Any] = [copy.copy(layer) for layer in layers]
    for number, (double, layer) in enumerate(zip(doubles, layers, strict=True), 1):
        # The layer's own, with whatever others have put around it.
        double.forward = partial(run, number, layer.forward)
    path = next(name for name, module in target.base.named_modules() if module is layers).split(".")

    def on_the_way(module: Any, names: list[str]) -> Any:
        double = copy.copy(module)
        # What stands around this forward would lead back to the model's own layers.
        vars(double).pop("forward", None)
        if names:
            below = on_the_way(getattr(module, names[0]), names[1:])
            double._modules = {**module._modules, names[0]: below}
        else:
            double._modules = dict(zip(module._modules, doubles, strict=True))
        return double

    return on_the_way(target.base, path)


def _hidden(output: Any) -> Tensor:
    """A layer's output without what some put beside it."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
