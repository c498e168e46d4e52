"""Relaxed acceptance (LANTERN): the lines under "What must be true"."""

from __future__ import annotations

import pytest
import torch

from paperworks.decoding import Exact, Greedy, Sampling, TokenTree, generate
from paperworks.decoding.relaxed_acceptance import RelaxedAcceptance, nearest_codes
from tests.decoding.conftest import (
    DRAFTERS,
    distance,
    enumerate_law,
    make_model,
    model_law,
    output,
    scramble,
)

VOCAB = 16
NEAR = nearest_codes(torch.arange(3.0)[:, None])


def laws(seed: int, vocab: int = VOCAB, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, rows, vocab, dtype=torch.float64, generator=generator).pow(3)
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def codebook(seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, 3, generator=torch.Generator().manual_seed(seed))


def drawn_tree(tokens: torch.Tensor, q: torch.Tensor) -> TokenTree:
    """A root with one child a row, drawn from q."""
    rows = len(tokens)
    chain = TokenTree.chain(torch.stack([torch.zeros_like(tokens), tokens], 1))
    return TokenTree(chain.tokens, chain.parents, q[:, None].expand(rows, 2, -1), "with_replacement")


def one_step(accept: Exact, p: torch.Tensor, q: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """Frequencies of the first token, and how often the draft was kept, over `count` drafts from q."""
    generator = torch.Generator().manual_seed(1)
    drafts = torch.multinomial(q.expand(count, -1), 1, generator=generator)[:, 0]
    tree = drawn_tree(drafts, q.expand(count, -1))
    result = accept(tree, p.log().expand(count, 2, -1), Sampling(1.0), generator)
    kept = result.lengths == 2
    first = torch.where(kept, drafts, result.next_tokens)
    return torch.bincount(first, minlength=p.shape[-1]) / count, kept.float().mean().item()


@pytest.mark.parametrize("setting", [{"delta": 0.0}, {"neighbours": 0}, {"delta": 1.0, "mode": "ratio"}])
@pytest.mark.parametrize("name", ["hydra", "hydra++"])
def test_without_budget_the_law_is_the_targets_by_enumeration(setting, name, monkeypatch):
    model = make_model(vocab=3)
    prompt = torch.tensor([[0, 2]])
    drafter = scramble(DRAFTERS[name](model))
    drafter.tree = type(drafter.tree)([(0,), (1,), (0, 0)])
    relaxed = RelaxedAcceptance(nearest_codes(codebook(vocab=3)), **setting)
    law = enumerate_law(
        lambda: output(model, prompt, drafter=drafter, acceptance=relaxed, max_new_tokens=2, temperature=1.0),
        monkeypatch,
    )
    assert distance(law, model_law(model, prompt, 2)) < 1e-12


def test_without_budget_and_with_top_k_the_law_is_that_of_exact_acceptance(monkeypatch):
    model = make_model(vocab=4)
    prompt = torch.tensor([[0, 2]])
    drafter = scramble(DRAFTERS["hydra"](model))
    drafter.tree = type(drafter.tree)([(0,), (1,), (0, 0)])
    options = dict(drafter=drafter, max_new_tokens=2, temperature=1.0, top_k=2)
    exact, relaxed = (
        enumerate_law(lambda accept=accept: output(model, prompt, acceptance=accept, **options), monkeypatch)
        for accept in (Exact(), RelaxedAcceptance(nearest_codes(codebook(vocab=4)), delta=0.0))
    )
    assert len(exact) == 4 and distance(exact, relaxed) < 1e-12


def test_neighbours_of_no_probability_change_nothing_without_budget():
    p, _ = laws(0)
    p[0, 3:] = 0
    p = p / p.sum()
    relaxed = RelaxedAcceptance(nearest_codes(codebook()), delta=0.0)
    for token in range(3):
        assert relaxed.judged_by(p, torch.tensor([token])).equal(p)


@pytest.mark.parametrize("mode", ["tv", "ratio"])
def test_moved_mass_is_the_total_variation_and_within_budget(mode):
    near = nearest_codes(codebook())
    for seed in range(20):
        p, _ = laws(seed)
        sizes = []
        for delta in (0.05, 0.1, 0.2, 0.4) if mode == "tv" else (1.0, 2.0, 5.0, 20.0):
            for token in range(VOCAB):
                relaxed = RelaxedAcceptance(near, delta=delta, mode=mode)
                law = relaxed.judged_by(p, torch.tensor([token]))
                moved = (law[0, token] - p[0, token]).item()
                assert abs(law.sum().item() - 1) < 1e-12
                assert abs((law - p).abs().sum().item() / 2 - moved) < 1e-12
                budget = delta if mode == "tv" else (delta - 1) * p[0, token].item()
                assert moved <= budget + 1e-12
                # By hand: the longest run of neighbours within the budget, and no other code is touched.
                run, total = [], 0.0
                for code in near[token].tolist():
                    if total + p[0, code] > budget:
                        break
                    run, total = [*run, code], total + p[0, code].item()
                changed = (law[0] != p[0]).nonzero()[:, 0].tolist()
                assert set(changed) <= {token, *run} and abs(moved - total) < 1e-12
                sizes.append(len(run))
        by_delta = torch.tensor(sizes).view(4, VOCAB)
        assert bool((by_delta.diff(dim=0) >= 0).all())
        fewer = RelaxedAcceptance(near, neighbours=2, delta=0.4)._taken(p, torch.tensor([0]))[0].sum()
        assert fewer <= RelaxedAcceptance(near, delta=0.4)._taken(p, torch.tensor([0]))[0].sum() + 1e-12


def test_acceptance_rises_with_the_budget_and_is_certain_for_its_own_law():
    near = nearest_codes(codebook())
    for seed in range(10):
        p, q = laws(seed)
        chances = []
        for delta in (0.0, 0.1, 0.3, 1.0):
            relaxed = RelaxedAcceptance(near, delta=delta)
            judged = torch.stack([relaxed.judged_by(p, torch.tensor([x]))[0, x] for x in range(VOCAB)])
            assert bool((judged >= p[0] - 1e-15).all())
            chances.append(torch.minimum(judged, q[0]).sum().item())
        assert chances == sorted(chances) and chances[-1] > chances[0]
        assert abs(chances[0] - torch.minimum(p, q).sum().item()) < 1e-12
    # A draft law equal to p_x of the only token it can draw is always accepted.
    p, _ = laws(3)
    relaxed = RelaxedAcceptance(near, delta=0.3)
    q = relaxed.judged_by(p, torch.tensor([5]))
    tree = drawn_tree(torch.full((500,), 5), q.expand(500, -1))
    result = relaxed(tree, p.log().expand(500, 2, -1), Sampling(1.0), torch.Generator().manual_seed(0))
    assert bool((result.lengths == 2).all())


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_output_law_of_one_step_is_its_closed_form_and_departs_further_than_delta(delta):
    count, near = 200_000, nearest_codes(codebook(1))
    p, q = laws(5)
    relaxed = RelaxedAcceptance(near, delta=delta)
    form = torch.zeros(VOCAB, dtype=torch.float64)
    for x in range(VOCAB):
        judged = relaxed.judged_by(p, torch.tensor([x]))[0]
        chance = min(1.0, (judged[x] / q[0, x]).item())
        residual = (judged - q[0]).clamp(min=0)
        form[x] += q[0, x] * chance
        form += q[0, x] * (1 - chance) * residual / residual.sum().clamp(min=1e-300)
    measured, _ = one_step(relaxed, p, q, count)
    statistic = ((measured * count - count * form) ** 2 / (count * form)).sum()
    assert statistic < 37.7  # 99.9 % point for 15 degrees of freedom
    assert (form - p[0]).abs().sum() / 2 > delta


@pytest.mark.parametrize("mode", ["tv", "ratio"])
def test_output_law_behind_deterministic_children_is_its_closed_form_by_enumeration(mode, monkeypatch):
    departures = []
    for seed in range(5):
        p, _ = laws(seed, 6)
        relaxed = RelaxedAcceptance(nearest_codes(codebook(seed, 6)), delta=0.3 if mode == "tv" else 1.8, mode=mode)
        children = torch.tensor([[4, 1, 5]])
        tree = TokenTree(torch.cat([torch.tensor([[0]]), children], 1), torch.tensor([[-1, 0, 0, 0]]))

        def step(relaxed=relaxed, tree=tree, p=p):
            result = relaxed(tree, p.log().expand(1, 4, -1), Sampling(1.0))
            return int(tree.tokens[0, result.path[0, 1]] if result.lengths[0] == 2 else result.next_tokens[0])

        law = enumerate_law(step, monkeypatch)
        form = relaxed.output_law(p, children)[0]
        assert distance(law, dict(enumerate(form.tolist()))) < 1e-12
        departures.append(distance(law, dict(enumerate(p[0].tolist()))))
        exact = RelaxedAcceptance(relaxed.nearest, neighbours=0).output_law(p, children)
        torch.testing.assert_close(exact, p, atol=1e-12, rtol=0)
    assert max(departures) > 0.05


def test_duplicated_codes_keep_the_law_of_pairs_and_gain_acceptance():
    pairs = torch.randn(VOCAB // 2, 3, generator=torch.Generator().manual_seed(0))
    near = nearest_codes(pairs.repeat_interleave(2, dim=0), 1)
    whole, draft = laws(2, VOCAB // 2)
    split = torch.rand(2, VOCAB // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    p, q = (
        torch.stack([law[0] * s, law[0] * (1 - s)], 1).view(1, -1) for law, s in zip((whole, draft), split, strict=True)
    )
    exact, kept_exact = one_step(Exact(), p, q, 200_000)
    relaxed, kept = one_step(RelaxedAcceptance(near, delta=1.0), p, q, 200_000)
    of_pairs = relaxed.view(-1, 2).sum(1)
    assert kept > kept_exact + 0.05
    assert (of_pairs - whole[0]).abs().sum() / 2 < 0.5 * (relaxed - p[0]).abs().sum() / 2
    assert (exact.view(-1, 2).sum(1) - whole[0]).abs().max() < 5e-3


def test_greedy_is_exact_match_without_budget_and_accepts_all_with_the_whole():
    model = make_model(vocab=VOCAB)
    prompt = torch.tensor([[3, 1, 2]])
    drafter = scramble(DRAFTERS["hydra"](model))
    near = nearest_codes(codebook())
    options = dict(drafter=drafter, max_new_tokens=20, eos_token_id=[])
    exact = generate(model, prompt, acceptance=Greedy(), **options)
    none = generate(model, prompt, acceptance=RelaxedAcceptance(near, neighbours=0), **options)
    assert none.new_tokens == exact.new_tokens and none.statistics.emitted == exact.statistics.emitted
    everything = generate(model, prompt, acceptance=RelaxedAcceptance(near, delta=1.0), **options)
    assert all(emitted == drafter.tree.depth + 1 for emitted in everything.statistics.emitted[0][:-1])


@pytest.mark.parametrize(("mode", "delta"), [("tv", 0.1), ("tv", 0.3), ("ratio", 2.0)])
def test_greedy_keeps_a_code_whose_set_reaches_the_largest_probability(mode, delta):
    near = nearest_codes(codebook())
    relaxed = RelaxedAcceptance(near, delta=delta, mode=mode)
    kept, expected = [], []
    for seed in range(10):
        p, _ = laws(seed)
        tree = TokenTree.chain(torch.stack([torch.zeros(VOCAB, dtype=torch.long), torch.arange(VOCAB)], 1))
        result = relaxed(tree, p.log().expand(VOCAB, 2, -1), Sampling())
        kept += (result.lengths == 2).tolist()
        assert bool((result.next_tokens == p.argmax()).all())
        for token in range(VOCAB):
            total, own = 0.0, p[0, token].item()
            for code in near[token].tolist():
                if total + p[0, code] > (delta if mode == "tv" else (delta - 1) * own):
                    break
                total += p[0, code].item()
            others = max(p[0, code].item() for code in range(VOCAB) if code != token)
            expected.append(own + total >= others)
    assert kept == expected and 0 < sum(kept) < len(kept)


def test_neighbours_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    vectors = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    found = NearestNeighbors(n_neighbors=10).fit(vectors.numpy()).kneighbors(return_distance=False)
    assert nearest_codes(vectors, 10).tolist() == found.tolist()
    assert nearest_codes(vectors).shape == (60, 59) and nearest_codes(vectors, 0).shape == (60, 0)
    # Of more codes than are compared at once; of those as near the first comes first.
    line = nearest_codes(torch.arange(1100.0)[:, None], 4)
    assert line.shape == (1100, 4) and line[1023:1026].tolist() == [
        [n - 1, n + 1, n - 2, n + 2] for n in range(1023, 1026)
    ]
    assert line[[0, 1099]].tolist() == [[1, 2, 3, 4], [1098, 1097, 1096, 1095]]
    # What uint16 can hold is enough to store them.
    stored = nearest_codes(vectors, 10).to(torch.uint16)
    assert RelaxedAcceptance(stored).nearest.equal(nearest_codes(vectors, 10))


def test_permuted_codes_give_permuted_results():
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    vectors, (p, _) = codebook(), laws(1)
    one = RelaxedAcceptance(nearest_codes(vectors), delta=0.3)
    other = RelaxedAcceptance(nearest_codes(vectors[order]), delta=0.3)
    for new, old in enumerate(order.tolist()):
        expected = one.judged_by(p, torch.tensor([old]))[:, order]
        torch.testing.assert_close(other.judged_by(p[:, order], torch.tensor([new])), expected)
    near = nearest_codes(torch.cat([vectors, vectors]))
    assert bool((near != torch.arange(2 * VOCAB)[:, None]).all())


def test_tokens_that_are_no_codes_have_no_neighbours():
    p, _ = laws(0, VOCAB + 4)
    relaxed = RelaxedAcceptance(nearest_codes(codebook()), delta=1.0, first_code=3)
    for token in (0, 2, VOCAB + 3):
        assert relaxed.judged_by(p, torch.tensor([token])).equal(p)
    law = relaxed.judged_by(p, torch.tensor([7]))
    assert law[0, [0, 1, 2, VOCAB + 3]].equal(p[0, [0, 1, 2, VOCAB + 3]]) and law[0, 7] > p[0, 7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_codes(torch.full((3, 2), torch.nan)), "finite vectors"),
        (lambda: nearest_codes(torch.zeros(3, 2), 3), r"within 0\.\.2"),
        (lambda: RelaxedAcceptance(torch.zeros(3, 2)), "code numbers"),
        (lambda: RelaxedAcceptance(torch.tensor([[1], [1]])), r"other codes within 0\.\.1"),
        (lambda: RelaxedAcceptance(torch.tensor([[1], [2]])), r"other codes within 0\.\.1"),
        (lambda: RelaxedAcceptance(NEAR, delta=1.5), r"within \[0, 1\]"),
        (lambda: RelaxedAcceptance(NEAR, delta=0.5, mode="ratio"), r"within \[1, inf\]"),
        (lambda: RelaxedAcceptance(NEAR, neighbours=3), r"within 0\.\.2"),
        (lambda: RelaxedAcceptance(NEAR, neighbours=-1), r"within 0\.\.2"),
        (lambda: RelaxedAcceptance(NEAR, first_code=-1), "first_code not negative"),
        (lambda: RelaxedAcceptance(NEAR, delta=-0.1), r"within \[0, 1\]"),
        (lambda: RelaxedAcceptance(torch.tensor([[-1], [0]])), r"other codes within 0\.\.1"),
        (lambda: RelaxedAcceptance(torch.tensor([1, 0])), "code numbers"),
        (lambda: nearest_codes(torch.zeros(3)), "finite vectors"),
        (lambda: nearest_codes(torch.zeros(3, 2), -1), r"within 0\.\.2"),
        (lambda: RelaxedAcceptance(NEAR, mode="both"), "tv or ratio"),
        (
            lambda: RelaxedAcceptance(NEAR, first_code=2)(
                TokenTree.chain(torch.zeros(1, 1).long()), torch.zeros(1, 1, 4), Sampling(1.0)
            ),
            "do not fit a vocabulary of 4",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
