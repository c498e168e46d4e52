"""A key-value cache in which slot = position, with rows of different lengths and commits of a tree path."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin


def layer_count(config: PreTrainedConfig) -> int:
    """Layers of a decoder; what was cut out of an encoder-decoder calls the encoder's `num_hidden_layers`.

    Example:
        >>> from transformers import BartConfig
        >>> layer_count(BartConfig(encoder_layers=1, decoder_layers=3))
        3
    """
    for name in ("decoder_layers", "num_decoder_layers"):
        if layers := getattr(config, name, None):
            return int(layers)
    return int(config.num_hidden_layers)


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
        super().__init__(layers=[_TreeLayer(self.lengths) for _ in range(layer_count(config))])

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


class _SlotLayer(_TreeLayer):
    """One layer's memory, (rows, heads, capacity, dim), seen through a window of rows."""

    def __init__(self, lengths: list[int], rows: int, capacity: int) -> None:
        super().__init__(lengths)
        self.rows, self.capacity = rows, capacity
        self.window = slice(0, 0)
        self.memory: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.memory = tuple(
            states.new_zeros(self.rows, states.shape[1], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.show(self.window)
        self.is_initialized = True

    def show(self, window: slice) -> None:
        self.window = window
        if self.memory:
            self.keys, self.values = (states[window] for states in self.memory)

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        raise ValueError(
            f"a row of this cache holds {self.capacity} tokens and one is at its end: make the cache with a larger capacity"
        )


class SlotCache(TreeCache):
    """A `TreeCache` over memory for a fixed number of rows, of which a pass sees the contiguous window last shown.

    Rows come, move and leave one by one: nothing but a row that moves is ever copied. Memory is taken at the first pass.

    Args:
        config: The model's configuration; it gives the number of layers.
        rows: Rows there is memory for.
        capacity: Tokens that a row holds at most.

    Attributes:
        lengths: Committed tokens of the rows in the window.

    Raises:
        ValueError: rows or capacity below 1; in a pass, a row that is full.

    Example:
        >>> from transformers import LlamaConfig
        >>> cache = SlotCache(LlamaConfig(num_hidden_layers=2), rows=8, capacity=64)
        >>> cache.show(2, 5)
        >>> cache.lengths
        [0, 0, 0]
    """

    def __init__(self, config: PreTrainedConfig, rows: int, capacity: int) -> None:
        super().__init__(config, rows)
        if capacity < 1:
            raise ValueError(f"a row needs room for at least one token, got capacity={capacity}")
        self.layers = [_SlotLayer(self.lengths, rows, capacity) for _ in range(layer_count(config))]
        self._all = self.lengths[:]
        self._window = slice(0, 0)
        self.show(0, rows)

    def show(self, low: int, high: int) -> None:
        """Let the passes that follow read and write rows `low` to `high`, `high` excluded."""
        if not 0 <= low < high <= len(self._all):
            raise ValueError(f"a window holds rows of 0 to {len(self._all)}, at least one, got {low} to {high}")
        window = slice(low, high)
        if window != self._window:
            # None that layers could be taken to show, if this is interrupted between two of them.
            self._window = slice(0, 0)
            for layer in self.layers:
                layer.show(window)
            self._window = window
        self.lengths[:] = self._all[window]

    def commit(self, path: Tensor, counts: list[int]) -> None:
        """Keep tokens of the rows in the window; see `TreeCache.commit`."""
        super().commit(path, counts)
        self._all[self._window] = self.lengths

    def move(self, moves: dict[int, int]) -> None:
        """Copy rows to free rows, `{source: destination}`, and leave the sources empty.

        Raises:
            ValueError: a destination holds tokens or is named twice.
        """
        if not moves:
            return
        sources, destinations = list(moves), list(moves.values())
        if len({*destinations}) < len(moves) or any(self._all[row] for row in destinations):
            raise ValueError(f"rows move to different free rows, got {moves} where rows hold {self._all} tokens")
        longest = max(self._all[row] for row in sources)
        for layer in self.layers:
            for states in layer.memory:
                states[destinations, :, :longest] = states[sources, :, :longest]
        for source, destination in moves.items():
            self._all[destination], self._all[source] = self._all[source], 0
        self.lengths[:] = self._all[self._window]

    def clear(self, row: int, *, erase: bool = False) -> None:
        """Forget the tokens of a row; `erase` overwrites them too, which NaN or infinite states need.

        A later row there masks what lies behind its own tokens, but weight 0 times NaN is NaN.
        """
        self._all[row] = 0
        self.lengths[:] = self._all[self._window]
        if erase:
            for layer in self.layers:
                for states in layer.memory:
                    states[row].zero_()

    def select(self, rows: list[int]) -> None:
        """Not for this cache, whose memory stays where it is."""
        raise TypeError("a SlotCache keeps all its rows: use `move`, `clear` and `show`")
