"""The key-value cache: slot = position, whatever is committed, dropped and selected."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from paperworks.decoding import SlotCache, TreeCache

CONFIG = LlamaConfig(num_hidden_layers=2)


def states(batch, new, seed):
    """Keys and values (batch, 2, new, 3) of two layers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, batch, 2, new, 3, generator=generator)


def write(cache, new):
    return [cache.update(keys, values, layer) for layer, (keys, values) in enumerate(new)]


def test_rows_hold_what_was_committed_in_its_order_whatever_else_was_written():
    """Rounds of new states of which each row keeps a path; lists of single states say what must lie where."""
    cache = TreeCache(CONFIG, 3)
    held: list[list[torch.Tensor]] = [[], [], []]
    rounds = [
        (6, [[0, 1, 2, 3, 4, 5]] * 3, [6, 2, 4]),
        (4, [[0, 2, 3], [0, 1, 2], [0, 3, -1]], [3, 1, 2]),
        (3, [[0, 2], [0, 1], [-1, -1]], [2, 2, 0]),
        (150, [list(range(150))] * 3, [150, 149, 7]),
        (2, [[0], [0], [0]], [0, 0, 0]),
        (5, [[4, 2], [0, 3], [1, 4]], [2, 2, 1]),
    ]
    for number, (count, path, counts) in enumerate(rounds):
        new = states(3, count, number)
        seen = write(cache, new)
        longest = max(map(len, held))
        for layer, pair in enumerate(seen):
            assert all(part.shape == (3, 2, longest + count, 3) for part in pair)
            for kind, part in enumerate(pair):
                for row, kept in enumerate(held):
                    # What is committed, then the new ones behind it.
                    expected = [*(state[layer, kind] for state in kept), *new[layer, kind, row].unbind(1)]
                    assert torch.equal(part[row, :, : len(expected)], torch.stack(expected, dim=1))
        assert bool(torch.stack([part.isfinite().all() for pair in seen for part in pair]).all())
        cache.commit(torch.tensor(path), counts)
        for row, kept in enumerate(held):
            kept += [new[:, :, row, :, slot] for slot in path[row][: counts[row]]]
        assert cache.lengths == list(map(len, held)) and cache.get_seq_length() == max(map(len, held))
        assert cache.get_mask_sizes(5, 1) == (max(map(len, held)) + 5, 0)
    cache.select([2, 0, 0])
    held = [held[2], held[0], held[0]]
    assert cache.lengths == list(map(len, held))
    for layer, (keys, values) in enumerate((layer.keys, layer.values) for layer in cache.layers):
        for kind, part in enumerate((keys, values)):
            for row, kept in enumerate(held):
                expected = torch.stack([state[layer, kind] for state in kept], dim=1)
                assert torch.equal(part[row, :, : len(kept)], expected)
    # Rows of one length that were copied part again.
    write(cache, states(3, 1, 99))
    cache.commit(torch.zeros(3, 1, dtype=torch.long), [1, 0, 1])
    assert cache.lengths == [len(held[0]) + 1, len(held[1]), len(held[2]) + 1]


def test_nothing_committed_is_nothing_kept():
    cache = TreeCache(CONFIG, 1)
    write(cache, states(1, 3, 0))
    assert cache.lengths == [0] and cache.layers[0].keys.shape[2] >= 3
    again = states(1, 2, 1)
    keys, values = write(cache, again)[1]
    assert torch.equal(keys, again[1, 0]) and torch.equal(values, again[1, 1])
    cache.select([0, 0])
    assert cache.lengths == [0, 0]


def test_a_cache_of_slots_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="at least one row, got batch=0"):
        TreeCache(CONFIG, 0)
    with pytest.raises(ValueError, match="at least one token, got capacity=0"):
        SlotCache(CONFIG, rows=2, capacity=0)
    cache = SlotCache(CONFIG, rows=3, capacity=4)
    for low, high in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"got {low} to {high}"):
            cache.show(low, high)
    with pytest.raises(TypeError, match="use `move`, `clear` and `show`"):
        cache.select([0])
    write(cache, states(3, 4, 0))
    cache.commit(torch.arange(4).expand(3, -1), [4, 3, 0])
    with pytest.raises(ValueError, match="holds 4 tokens and one is at its end"):
        write(cache, states(3, 1, 1))
    for moves in ({0: 1}, {0: 2, 1: 2}):
        with pytest.raises(ValueError, match="rows move to different free rows"):
            cache.move(moves)


def test_a_cache_of_slots_shows_moves_and_clears_rows():
    cache = SlotCache(CONFIG, rows=4, capacity=5)
    new = states(4, 3, 0)
    write(cache, new)
    cache.commit(torch.tensor([[0, 1, 2], [1, 2, 0], [0, 2, 1], [0, 1, 2]]), [3, 2, 1, 0])
    cache.show(1, 3)
    assert cache.lengths == [2, 1] and cache.layers[0].keys.shape[0] == 2
    assert torch.equal(cache.layers[1].keys[0, :, :2], new[1, 0, 1][:, [1, 2]])
    more = states(2, 1, 1)
    keys, values = write(cache, more)[0]
    assert torch.equal(keys[0, :, 2], more[0, 0, 0, :, 0]) and torch.equal(values[1, :, 1], more[0, 1, 1, :, 0])
    cache.commit(torch.zeros(2, 1, dtype=torch.long), [1, 0])
    cache.move({})
    cache.move({1: 3})
    assert cache.lengths == [0, 1]
    cache.show(0, 4)
    assert cache.lengths == [3, 0, 1, 3]
    for kind, part in enumerate((cache.layers[1].keys, cache.layers[1].values)):
        expected = torch.cat([new[1, kind, 1][:, [1, 2]], more[1, kind, 0]], dim=1)
        assert torch.equal(part[3, :, :3], expected)
        assert torch.equal(part[0, :, :3], new[1, kind, 0])
    cache.clear(0)
    assert cache.lengths == [0, 0, 1, 3] and bool(cache.layers[0].keys[0].any())
    cache.clear(3, erase=True)
    assert cache.lengths == [0, 0, 1, 0]
    assert not any(bool(part[3].any()) for layer in cache.layers for part in (layer.keys, layer.values))
    assert all(bool(part[2].any()) for layer in cache.layers for part in (layer.keys, layer.values))
