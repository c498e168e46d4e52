"""What a named layer of a model gives, batch by batch; and features and classes as the methods of this room take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn


def layer_features(
    model: nn.Module, loader: Iterable[Any], layer: str, *, side: Literal["input", "output"] = "output"
) -> Iterator[tuple[Tensor, Any]]:
    """Features at a layer and labels, for each batch of a loader: `layers_features` of one layer.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> features, labels = next(layer_features(model, [(torch.ones(4, 3), torch.zeros(4))], "1", side="input"))
        >>> features.shape, labels.shape
        (torch.Size([4, 2]), torch.Size([4]))
    """
    for (features,), labels in layers_features(model, loader, [layer], side=side):
        yield features, labels


def layers_features(
    model: nn.Module, loader: Iterable[Any], layers: Sequence[str], *, side: Literal["input", "output"] = "output"
) -> Iterator[tuple[list[Tensor], Any]]:
    """Features at layers and labels, for each batch of a loader, in constant memory and one pass.

    The model is evaluated as it would be used (`eval` mode, no gradients); between two batches it is as it was, each of
    its modules in its own mode. Features are copies: what later layers change in place does not change them.

    Args:
        model: Any module that takes a batch's first element.
        loader: Batches, (inputs, labels) or inputs alone; what follows the labels is left out.
        layers: Names of the layers, as `model.named_modules()` gives them.
        side: What goes into a layer, such as the features that a classifier reads, or what comes out.

    Yields:
        Features of each layer (batch, d), further axes flattened, and labels as the batch has them, None where it has none.
        Of a layer that runs more than once in a call, those of its last run.

    Raises:
        ValueError: The model has no layer of such a name, or a layer did not run.
        TypeError: A batch's inputs, or a layer's input or output, are not a tensor.
    """
    modules = {layer: named_layer(model, layer) for layer in layers}
    for batch in loader:
        inputs, labels = _parts(batch)
        seen: dict[str, Any] = {}
        with evaluated(model), ExitStack() as hooks:
            for layer, module in modules.items():
                hooks.callback(_watch(module, layer, seen, side).remove)
            model(to_device_of(model, inputs))
        yield [_flat(seen, layer, side) for layer in layers], to_device_of(model, labels)


def _watch(module: nn.Module, layer: str, seen: dict[str, Any], side: str) -> torch.utils.hooks.RemovableHandle:
    """Keep what goes into a module before it can change it in place, or what comes out before the next one can."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[layer] = _kept(next(iter([*args, *kwargs.values()]), None))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[layer] = _kept(output)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _parts(batch: Any) -> tuple[Tensor, Any]:
    inputs, labels = (*batch, None)[:2] if isinstance(batch, tuple | list) and batch else (batch, None)
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"a batch is a tensor, or inputs and labels with a tensor first, got {type(inputs).__name__}: let the loader "
            "give (inputs, labels)"
        )
    return inputs, labels


def _flat(seen: dict[str, Any], layer: str, side: str) -> Tensor:
    if layer not in seen:
        raise ValueError(f"layer {layer!r} did not run when the model was called: choose one that does")
    value = seen[layer]
    if not isinstance(value, Tensor) or not value.ndim:
        what = "a single number" if isinstance(value, Tensor) else f"a {type(value).__name__}, not a tensor"
        raise TypeError(f"the {side} of layer {layer!r} is {what}: choose another")
    return value[:, None] if value.ndim == 1 else value.flatten(1)


@contextmanager
def evaluated(module: Any) -> Iterator[None]:
    """A module in `eval` mode and no gradients while it lasts; then each of its modules in the mode it was in.

    Anything else than a module is left alone.
    """
    modes = [(one, one.training) for one in module.modules()] if isinstance(module, nn.Module) else []
    for one, _ in modes:
        one.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for one, training in modes:
            one.training = training


def to_device_of(module: Any, value: Any) -> Any:
    """A tensor on the device of a module's first parameter; anything else, or without a parameter, as it is."""
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return value.to(first.device) if isinstance(value, Tensor) and first is not None else value


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


def as_numbers(values: Any, name: str) -> Tensor:
    """Real numbers as a tensor: a tensor as it is, or what NumPy makes an array of numbers of.

    Raises:
        TypeError: They are no real numbers.
    """
    found = values.detach() if isinstance(values, Tensor) else _from_array(values)
    if found is None or found.is_complex():
        raise TypeError(f"{name} is {_described(values)}: give real numbers, as a tensor or an array")
    return found


def as_matrix(values: Any, name: str) -> Tensor:
    """Real numbers as a matrix (n, d) in float64.

    Raises:
        ValueError: They are not two-dimensional, or not finite.
        TypeError: They are no real numbers.
    """
    found = as_numbers(values, name)
    if found.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(found.shape)}: give samples as rows, (n, d)")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: find what overflows, or leave such samples out")
    return found.double()


def as_classes(labels: Any, samples: int) -> Tensor:
    """Classes as whole numbers from 0, one a sample (samples,), in int64.

    Raises:
        ValueError: They are no whole numbers, not one a sample, or below 0.
    """
    found = labels.detach() if isinstance(labels, Tensor) else _from_array(labels)
    if found is None or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(
            f"labels are {samples} whole numbers, one for each row, got {_described(labels)}: number the classes from 0, as "
            "numpy.unique(labels, return_inverse=True) does"
        )
    if found.shape != (samples,):
        hint = "take argmax(1) of one-hot labels" if found.ndim == 2 else "give one for each row"
        raise ValueError(f"labels are {samples} whole numbers, one for each row, got {tuple(found.shape)}: {hint}")
    found = found.long()
    if samples and int(found.min()) < 0:
        raise ValueError(f"labels are whole numbers from 0, got {int(found.min())}: leave samples without a class out")
    return found


def _from_array(values: Any) -> Tensor | None:
    """An array of numbers or truth values as a tensor, None where it is anything else."""
    try:
        array = np.asarray(values)
        # Copied, as arrays of others may be read only.
        return torch.from_numpy(array.copy()) if array.dtype.kind in "biufc" else None
    except (TypeError, ValueError):
        return None


def _described(values: Any) -> str:
    dtype = getattr(values, "dtype", None)
    shape = getattr(values, "shape", None)
    kind = str(dtype) if dtype is not None else type(values).__name__
    return kind if shape is None else f"{kind} of {tuple(shape)}"
