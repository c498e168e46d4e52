"""Recursive speculative decoding: what arXiv 2402.14160 says must be true of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import permutations

import pytest
import torch
from transformers import AutoModelForCausalLM

from paperworks.decoding import (
    ClassifierFreeGuidance,
    Drafter,
    Exact,
    Sampling,
    Target,
    TokenTree,
    TreeCache,
    collect,
    generate,
    train_drafter,
)
from paperworks.decoding import recursive_speculation as module
from paperworks.decoding.draft_model import DraftModel, first_layers
from paperworks.decoding.drafter import Committed
from paperworks.decoding.recursive_speculation import (
    ConstantBranching,
    IndependentSequences,
    Level,
    RecursiveSpeculation,
    StochasticBeam,
    gumbel_top_k,
    truncate_gumbels,
)
from tests.decoding.conftest import (
    FAMILIES,
    distance,
    enumerate_law,
    make_model,
    model_law,
    output,
)

SAMPLING = Sampling(temperature=1.0)
TREES = {
    "rsd-c": ConstantBranching((2, 2, 1)),
    "rsd-s": StochasticBeam(width=3, depth=3),
    "independent": IndependentSequences(width=3, depth=3),
    "chain": ConstantBranching((1, 1, 1)),
}


def draft_model(family: str = "llama", vocab: int = 40, seed: int = 21):
    """A model unlike the target, but not far from uniform, so that drafts are often right and often wrong."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](vocab))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def dirichlet(*shape: int, seed: int, concentration: float = 0.5) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(torch.full(shape, concentration, dtype=torch.float64)).sample()


def drafters(model, vocab=40):
    """A drafter of every kind of draft."""
    tree = StochasticBeam(width=2, depth=2)
    kinds = {
        "language model": {"draft": draft_model(vocab=vocab)},
        "first layers": {"draft": 1},
        "few words": {"draft": draft_model(vocab=vocab), "vocabulary": torch.tensor([1, 5, 7, 20, 33])},
    }
    return {name: RecursiveSpeculation.from_target(model, tree=tree, **options) for name, options in kinds.items()}


# 1, 2, 3: the rule at one node


def acceptance(children, q, p, draw):
    """Exact law of what the engine makes of drawn `children`: {(token, was it a draft): chance}."""
    tree = TokenTree(
        torch.tensor([[0, *children]]), torch.tensor([[-1] + [0] * len(children)]),
        p.expand(1, len(children) + 1, -1), draw,
    )  # fmt: skip
    accepted = Exact()(tree, q.log().expand(1, len(children) + 1, -1), SAMPLING, None)
    if accepted.lengths[0] > 1:
        return int(tree.tokens[0, accepted.path[0, 1]]), True
    return int(accepted.next_tokens[0]), False


def one_node(count, q, p, monkeypatch, rule=acceptance):
    """Law of the token and of acceptance over all ordered draws without replacement."""
    total = defaultdict(float)
    for children in permutations(range(len(p)), count):
        chance, rest = 1.0, 1.0
        for child in children:
            chance *= float(p[child]) / rest
            rest -= float(p[child])
        law = enumerate_law(lambda c=children: rule(c, q, p, "without_replacement"), monkeypatch)
        for outcome, share in law.items():
            total[outcome] += chance * share
    tokens = defaultdict(float)
    for (token, _), share in total.items():
        tokens[token] += share
    return tokens, sum(share for (_, drafted), share in total.items() if drafted)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_level_gives_the_targets_law_over_all_ordered_draws(count, monkeypatch):
    q, p = dirichlet(5, seed=1), dirichlet(5, seed=2)
    tokens, _ = one_node(count, q, p, monkeypatch)
    assert distance(tokens, dict(enumerate(q.tolist()))) < 1e-12


@pytest.mark.parametrize("count", [2, 3])
def test_a_rule_that_keeps_the_original_draft_law_is_caught(count, monkeypatch):
    q, p = dirichlet(5, seed=1), dirichlet(5, seed=2)
    wrong, _ = one_node(count, q, p, monkeypatch, lambda c, q, p, _: acceptance(c, q, p, "with_replacement"))
    assert distance(wrong, dict(enumerate(q.tolist()))) > 1e-3


