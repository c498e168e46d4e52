"""Acceptance rules against enumeration and closed forms."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

from paperworks.decoding import Exact, Greedy, Sampling, TokenTree, Typical
from tests.decoding.conftest import distance, enumerate_law

SAMPLING = Sampling(temperature=1.0)


def dirichlet(size: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(torch.full((size,), 0.5, dtype=torch.float64)).sample()


def siblings(children: tuple[int, ...], proposal: torch.Tensor, draw: str) -> TokenTree:
    tokens = torch.tensor([[0, *children]])
    parents = torch.tensor([[-1] + [0] * len(children)])
    return TokenTree(tokens, parents, proposal.expand(1, len(children) + 1, -1), draw)


def first_token(tree: TokenTree, law: torch.Tensor) -> int:
    logits = law.log().expand(1, tree.tokens.shape[1], -1)
    accepted = Exact()(tree, logits, SAMPLING, None)
    return int(tree.tokens[0, accepted.path[0, 1]] if accepted.lengths[0] > 1 else accepted.next_tokens[0])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("draw", ["with_replacement", "without_replacement"])
def test_recursive_rejection_gives_the_targets_law(count, draw, monkeypatch):
    target, proposal = dirichlet(5, 1), dirichlet(5, 2)
    total: dict[int, float] = {}
    draws = permutations(range(5), count) if draw == "without_replacement" else product(range(5), repeat=count)
    for children in draws:
        chance, rest = 1.0, proposal.clone()
        for child in children:
            chance *= float(rest[child] / rest.sum())
            if draw == "without_replacement":
                rest[child] = 0
        tree = siblings(children, proposal, draw)
        for token, p in enumerate_law(lambda tree=tree: first_token(tree, target), monkeypatch).items():
            total[token] = total.get(token, 0.0) + chance * p
    assert distance(total, dict(enumerate(target.tolist()))) < 1e-12


def test_all_tokens_drawn_without_replacement_are_always_accepted(monkeypatch):
    target, proposal = dirichlet(4, 3), dirichlet(4, 4)
    tree = siblings((2, 0, 3, 1), proposal, "without_replacement")

    def length() -> int:
        return int(Exact()(tree, target.log().expand(1, 5, -1), SAMPLING, None).lengths[0])

    assert enumerate_law(length, monkeypatch) == pytest.approx({2: 1.0}, abs=1e-12)


def test_one_child_is_plain_speculative_sampling(monkeypatch):
    target, proposal = dirichlet(5, 5), dirichlet(5, 6)
    accepted = 0.0
    for child in range(5):
        tree = siblings((child,), proposal, "without_replacement")
        law = enumerate_law(
            lambda tree=tree: int(Exact()(tree, target.log().expand(1, 2, -1), SAMPLING, None).lengths[0]), monkeypatch
        )
        accepted += float(proposal[child]) * law.get(2, 0.0)
    assert accepted == pytest.approx(float(torch.minimum(target, proposal).sum()), abs=1e-12)


def test_greedy_takes_the_longest_path_of_argmaxes():
    tree = TokenTree(torch.tensor([[0, 1, 2, 1, 2]]), torch.tensor([[-1, 0, 0, 1, 3]]))
    choice = torch.tensor([[1, 1, 0, 3, 4]])
    logits = torch.nn.functional.one_hot(choice, 5).float()
    accepted = Greedy()(tree, logits, Sampling())
    assert accepted.path.tolist() == [[0, 1, 3]]
    assert accepted.next_tokens.tolist() == [3]


def test_padding_nodes_are_never_accepted():
    tree = TokenTree(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[-1, 0], [-1, -1]]))
    logits = torch.nn.functional.one_hot(torch.ones(2, 2, dtype=torch.long), 3).float()
    for acceptance in (Greedy(), Exact(), Typical()):
        accepted = acceptance(tree, logits * 50, SAMPLING, None)
        assert accepted.lengths.tolist() == [2, 1]


def test_typical_keeps_what_the_formula_keeps():
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    entropy = float(-(law * law.log()).sum())
    threshold = min(0.09, 0.3 * float(torch.tensor(-entropy).exp()))
    for token in range(4):
        tree = TokenTree(torch.tensor([[0, token]]), torch.tensor([[-1, 0]]))
        accepted = Typical()(tree, law.log().expand(1, 2, -1), SAMPLING, torch.Generator().manual_seed(0))
        assert (int(accepted.lengths[0]) == 2) == (float(law[token]) > threshold)


def test_typical_breaks_ties_by_log_probability():
    law = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    tree = TokenTree(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]]))
    accepted = Typical()(tree, law.log().expand(1, 3, -1), SAMPLING, None)
    assert accepted.path.tolist() == [[0, 2]]


@pytest.mark.parametrize("top_k, top_p", [(None, None), (3, None), (None, 0.7), (5, 0.8), (1, None), (None, 0.01)])
def test_sampling_law_equals_transformers_warpers(top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    scores = TemperatureLogitsWarper(0.7)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p else scores
    ours = Sampling(0.7, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(ours, scores.softmax(-1))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
