"""What a node of a tree attends to."""

from __future__ import annotations

import pytest
import torch

from paperworks.decoding import TokenTree
from paperworks.decoding.target import tree_mask


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("first", [0, 2])
def test_a_node_sees_its_text_its_ancestors_and_itself(window, first):
    parents = [[-1, 0, 0, 1, 3], [-1, 0, 1, 2, 0]]
    lengths = [4, 2]
    tree = TokenTree(torch.zeros(2, 5, dtype=torch.long), torch.tensor(parents))
    mask = tree_mask(tree, lengths, torch.float32, window, first=first)
    assert mask.shape == (2, 1, 5 - first, 4 + 5)
    # A mask of its own, not a part of a larger one: kernels want it aligned.
    assert mask.storage_offset() == 0
    for row, (above, length) in enumerate(zip(parents, lengths, strict=True)):
        for node in range(first, 5):
            path = [node]
            while above[path[-1]] >= 0:
                path.append(above[path[-1]])
            position = length + len(path) - 1
            places = {place: place for place in range(length)}
            places |= {length + other: position - back for back, other in enumerate(path)}
            wanted = {slot for slot, place in places.items() if window is None or position - place < window}
            seen = mask[row, 0, node - first] == 0
            assert set(seen.nonzero().flatten().tolist()) == wanted
            assert bool((mask[row, 0, node - first][~seen] == torch.finfo(torch.float32).min).all())