def test_all_tokens_drawn_are_always_accepted_and_one_is_plain_speculation(monkeypatch):
    q, p = dirichlet(4, seed=3), dirichlet(4, seed=4)
    assert one_node(4, q, p, monkeypatch)[1] == pytest.approx(1, abs=1e-12)
    assert one_node(1, q, p, monkeypatch)[1] == pytest.approx(float(torch.minimum(q, p).sum()), abs=1e-12)


def test_without_replacement_accepts_no_less_than_with(monkeypatch):
    def accepted_with(count, q, p):
        """Closed recursion for draws with replacement: the residual does not depend on which token was rejected."""
        refused = 1.0
        for _ in range(count):
            overlap = float(torch.minimum(q, p).sum())
            refused *= 1 - overlap
            q = (q - p).clamp(min=0) / max(1 - overlap, 1e-300)
        return 1 - refused

    for seed in range(8):
        q, p = dirichlet(4, seed=seed), dirichlet(4, seed=100 + seed)
        for count in (2, 3):
            assert one_node(count, q, p, monkeypatch)[1] > accepted_with(count, q, p)
    assert one_node(2, q, q, monkeypatch)[1] == pytest.approx(1, abs=1e-12)


# 4: the whole tree


@pytest.mark.parametrize("tree", [ConstantBranching((2, 1)), ConstantBranching((1, 2)), IndependentSequences(2, 2)])
def test_output_law_is_the_targets_over_all_trees(tree, monkeypatch):
    """The tokens of one round and what follows, over every random choice of drafting and accepting."""
    target, draft = make_model(vocab=3), draft_model(vocab=3)
    context = torch.tensor([[0, 2, 1]])
    drafter = RecursiveSpeculation.from_target(target, draft=draft, tree=tree)
    monkeypatch.setattr(module, "gumbel_top_k", one_by_one)
    monkeypatch.setattr(module, "draw", each_row)
    logits_at = logits_behind(target, context)
    law = enumerate_law(lambda: verified(propose(drafter, target, context, 1), logits_at), monkeypatch)
    assert distance(completed(law, target, context, 3), model_law(target, context, 3)) < 1e-12


def logits_behind(model, context):
    """The model's logits behind paths that begin with the last token of `context`, each path read once."""

    @cache
    def at(path):
        with torch.no_grad():
            return model(torch.cat([context[:, :-1], torch.tensor([path])], 1)).logits[0, -1]

    return lambda paths: torch.stack([at(path) for path in paths])


def verified(tree, logits_at):
    """The tokens that one verification of `tree` emits."""
    paths = [tuple(tree.tokens[0, tree.ancestors[0, i]].tolist()) for i in range(tree.tokens.shape[1])]
    accepted = Exact()(tree, logits_at(paths)[None], SAMPLING, None)
    kept = tree.tokens[0, accepted.path[0]].tolist()
    return (*kept[1:], int(accepted.next_tokens[0]))


def chosen(law):
    from paperworks.decoding import acceptance

    return int(acceptance.draw(law[None]))


def each_row(law, generator=None):
    """`draw`, row by row through the enumeration."""
    flat = law.reshape(-1, law.shape[-1])
    return torch.tensor([chosen(row) for row in flat]).reshape(law.shape[:-1])


def one_by_one(log_p, k, generator=None):
    """Draws without replacement, each from what is left, through the enumeration."""
    law, drawn = log_p.exp(), []
    for _ in range(k):
        drawn.append(each_row(law / law.sum(-1, keepdim=True)))
        law = law.scatter(-1, drawn[-1][..., None], 0.0)
    tokens = torch.stack(drawn, dim=-1)
    return log_p.gather(-1, tokens), tokens


def completed(law, target, prompt, length):
    """The law of `length` tokens where the target itself goes on behind shorter outputs."""
    full = defaultdict(float)
    for start, chance in law.items():
        past = torch.cat([prompt, torch.tensor([start])], dim=1)
        for rest, share in model_law(target, past, length - len(start)).items():
            full[(*start, *rest)] += chance * share
    return full


