"""What a named layer of a model gives, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn


@torch.inference_mode()
def layer_features(
    model: nn.Module, loader: Iterable[Any], layer: str, *, side: Literal["input", "output"] = "output"
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Features at a layer and labels, for each batch of a loader, in constant memory.

    The model is evaluated as it would be used (`eval` mode, no gradients) and left in the mode it was in.

    Args:
        model: Any module that takes a batch's first element.
        loader: Batches, (inputs, labels) or inputs alone.
        layer: Name of the layer, as `model.named_modules()` gives it.
        side: What goes into the layer, such as the features that a classifier reads, or what comes out.

    Yields:
        Features (batch, d), further axes flattened, and labels (batch,), None where the batch has none.

    Raises:
        ValueError: The model has no layer of this name, or the layer did not run.
        TypeError: The layer's input or output is not a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> features, labels = next(layer_features(model, [(torch.ones(4, 3), torch.zeros(4))], "1", side="input"))
        >>> features.shape, labels.shape
        (torch.Size([4, 2]), torch.Size([4]))
    """
    module = named_layer(model, layer)
    seen: list[Any] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(args[0] if side == "input" else output)

    training = model.training
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    handle = module.register_forward_hook(hook)
    model.eval()
    try:
        for batch in loader:
            inputs, labels = batch if isinstance(batch, tuple | list) else (batch, None)
            model(inputs.to(device))
            if not seen:
                raise ValueError(f"layer {layer!r} did not run when the model was called: choose one that does")
            value = seen[-1]
            seen.clear()
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"the {side} of layer {layer!r} is a {type(value).__name__}, not a tensor: choose another"
                )
            yield value.flatten(1), None if labels is None else labels.to(device)
    finally:
        handle.remove()
        model.train(training)


def named_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of a model that `model.named_modules()` calls so.

    Raises:
        ValueError: The model has no layer of this name.
    """
    named = dict(model.named_modules())
    if name not in named:
        near = get_close_matches(name, named, n=3, cutoff=0.3) or [known for known in named if known][:5]
        raise ValueError(f"the model has no layer {name!r}: it has {', '.join(near)} and others by `named_modules()`")
    return named[name]
