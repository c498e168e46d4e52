"""Token trees and their shapes against walks from node to node."""

from __future__ import annotations

import random
from itertools import combinations, product

import pytest
import torch

from paperworks.decoding import TokenTree, TreeShape


def random_tree(seed, rows=2, nodes=9):
    """Trees of different forms in one batch, some nodes being padding, with a law for the children of each node."""
    chance = random.Random(seed)
    parents = []
    for _ in range(rows):
        row = [-1]
        for node in range(1, nodes):
            fit = [other for other in range(node) if other == 0 or row[other] >= 0]
            row.append(-1 if chance.random() < 0.15 else chance.choice(fit))
        parents.append(row)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (rows, nodes), generator=generator)
    laws = torch.rand(rows, nodes, 7, generator=generator)
    return TokenTree(tokens, torch.tensor(parents), laws, "with_replacement")


def path_to(parents, node):
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


@pytest.mark.parametrize("seed", range(5))
def test_ancestors_and_depths_are_those_of_a_walk_to_the_root(seed):
    tree = random_tree(seed)
    for row, parents in enumerate(tree.parents.tolist()):
        for node in range(9):
            path = path_to(parents, node)
            assert tree.ancestors[row, node].nonzero()[:, 0].tolist() == sorted(path)
            assert int(tree.depths[row, node]) == len(path) - 1
    chain = TokenTree.chain(torch.arange(12).view(2, 6))
    fresh = TokenTree(chain.tokens, chain.parents)
    assert chain.parents.tolist() == [[-1, 0, 1, 2, 3, 4]] * 2 and chain.draft_probs is None and chain.draw == "point"
    assert torch.equal(chain.ancestors, fresh.ancestors) and chain.is_chain and not tree.is_chain


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_tree_cut_at_a_depth_keeps_all_paths_and_laws_down_to_there(seed, depth):
    tree = random_tree(seed)
    cut = tree.up_to(depth)
    assert cut.draw == "with_replacement"
    for row in range(2):
        kept = [node for node in range(9) if any(int(tree.depths[other, node]) <= depth for other in range(2))]
        old, new = tree.parents[row].tolist(), cut.parents[row].tolist()
        assert cut.tokens[row].tolist() == tree.tokens[row, kept].tolist()
        assert torch.equal(cut.draft_probs[row], tree.draft_probs[row, kept])
        for place, node in enumerate(kept):
            if set(path_to(old, node)) <= set(kept):
                assert [kept[step] for step in path_to(new, place)] == path_to(old, node)
    assert tree.up_to(9) is tree
    assert TokenTree.chain(torch.arange(4)[None]).up_to(1).tokens.tolist() == [[0, 1]]


def test_the_first_path_takes_first_children_with_their_laws():
    laws = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0))
    tree = TokenTree(
        torch.tensor([[5, 6, 7, 8, 9, 4]]), torch.tensor([[-1, 0, 0, 2, 1, 4]]), laws, "without_replacement"
    )
    path = tree.first_path()
    assert path.tokens.tolist() == [[5, 6, 9, 4]] and path.parents.tolist() == [[-1, 0, 1, 2]]
    assert torch.equal(path.draft_probs, laws[:, [0, 1, 4, 5]]) and path.draw == "without_replacement"
    plain = TokenTree(tree.tokens, tree.parents).first_path()
    assert plain.draft_probs is None and plain.draw == "point" and plain.tokens.tolist() == path.tokens.tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TokenTree(torch.zeros(1, 3).long(), torch.zeros(1, 2).long()), r"got \(1, 3\) and \(1, 2\)"),
        (lambda: TokenTree(torch.zeros(3).long(), torch.zeros(3).long()), r"shape \(batch, nodes\)"),
        (
            lambda: TokenTree(torch.zeros(1, 1).long(), torch.full((1, 1), -1), torch.ones(1, 1, 2)),
            "does not fit draft_probs",
        ),
        (
            lambda: TokenTree(torch.zeros(1, 1).long(), torch.full((1, 1), -1), draw="with_replacement"),
            "does not fit draft_probs",
        ),
        (lambda: TreeShape([()]), "non-empty"),
        (lambda: TreeShape([(0,), (0, -1)]), "ranks >= 0"),
        (lambda: TreeShape.best(torch.ones(3), 2), r"\(depth, ranks\) within \[0, 1\]"),
        (lambda: TreeShape.best(torch.tensor([[1.1]]), 2), r"within \[0, 1\]"),
        (lambda: TreeShape.best(torch.tensor([[-0.1]]), 2), r"within \[0, 1\]"),
        (lambda: TreeShape.best(torch.tensor([[0.5]]), 0), "nodes=0"),
    ],
)
def test_what_is_no_tree_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_shape_names_for_each_level_who_grows_and_who_is_grown():
    paths = [(1, 0), (0,), (2,), (1,), (1, 2), (2, 1), (1, 0, 3)]
    shape = TreeShape(paths)
    nodes = [(), (0,), (1,), (2,), (1, 0), (1, 2), (2, 1), (1, 0, 3)]
    assert shape.paths == tuple(nodes[1:]) and len(shape) == 8 and shape.depth == 3
    assert shape.parents.tolist() == [-1] + [nodes.index(path[:-1]) for path in nodes[1:]]
    found = []
    for depth, level in enumerate(shape.levels):
        for child, (owner, rank) in enumerate(zip(level.owners.tolist(), level.ranks.tolist(), strict=True)):
            steps = level.paths[owner].tolist()
            assert [len(nodes[step]) for step in steps] == list(range(depth + 1))
            assert nodes[level.first_child + child] == (*nodes[steps[-1]], rank)
            found.append(nodes[level.first_child + child])
    assert found == nodes[1:] and [level.width for level in shape.levels] == [3, 3, 4]
    made = shape.tree(torch.arange(16).view(2, 8))
    assert torch.equal(made.ancestors, TokenTree(made.tokens, made.parents).ancestors)
    assert TreeShape([]).depth == 0 and len(TreeShape([])) == 1


def test_the_best_shape_promises_most_and_its_promise_is_the_sum_over_its_paths():
    accuracy = torch.tensor([[0.5, 0.3, 0.1], [0.6, 0.1, 0.05], [0.9, 0.02, 0.01]], dtype=torch.float64)
    paths = [path for depth in (1, 2, 3) for path in product(range(2), repeat=depth)]
    for nodes in (1, 2, 3, 4):
        best = 0.0
        for chosen in combinations(paths, nodes):
            if all(path[:-1] in (*chosen, ()) for path in chosen):
                promise = 1.0
                for path in chosen:
                    chance = 1.0
                    for depth, rank in enumerate(path):
                        chance *= float(accuracy[depth, rank])
                    promise += chance
                assert TreeShape(chosen).expected_length(accuracy) == pytest.approx(promise)
                best = max(best, promise)
        assert TreeShape.best(accuracy, nodes).expected_length(accuracy) == pytest.approx(best)
    # There are no more than 3 + 9 + 27 paths; where chances are equal, low ranks come first, and the certain are taken.
    assert len(TreeShape.best(accuracy, 100)) == 1 + 39
    assert TreeShape.best(torch.full((1, 3), 0.2), 2).paths == ((0,), (1,))
    assert TreeShape.best(torch.tensor([[1.0, 0.0]]), 2).paths == ((0,), (1,))