def beam_trees(leaves: dict[tuple[int, int], float], width: int):
    """Trees of a two-level stochastic beam with their chances, from the order in which whole sequences are drawn.

    Sequences drawn without replacement one by one have descending Gumbels, and a prefix has its best sequence's. The
    beam keeps the first `width` distinct first tokens and the first `width` sequences of that order.
    """
    trees = defaultdict(float)
    pending = [((), (), 1.0)]
    while pending:
        order, first, chance = pending.pop()
        if len(order) < width:
            rest = sum(share for leaf, share in leaves.items() if leaf not in order)
            for leaf, share in leaves.items():
                if leaf not in order:
                    pending.append(((*order, leaf), tuple(dict.fromkeys((*first, leaf[0]))), chance * share / rest))
        elif len(first) < width:
            # Which sequences come next no longer matters, only which new first token does.
            rest = sum(share for leaf, share in leaves.items() if leaf[0] not in first)
            for leaf, share in leaves.items():
                if leaf[0] not in first:
                    pending.append((order, (*first, leaf[0]), chance * share / rest))
        else:
            trees[first, order] += chance
    return trees


def as_token_tree(first, second, root, law):
    nodes = [(root,), *((root, a) for a in first), *((root, *pair) for pair in second)]
    parents = [-1] + [nodes.index(node[:-1]) for node in nodes[1:]]
    return TokenTree(torch.tensor([[node[-1] for node in nodes]]), torch.tensor([parents]),
                     law(nodes)[None], "without_replacement")  # fmt: skip


def reordered(first, second, key):
    """The same tree with siblings in another order."""
    return tuple(sorted(first, key=lambda a: key((a,)))), tuple(sorted(second, key=key))


def beam_output_law(target, draft, context, width, monkeypatch, order=None):
    """Exact law of the two tokens behind `context` by a two-level stochastic beam."""
    leaves = model_law(draft, context, 2)
    drafted, judged = logits_behind(draft, context), logits_behind(target, context)
    total = defaultdict(float)
    for (first, second), chance in beam_trees(leaves, width).items():
        if order is not None:
            first, second = reordered(first, second, order(leaves))
        tree = as_token_tree(first, second, int(context[0, -1]), lambda paths: drafted(paths).softmax(-1))
        for outcome, share in enumerate_law(lambda tree=tree: verified(tree, judged), monkeypatch).items():
            total[outcome] += chance * share
    return completed(total, target, context, 3)


def test_stochastic_beam_gives_the_targets_law_over_all_orders_of_sequences(monkeypatch):
    target, draft = make_model(vocab=3), draft_model(vocab=3)
    context = torch.tensor([[0, 2, 1]])
    law = beam_output_law(target, draft, context, 2, monkeypatch)
    assert distance(law, model_law(target, context, 3)) < 1e-12


@pytest.mark.parametrize("order", [
    lambda leaves: lambda path: -sum(p for leaf, p in leaves.items() if leaf[: len(path)] == path),
    lambda leaves: lambda path: path,
], ids=["by draft probability", "by token id"])  # fmt: skip
def test_siblings_in_another_order_than_their_gumbels_are_caught(order, monkeypatch):
    target, draft = make_model(vocab=3), draft_model(vocab=3)
    context = torch.tensor([[0, 2, 1]])
    law = beam_output_law(target, draft, context, 2, monkeypatch, order)
    assert distance(law, model_law(target, context, 3)) > 1e-3


def propose(drafter, target, context, batch, seed=0):
    """Trees behind one context, in `batch` rows of independent noise."""
    state = drafter.start(Target(target), batch, SAMPLING)
    text = context[:, :-1].expand(batch, -1)
    committed = Committed(text, torch.zeros(batch, text.shape[1], 16, dtype=torch.float64), [text.shape[1]] * batch)
    with torch.no_grad():
        return drafter.propose(
            state, committed, context[0, -1].expand(batch), torch.Generator().manual_seed(seed)
        )  # fmt: skip


