"""Which model it is: a digest of all its weights, which a drafter keeps of the model that it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from paperworks.decoding.target import Target

# Into what weights can be rounded, so that a copy in fewer bits is known.
_ROUNDED = {
    torch.float64: (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16,),
    torch.bfloat16: (torch.bfloat16,),
}
# Of each model: what its weights looked like when they were read, and the digests found.
_read: WeakKeyDictionary[nn.Module, tuple[Any, dict[torch.dtype, str]]] = WeakKeyDictionary()
# Of each model: the records that it was found to fit.
_known: WeakKeyDictionary[nn.Module, list[Mapping[str, Any]]] = WeakKeyDictionary()


def weights_digest(model: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """SHA-256 over the values of all weights and kept buffers in order, names left out; None where some are not loaded.

    All bytes are read: 135 million parameters take some tenths of a second, once for each model, as long as its weights
    stay what they are (their places, their versions and 64 values of each are looked at anew at every call).

    Args:
        model: Any module.
        dtype: Weights are rounded to it first; the widest floating-point type among them if None, which rounds none.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> before = weights_digest(model)
        >>> model.weight.data[0, 0] += 1
        >>> weights_digest(model) == before
        False
    """
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return None
    seen = _looks(tensors)
    last, digests = _read.get(model, (None, {}))
    if last != seen:
        digests = {}
        _read[model] = seen, digests
    dtype = dtype or _widest(tensors)
    if dtype not in digests:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            parts = threads.map(lambda tensor: _digest(tensor, dtype), tensors)
            digests[dtype] = hashlib.sha256(b"".join(parts)).hexdigest()
    return digests[dtype]


def identity(model: nn.Module) -> dict[str, Any]:
    """What tells `model` from others, as JSON: type, sizes, and the digest of its weights in each type they round to.

    A copy in a type of fewer bits is the same model: it has the same digest in that type.

    Raises:
        TypeError, ValueError: a model that cannot be a `Target`.
    """
    target = Target(model)
    widest = _widest([value for value in model.state_dict().values() if isinstance(value, Tensor)])
    digests = {_name(dtype): weights_digest(model, dtype) for dtype in _ROUNDED[widest]}
    return {
        "kind": str(target.config.model_type),
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "weights": {name: digest for name, digest in digests.items() if digest is not None},
    }


def difference(record: Mapping[str, Any], model: nn.Module) -> str | None:
    """In what `model` differs from the one whose `identity` is `record`, in words; None where it is the same.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> small, large = (LlamaForCausalLM(LlamaConfig(vocab_size=size, **sizes)) for size in (50, 60))
        >>> difference(identity(small), large)
        'that was a llama of width 32 with 50 tokens, and this is a llama of width 32 with 60'
        >>> difference(identity(small), small)
    """
    target = Target(model)
    kind, sizes = str(target.config.model_type), (target.hidden_size, target.vocab_size)
    if (record["kind"], record["hidden_size"], record["vocab_size"]) != (kind, *sizes):
        return (
            f"that was a {record['kind']} of width {record['hidden_size']} with {record['vocab_size']} tokens, and this is a "
            f"{kind} of width {sizes[0]} with {sizes[1]}"
        )
    widest = _widest([value for value in model.state_dict().values() if isinstance(value, Tensor)])
    # Its own type if the other was seen in it, else the widest to which this one can be rounded.
    common = next((dtype for dtype in _ROUNDED[widest] if _name(dtype) in record["weights"]), None)
    if common is None:
        if not record["weights"]:
            return None
        return (
            f"its weights were {', '.join(record['weights'])} and these are {_name(widest)}, so that they cannot be compared: "
            f"load the model in {next(iter(record['weights']))}"
        )
    digest = weights_digest(model, common)
    if digest is None or digest == record["weights"][_name(common)]:
        return None
    return f"this {kind} has the same sizes and other weights"


def fits(record: Mapping[str, Any], model: nn.Module) -> str | None:
    """As `difference`, but a model that was found to be the same once is not looked at again, whatever becomes of it."""
    known = _known.setdefault(model, [])
    if record in known:
        return None
    reason = difference(record, model)
    if reason is None:
        known.append(record)
    return reason


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _widest(tensors: list[Tensor]) -> torch.dtype:
    """A type that holds all of their values."""
    found = {tensor.dtype for tensor in tensors}
    if torch.float64 in found:
        return torch.float64
    if torch.float32 in found or {torch.float16, torch.bfloat16} <= found:
        return torch.float32
    return torch.float16 if torch.float16 in found else torch.bfloat16


def _digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    values = tensor.detach()
    if values.is_floating_point():
        values = values.to(dtype)
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    found.update(_bytes(values))
    return found.digest()


def _looks(tensors: list[Tensor]) -> tuple[Any, ...]:
    """What changes when weights do, but for what is written past autograd between the places looked at."""
    return tuple(
        (
            tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
            tensor.dtype,
            tuple(tensor.shape),
            bytes(_bytes(tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)])),
        )
        for tensor in tensors
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data
