"""Acceptance rules against enumeration and closed forms."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch

from paperworks.decoding import Exact, Greedy, Sampling, TokenTree, Typical
from paperworks.decoding.sampling import check_logits, draw
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


def test_typical_threshold_falls_with_the_entropy():
    """Behind a law this flat no token has epsilon, and exp(-entropy) decides: the figures by hand."""
    law = torch.cat([torch.tensor([0.06, 0.03, 0.01]), torch.full((18,), 0.05)]).double()
    bound = 0.3 * math.exp(sum(p * math.log(p) for p in law.tolist()))
    assert 0.01 < bound < 0.03
    tree = TokenTree(torch.tensor([[0, 2], [0, 1], [0, 0]]), torch.tensor([[-1, 0]] * 3))
    accepted = Typical()(tree, law.log().expand(3, 2, -1), SAMPLING, torch.Generator().manual_seed(0))
    assert accepted.lengths.tolist() == [1, 2, 2]
    # A larger fraction of it asks for more, up to epsilon.
    for alpha, epsilon, lengths in ((0.8, 0.09, [1, 1, 2]), (3.0, 0.09, [1, 1, 1]), (3.0, 0.02, [1, 2, 2])):
        accepted = Typical(epsilon, alpha)(tree, law.log().expand(3, 2, -1), SAMPLING, torch.Generator())
        assert accepted.lengths.tolist() == lengths


@pytest.mark.parametrize(("epsilon", "alpha"), [(0.0, 0.3), (1.1, 0.3), (0.09, 0.0)])
def test_typical_values_out_of_range_are_refused(epsilon, alpha):
    with pytest.raises(ValueError, match="epsilon must be within"):
        Typical(epsilon, alpha)
    assert Typical(1.0, 1e-3).epsilon == 1


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


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"temperature": 1e-39},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_sampling_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_without_a_temperature_the_first_of_the_most_likely_tokens_has_all():
    logits = torch.tensor([[[1.0, 3.0, 3.0], [2.0, -1.0, 0.0]], [[0.0, 0.0, 5.0], [-4.0, -3.0, -torch.inf]]])
    law = Sampling().probabilities(logits)
    assert law.tolist() == [[[0, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]]]
    assert Sampling().greedy and not Sampling(0.1).greedy
    kinds = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float64: torch.float64}
    for sampling in (Sampling(), Sampling(0.7, 2, 0.9)):
        assert {kind: sampling.probabilities(logits.to(kind)).dtype for kind in kinds} == kinds


def test_what_makes_no_law_is_told_apart():
    fine = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]])
    check_logits(fine)
    for row, words in (
        ([-torch.inf, -torch.inf], "no token is possible"),
        ([torch.nan, 0.0], "returned NaN logits"),
        ([torch.inf, 0.0], "returned infinite logits"),
    ):
        with pytest.raises(ValueError, match=words):
            check_logits(torch.cat([fine, torch.tensor([row])]))


def test_a_draw_is_the_inverse_of_the_summed_law_to_the_last_token(monkeypatch):
    """A law in float32 whose tail its own sums would lose, at points of the unit interval up to its very ends."""
    law = torch.tensor([0.0, 1.0] + [5e-8] * 1000 + [0.0])
    sums = law.double().cumsum(0)
    for point, token in ((0.0, 1), (0.5, 1), (0.99996, None), (0.99999, None), (1 - 2**-53, 1001)):
        monkeypatch.setattr(
            torch, "rand", lambda shape, point=point, **options: torch.full(shape, point, dtype=torch.float64)
        )
        expected = int((sums <= point * sums[-1]).sum()) if token is None else token
        assert draw(law.expand(2, -1)).tolist() == [expected] * 2
        assert token is not None or expected > 1


@pytest.mark.parametrize("total", [0.5, 1.0, 3.0])
def test_a_uniform_number_that_rounds_to_1_draws_the_last_possible_token(total, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.ones(shape, dtype=torch.float64))
    assert draw(total * torch.tensor([[0.0, 0.75, 0.25, 0.0], [0.25, 0.75, 0.0, 0.0]])).tolist() == [2, 1]