def chi_square(counts, law, total):
    """The statistic, and its 99.9 % point by Wilson and Hilferty, with rare outcomes lumped together."""
    common = {key: p for key, p in law.items() if p * total >= 5}
    rare = total * (1 - sum(common.values()))
    statistic = sum((counts[key] - total * p) ** 2 / (total * p) for key, p in common.items())
    if rare >= 5:
        seen = total - sum(counts[key] for key in common)
        statistic += (seen - rare) ** 2 / rare
    freedom = len(common) - (rare < 5)
    return statistic, freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("width", [2, 3])
def test_the_beams_drawn_follow_their_exact_law(width):
    """Trees of the sampler, siblings in order, against the law over all orders of sequences."""
    target, draft = make_model(vocab=4), draft_model(vocab=4)
    context, rows = torch.tensor([[0, 2, 1]]), 10_000
    drafter = RecursiveSpeculation.from_target(target, draft=draft, tree=StochasticBeam(width, 2))
    tree = propose(drafter, target, context, rows)
    first = tree.tokens[:, 1 : 1 + width]
    parents = tree.tokens.gather(1, tree.parents[:, 1 + width :])
    second = torch.stack([parents, tree.tokens[:, 1 + width :]], dim=-1)
    counts = Counter(
        (tuple(a), tuple(map(tuple, b))) for a, b in zip(first.tolist(), second.tolist(), strict=True)
    )  # fmt: skip
    law = beam_trees(model_law(draft, context, 2), width)
    statistic, limit = chi_square(counts, law, rows)
    assert set(counts) <= set(law) and statistic < limit


def test_sampled_text_of_a_stochastic_beam_passes_chi_square():
    target, draft = make_model(vocab=3), draft_model(vocab=3)
    prompt, rows = torch.tensor([[0, 1, 2, 0, 2]]), 6_000
    drafter = RecursiveSpeculation.from_target(target, draft=draft, tree=StochasticBeam(2, 2))
    samples = generate(
        target, prompt.expand(rows, -1), drafter=drafter, max_new_tokens=4, temperature=1.0, eos_token_id=[],
        generator=torch.Generator().manual_seed(0),
    ).new_tokens  # fmt: skip
    statistic, limit = chi_square(Counter(map(tuple, samples)), model_law(target, prompt, 4), rows)
    assert statistic < limit


# 5: the samplers


def test_gumbel_top_k_draws_ordered_pairs_without_replacement():
    p, rows = dirichlet(5, seed=6, concentration=2.0), 40_000
    _, pairs = gumbel_top_k(p.log().expand(rows, -1), 2, torch.Generator().manual_seed(0))
    law = {(a, b): float(p[a] * p[b] / (1 - p[a])) for a, b in permutations(range(5), 2)}
    statistic, limit = chi_square(Counter(map(tuple, pairs.tolist())), law, rows)
    assert statistic < limit


def test_truncation_equals_its_formula_and_keeps_the_maximum():
    torch.manual_seed(0)
    g = (4 * torch.randn(200, 6, dtype=torch.float64)).sort(-1, descending=True).values
    maximum = 4 * torch.randn(200, dtype=torch.float64)
    direct = -((-maximum).exp()[:, None] - (-g[:, :1]).exp() + (-g).exp()).log()
    ours = truncate_gumbels(g, maximum)
    torch.testing.assert_close(ours, direct, atol=1e-8, rtol=0)
    assert torch.equal(ours[:, 0], maximum) and bool((ours.diff(dim=-1) <= 0).all())
    far = truncate_gumbels(g - 3000, maximum - 2990)
    assert bool(far.isfinite().all()) and torch.equal(far[:, 0], maximum - 2990)


def test_the_best_child_of_every_node_has_its_parents_gumbel():
    beam = StochasticBeam(width=20, depth=2)  # wide enough to keep every child
    start = torch.zeros(50, 1, dtype=torch.float64)
    level = Level(start.long(), start.long() - 1, start, start)
    generator = torch.Generator().manual_seed(0)
    for depth in range(2):
        above = level
        log_p = dirichlet(50, level.tokens.shape[1], 4, seed=depth).log()
        level = beam.grow(above, depth, log_p, False, generator)
        best = torch.full_like(above.perturbed, -torch.inf).scatter_reduce(1, level.owners, level.perturbed, "amax")
        torch.testing.assert_close(best, above.perturbed, atol=1e-6, rtol=0)
        assert bool((level.perturbed.diff(dim=1) <= 0).all())


