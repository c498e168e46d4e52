"""A key-value cache in which slot = position, with rows of different lengths and commits of a tree path."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin


class _TreeLayer(CacheLayerMixin):
    """One layer's preallocated keys and values, (batch, heads, capacity, dim)."""

    is_sliding = False
    _spare = 128

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = lengths  # shared by all layers of a cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._grown(None, key_states, 0)
        self.values = self._grown(None, value_states, 0)
        self.is_initialized = True

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = like.shape
        # Zeros, since what is masked is still multiplied: weight 0 times a stray NaN would be NaN.
        new = like.new_zeros(batch, heads, capacity, dim)
        if old is not None:
            new[:, :, : old.shape[2]] = old
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new states behind each row's committed length; return everything up to the longest row's end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        new, longest = key_states.shape[2], max(self.lengths)
        if longest + new > self.keys.shape[2]:
            capacity = longest + new + max(longest, self._spare)
            self.keys = self._grown(self.keys, key_states, capacity)
            self.values = self._grown(self.values, value_states, capacity)
        if min(self.lengths) == longest:
            self.keys[:, :, longest : longest + new] = key_states
            self.values[:, :, longest : longest + new] = value_states
        else:
            starts = torch.tensor(self.lengths, device=key_states.device)
            slots = starts[:, None] + torch.arange(new, device=key_states.device)
            rows = torch.arange(len(starts), device=key_states.device)[:, None]
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : longest + new], self.values[:, :, : longest + new]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max(self.lengths)

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """Keys and values of committed tokens, with room behind them for the nodes of a tree under examination.

    A forward pass writes its tokens behind each row's committed length and changes nothing else: forgetting to commit is
    rolling back. `commit` makes a path of those tokens permanent.

    Args:
        config: The model's configuration; it gives the number of layers.
        batch: Rows.

    Example:
        >>> from transformers import LlamaConfig
        >>> cache = TreeCache(LlamaConfig(num_hidden_layers=2), batch=1)
        >>> cache.lengths, len(cache.layers)
        ([0], 2)
    """

    def __init__(self, config: PreTrainedConfig, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"a cache needs at least one row, got batch={batch}")
        self.lengths = [0] * batch
        super().__init__(layers=[_TreeLayer(self.lengths) for _ in range(config.num_hidden_layers)])

    def commit(self, path: Tensor, counts: list[int]) -> None:
        """Keep the first `counts[b]` nodes of `path[b]`, in that order, of the tokens just written; drop the others.

        Args:
            path: Indices of the kept nodes among those written by the last pass, shape (batch, depth).
            counts: How many entries of each row of `path` to keep; 0 keeps nothing.
        """
        widest = max(counts, default=0)
        source = path[:, :widest].clamp(min=0)
        line = torch.arange(widest, device=path.device)
        if not bool((source == line).all()):
            rows = torch.arange(len(counts), device=path.device)[:, None]
            starts = torch.tensor(self.lengths, device=path.device)[:, None]
            for layer in self.layers:
                if layer.is_initialized:
                    for states in (layer.keys, layer.values):
                        states[rows, :, starts + line] = states[rows, :, starts + source]
        self.lengths[:] = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Keep only `rows`, in that order."""
        self.lengths[:] = [self.lengths[row] for row in rows]
        for layer in self.layers:
            if layer.is_initialized:
                index = torch.tensor(rows, device=layer.keys.device)
                layer.keys, layer.values = layer.keys[index], layer.values[index]
