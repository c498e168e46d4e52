"""What a named layer of a model gives, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn


def layer_features(
    model: nn.Module, loader: Iterable[Any], layer: str, *, side: Literal["input", "output"] = "output"
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Features at a layer and labels, for each batch of a loader: `layers_features` of one layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> features, labels = next(layer_features(model, [(torch.ones(4, 3), torch.zeros(4))], "1", side="input"))
        >>> features.shape, labels.shape
        (torch.Size([4, 2]), torch.Size([4]))
    """
    for (features,), labels in layers_features(model, loader, [layer], side=side):
        yield features, labels


@torch.inference_mode()
def layers_features(
    model: nn.Module, loader: Iterable[Any], layers: Sequence[str], *, side: Literal["input", "output"] = "output"
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Features at layers and labels, for each batch of a loader, in constant memory and one pass.

    The model is evaluated as it would be used (`eval` mode, no gradients) and left in the mode it was in.

    Args:
        model: Any module that takes a batch's first element.
        loader: Batches, (inputs, labels) or inputs alone.
        layers: Names of the layers, as `model.named_modules()` gives them.
        side: What goes into a layer, such as the features that a classifier reads, or what comes out.

    Yields:
        Features of each layer (batch, d), further axes flattened, and labels (batch,), None where the batch has none.

    Raises:
        ValueError: The model has no layer of such a name, or a layer did not run.
        TypeError: A layer's input or output is not a tensor.
    """
    modules = {layer: named_layer(model, layer) for layer in layers}
    seen: dict[str, Any] = {}

    def keeping(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen[layer] = args[0] if side == "input" else output

        return hook

    training = model.training
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    handles = [module.register_forward_hook(keeping(layer)) for layer, module in modules.items()]
    model.eval()
    try:
        for batch in loader:
            inputs, labels = batch if isinstance(batch, tuple | list) else (batch, None)
            seen.clear()
            model(inputs.to(device))
            for layer in layers:
                if layer not in seen:
                    raise ValueError(f"layer {layer!r} did not run when the model was called: choose one that does")
                if not isinstance(seen[layer], Tensor):
                    raise TypeError(
                        f"the {side} of layer {layer!r} is a {type(seen[layer]).__name__}, not a tensor: choose another"
                    )
            yield [seen[layer].flatten(1) for layer in layers], None if labels is None else labels.to(device)
    finally:
        for handle in handles:
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