def test_the_last_level_of_a_beam_is_a_draw_of_sequences_without_replacement():
    target, draft, context, rows = make_model(vocab=3), draft_model(vocab=3), torch.tensor([[0, 2, 1]]), 10_000
    drafter = RecursiveSpeculation.from_target(target, draft=draft, tree=StochasticBeam(2, 3))
    tree = propose(drafter, target, context, rows)
    paths = [tree.tokens.gather(1, node) for node in ancestors_of_last(tree, 2, 3)]
    sequences = torch.stack(paths, dim=-1).tolist()
    p = model_law(draft, context, 3)
    law = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in permutations(p, 2)}
    statistic, limit = chi_square(Counter(tuple(map(tuple, pair)) for pair in sequences), law, rows)
    assert statistic < limit


def ancestors_of_last(tree, width, depth):
    path = [torch.arange(tree.tokens.shape[1] - width, tree.tokens.shape[1]).expand(len(tree.tokens), -1)]
    for _ in range(depth - 1):
        path.insert(0, tree.parents.gather(1, path[0]))
    return path


# 6: shapes of trees


@pytest.mark.parametrize("name", TREES)
def test_node_counts_and_no_duplicate_siblings(name, model):
    sampler = TREES[name]
    drafter = RecursiveSpeculation.from_target(model, draft=draft_model(), tree=sampler)
    tree = propose(drafter, model, torch.tensor([[3, 1, 2]]), 64)
    levels = {"rsd-c": [2, 4, 4], "rsd-s": [3, 3, 3], "independent": [3, 3, 3], "chain": [1, 1, 1]}[name]
    assert all([int((row == depth).sum()) for depth in (1, 2, 3)] == levels for row in tree.depths)
    assert int(tree.depths.max()) == 3 and bool((tree.parents[:, 1:] >= 0).all())
    siblings = [set(zip(*row, strict=True)) for row in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)]
    distinct = all(len(row) == tree.tokens.shape[1] for row in siblings)
    assert distinct == (name != "independent")


@pytest.mark.parametrize("tree", [StochasticBeam(1, 3), IndependentSequences(1, 3), ConstantBranching([1, 1, 1])])
def test_one_child_a_node_is_a_chain(tree, model, prompt):
    drafter = RecursiveSpeculation.from_target(model, draft=draft_model(), tree=tree)
    assert propose(drafter, model, prompt, 3).is_chain


def test_tokens_outside_the_warped_draft_law_are_padding(model, prompt):
    """Top-k of 2 leaves 2 children of 3: the third has no parent, and the text is the target's all the same."""
    drafter = RecursiveSpeculation.from_target(model, draft=draft_model(), tree=StochasticBeam(3, 2))
    state = drafter.start(Target(model), 1, Sampling(temperature=1.0, top_k=2))
    committed = Committed(prompt, torch.zeros(1, 5, 16), [5])
    with torch.no_grad():
        tree = drafter.propose(state, committed, torch.tensor([4]), None)
    assert tree.parents[0, 1:4].tolist() == [0, 0, -1] and 3 not in tree.parents[0].tolist()
    text = output(model, prompt, drafter=drafter, max_new_tokens=20, temperature=3.0, top_k=1)
    assert text == output(model, prompt, max_new_tokens=20)


def test_repeated_sequences_share_the_first_ones_nodes(model, prompt):
    drafter = RecursiveSpeculation.from_target(model, draft=draft_model(vocab=40), tree=IndependentSequences(6, 3))
    for parameter in drafter.draft.parameters():
        parameter.data *= 1.5  # peaked, so that sequences repeat
    tree = propose(drafter, model, prompt, 32)
    for tokens, parents in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        for node in range(1, len(tokens)):
            twins = [n for n in range(1, node) if (parents[n], tokens[n]) == (parents[node], tokens[node])]
            assert not twins or node not in parents


# 7, 8: with models


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["language model", "first layers"])
@pytest.mark.parametrize("tree", ["rsd-c", "rsd-s", "independent"])
def test_draft_and_its_cache_equal_fresh_forwards(family, name, tree, monkeypatch):
    """Every law that children were drawn from is the draft model's on the text alone, round after round, in a batch."""
    model = make_model(family)
    whole = make_model(family, vocab=40)
    draft = draft_model(family) if name == "language model" else 1
    alone = draft if name == "language model" else first_layers(whole, 1)
    drafter = RecursiveSpeculation.from_target(model, draft=draft, tree=TREES[tree])
    seen = []
    original = RecursiveSpeculation.propose

    def recorded(self, state, committed, root, generator=None):
        result = original(self, state, committed, root, generator)
        cache = state.draft.cache
        layers = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        seen.append((committed, root, result, cache.lengths[:], layers))
        return result

    monkeypatch.setattr(RecursiveSpeculation, "propose", recorded)
    prompts, mask = torch.tensor([[3, 1, 2, 0, 2], [0, 0, 0, 5, 6]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    result = generate(
        model, prompts, attention_mask=mask, drafter=drafter, max_new_tokens=10, temperature=2.0, eos_token_id=[],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    # Something was accepted, or the kept path is not tested.
    assert max(map(max, result.statistics.emitted)) > 2 and len(seen) > 2
    text = [torch.zeros(0, dtype=torch.long)] * 2
    for committed, root, proposed, lengths, layers in seen:
        for row, new in enumerate(committed.lengths):
            if not new:
                continue
            text[row] = torch.cat([text[row], committed.tokens[row, :new]])
            ids = torch.cat([text[row], root[row : row + 1]])
            fresh = TreeCache(alone.config, 1)
            with torch.no_grad():
                Target(alone).prefill([ids], fresh)
            assert lengths[row] == len(ids)
            for (keys, values), other in zip(layers, fresh.layers, strict=True):
                torch.testing.assert_close(keys[row, :, : len(ids)], other.keys[0, :, : len(ids)], atol=1e-9, rtol=0)
                torch.testing.assert_close(
                    values[row, :, : len(ids)], other.values[0, :, : len(ids)], atol=1e-9, rtol=0
                )
            for node in range(1, proposed.tokens.shape[1]):
                parent = int(proposed.parents[row, node])
                path = proposed.tokens[row, proposed.ancestors[row, parent]]
                with torch.no_grad():
                    law = alone(torch.cat([text[row], path])[None]).logits[0, -1].div(2.0).softmax(-1)
                torch.testing.assert_close(proposed.draft_probs[row, parent], law, atol=1e-9, rtol=0)


def test_what_was_accepted_is_not_read_again_and_a_row_that_ended_takes_no_more_places():
    model, width = draft_model(), []
    draft = DraftModel(model, batch=2)
    model.get_input_embeddings().register_forward_hook(lambda module, ids, output: width.append(ids[0].shape[1]))
    with torch.no_grad():
        draft.read(Committed(torch.tensor([[3, 1, 2], [5, 6, 0]]), torch.zeros(2, 3, 16), [3, 2]), torch.tensor([4, 7]))
        tree = TokenTree(torch.tensor([[4, 8, 20, 9], [7, 8, 20, 9]]), torch.tensor([[-1, 0, 0, 1]] * 2))
        draft.extend(tree, first=1)
        assert draft.cache.lengths == [4, 3]
        # The first row keeps 8 and 9, of which 20 is no part; the second is done.
        committed = Committed(torch.tensor([[4, 8, 9], [0, 0, 0]]), torch.zeros(2, 3, 16), [3, 0])
        scores = draft.read(committed, torch.tensor([10, 0]))
        assert width[-2:] == [3, 1] and draft.cache.lengths == [7, 3]
        fresh = model(torch.tensor([[3, 1, 2, 4, 8, 9, 10]])).logits[0, -1]
    torch.testing.assert_close(scores[0, 0], fresh, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tree", TREES)
def test_at_temperature_zero_the_text_is_the_targets_greedy_text(family, tree, prompt):
    model = make_model(family)
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    for draft in (draft_model(family), 1):
        drafter = RecursiveSpeculation.from_target(model, draft=draft, tree=TREES[tree])
        result = generate(model, prompt, drafter=drafter, max_new_tokens=24, eos_token_id=[])
        assert result.sequences.tolist() == expected.tolist()
        cold = generate(model, prompt, drafter=drafter, max_new_tokens=24, eos_token_id=[], temperature=1e-6)
        assert cold.sequences.tolist() == expected.tolist()


def test_without_noise_the_beam_is_beam_search():
    p = dirichlet(5, seed=1), dirichlet(5, 5, seed=2)
    start = torch.zeros(1, 1, dtype=torch.float64)
    beam = StochasticBeam(3, 2)
    first = beam.grow(Level(start.long(), start.long(), start, start), 0, p[0].log()[None, None], True, None)
    second = beam.grow(first, 1, p[1][first.tokens[0]].log()[None], True, None)
    best_first = p[0].topk(3).indices
    joint = (p[0][best_first, None] * p[1][best_first]).flatten().topk(3)
    assert first.tokens[0].tolist() == best_first.tolist()
    torch.testing.assert_close(second.log_p[0].exp(), joint.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_equal_to_the_target_are_all_accepted(family, prompt):
    model = make_model(family)
    drafter = RecursiveSpeculation.from_target(model, draft=make_model(family), tree=StochasticBeam(2, 3))
    result = generate(model, prompt, drafter=drafter, max_new_tokens=17, temperature=1.0, eos_token_id=[])
    assert result.statistics.emitted == [[4, 4, 4, 4]]


@pytest.mark.parametrize("kind", ["language model", "first layers", "few words"])
def test_saved_and_loaded_drafts_the_same(kind, model, prompt, tmp_path):
    drafter = drafters(model)[kind]
    if kind == "language model":
        drafter.draft.lm_head.weight = drafter.draft.model.embed_tokens.weight  # tied, as small models are
    drafter.save_pretrained(tmp_path)
    again = Drafter.from_pretrained(tmp_path, model)
    assert isinstance(again, RecursiveSpeculation) and again.tree == drafter.tree
    texts = [
        generate(model, prompt, drafter=d, max_new_tokens=16, temperature=2.0, eos_token_id=[],
                 generator=torch.Generator().manual_seed(3)) for d in (drafter, again)
    ]  # fmt: skip
    assert texts[0].statistics.emitted == texts[1].statistics.emitted and texts[0].new_tokens == texts[1].new_tokens


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_loaded_draft_attends_as_its_target_does(implementation, tmp_path):
    model = make_model(implementation=implementation)
    RecursiveSpeculation.from_target(model, draft=draft_model()).save_pretrained(tmp_path)
    again = Drafter.from_pretrained(tmp_path, model)
    assert again.draft.config._attn_implementation == implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_are_the_targets_own_and_take_nothing_from_it(family, prompt):
    model = make_model(family)
    shallow = first_layers(model, 1)
    expected = model(prompt, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(shallow.model(prompt).last_hidden_state, model.model.norm(expected))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in shallow.parameters():
        parameter.data += 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.base_model._forward_hooks and model.config.num_hidden_layers == 2


def test_a_reduced_vocabulary_drafts_from_the_laws_own_part(model, prompt):
    """Children come from the draft's law renormalised over the words it may use, with top-p on that."""
    drafter = drafters(model)["few words"]
    words = drafter.vocabulary
    state = drafter.start(Target(model), 1, SAMPLING)
    with torch.no_grad():
        tree = drafter.propose(state, Committed(prompt, torch.zeros(1, 5, 16), [5]), torch.tensor([7]), None)
        assert set(tree.tokens[0, 1:].tolist()) <= set(words.tolist())
        for node in tree.parents[0].unique().tolist():
            if node >= 0:
                path = tree.tokens[:, tree.ancestors[0, node]]
                logits = drafter.draft(torch.cat([prompt, path], dim=1)).logits[0, -1]
                expected = torch.zeros(40, dtype=torch.float64).index_copy(0, words, logits[words].softmax(-1))
                torch.testing.assert_close(tree.draft_probs[0, node], expected, atol=1e-9, rtol=0)


def test_a_draft_with_other_padding_serves_with_the_common_tokens(model, prompt):
    """A head of 44 rows for 40 tokens, as models of one tokenizer have."""
    drafter = RecursiveSpeculation.from_target(model, draft=draft_model(vocab=44), vocabulary=40)
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert generate(model, prompt, drafter=drafter, max_new_tokens=20).sequences.tolist() == expected.tolist()


# Distillation


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 5, 7, 20, 33])])
def test_the_loss_is_the_cross_entropy_with_the_targets_law(vocabulary, model):
    drafter = RecursiveSpeculation.from_target(model, draft=draft_model(), vocabulary=vocabulary)
    tokens = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    words = slice(None) if vocabulary is None else vocabulary
    entropies = []
    with torch.no_grad():
        for row, t in ((row, t) for row in range(2) for t in range(7) if mask[row, t + 1]):
            q, p = (m(tokens[row : row + 1, : t + 1]).logits[0, -1, words].log_softmax(-1)
                    for m in (model, drafter.draft))  # fmt: skip
            entropies.append(-(q.exp() * p).sum())
        hidden = model(tokens, output_hidden_states=True).hidden_states[-1]
        loss = drafter.loss(Target(model), tokens, hidden, mask)
    assert loss.item() == pytest.approx(torch.stack(entropies).mean().item(), rel=1e-5)


def test_training_on_own_text_makes_drafts_longer_and_leaves_target_and_embedding_alone():
    model = make_model(dtype=torch.float32)
    starts = torch.arange(40)[:, None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = generate(model, starts, max_new_tokens=30, temperature=1.0, eos_token_id=[],
                       generator=torch.Generator().manual_seed(0)).new_tokens  # fmt: skip
    data = collect(model, [([start], tokens) for start, tokens in enumerate(written)])
    drafter = RecursiveSpeculation.from_target(model, draft=1, tree=StochasticBeam(3, 3))

    def tokens_a_call():
        return generate(
            model, starts, drafter=drafter, max_new_tokens=25, temperature=1.0, eos_token_id=[],
            generator=torch.Generator().manual_seed(1),
        ).statistics.accepted_per_call  # fmt: skip

    untrained = tokens_a_call()
    train_drafter(drafter, model, data, epochs=20, learning_rate=5e-3, generator=torch.Generator().manual_seed(0))
    assert tokens_a_call() > 1.05 * untrained
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(drafter.draft.lm_head.weight, model.lm_head.weight)
    assert torch.equal(drafter.draft.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"draft": 0}, "1 to 1 of the target's 2 first layers, got 0"),
        ({"draft": 2}, "1 to 1 of the target's 2 first layers, got 2"),
        ({"draft": draft_model(vocab=39)}, "scores 39 tokens and the target 40"),
        ({"draft": draft_model(vocab=39), "vocabulary": 40}, "token 39, which draft or target do not know"),
        ({"draft": draft_model().to("meta")}, "on meta and the target on cpu"),
    ],
)
def test_bad_drafts_are_refused(options, words, model):
    with pytest.raises(ValueError, match=words):
        RecursiveSpeculation.from_target(model, **options)


def test_bad_sizes_are_refused(model):
    with pytest.raises(ValueError, match="first layers of a ClassifierFreeGuidance: give a draft model"):
        first_layers(ClassifierFreeGuidance(model, condition=[1], null=2), 1)
    with pytest.raises(ValueError, match="width must be at least 1"):
        StochasticBeam(0, 2)
    with pytest.raises(ValueError, match="branching must be at least 1"):
        ConstantBranching((2, 0))
    with pytest.raises(ValueError, match="branching must be at least 1"):
        ConstantBranching(())
    with pytest.raises(TypeError, match="causal language model"):
        RecursiveSpeculation.from_target(model, draft=torch.nn.Linear(2, 2), tree=StochasticBeam(2, 2))
