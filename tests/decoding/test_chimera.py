"""Chimera: what arXiv 2402.15758 says must be true of its encoders and heads, and training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from paperworks.decoding import (
    Chimera,
    Drafter,
    DraftingData,
    Medusa,
    Sampling,
    Target,
    collect,
    fit_tree,
    generate,
    rank_accuracy,
    train_drafter,
)
from paperworks.decoding.drafter import Committed
from tests.decoding.conftest import TREE, distance, enumerate_law, make_model, model_law, output, scramble

VARIANTS = [{}, {"trigram": False}, {"context_layers": 0}, {"residual_heads": False}, {"context_layers": 2}]
SOME_TEXT = torch.tensor([[7, 3, 1, 2, 0, 2, 9, 30, 21, 4, 4, 17]])


def states_of(model, tokens):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states[-1]


def reference_e(drafter, model, text):
    """e of the last token of `text` by its formula."""
    window = text[-3:] + text[-1:] * (3 - len(text))
    if drafter.encoder.mix is None:
        window = window[-1:]
    c = torch.cat([model.get_input_embeddings()(torch.tensor(token)) for token in window]).detach()
    c = c * drafter.embedding_scale
    if drafter.encoder.mix is not None:
        c = c + F.silu(drafter.encoder.mix.weight @ c + drafter.encoder.mix.bias)
    return drafter.encoder.project.weight @ c


def reference_g(drafter, model, hidden, text, path):
    """g of each token of `path` behind `text`, whose states are `hidden`, by plain causal passes over one sequence."""
    sequence, text, found = list(hidden), list(text), []
    for token in path:
        text.append(int(token))
        g = reference_e(drafter, model, text)
        if drafter.context is not None:
            g = drafter.context(torch.stack([*sequence, g])[None])[0, -1]
        found.append(g)
        sequence.append(g.detach())
    return found


def reference_logits(drafter, model, head, h, g):
    """C_k [h ; g], put together from its parts."""
    both = torch.cat([h, g]) if drafter.residual is not None else g
    parts = [drafter.residual[head].weight] if drafter.residual is not None else []
    c = torch.cat([*parts, drafter.heads[head].weight], dim=1)
    return model.lm_head.weight @ (c @ both) if drafter.options["tie_lm_head"] else c @ both


def drafted_states(drafter, run):
    """What g each head is given while `run` runs."""
    seen = []
    hooks = [head.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for head in drafter.heads]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def serve(drafter, model, tokens, chunks):
    """The tree behind `tokens` but the last, its root, when the others were committed in `chunks`; its g; the state."""
    target, hidden = Target(model), states_of(model, tokens)
    state, trees, end = drafter.start(target, 1, Sampling()), [], 0

    def last():
        trees.append(drafter.propose(state, committed, tokens[:, end]))

    for chunk in chunks:
        committed = Committed(tokens[:, end : end + chunk], hidden[:, end : end + chunk], [chunk])
        end += chunk
        seen = drafted_states(drafter, last)
    return trees[-1], seen, state


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("trained", ["not at all", "at random"])
def test_1_greedy_output_is_the_targets_for_any_weights(model, prompt, options, trained):
    drafter = Chimera.from_target(model, **options).eval()
    if trained == "at random":
        drafter = scramble(drafter)
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    result = generate(model, prompt, drafter=drafter, max_new_tokens=24, eos_token_id=[])
    assert result.sequences.tolist() == expected.tolist()
    assert result.statistics.target_calls <= 23


@pytest.mark.parametrize("tied", [True, False])
def test_2_initial_heads_add_the_targets_scores_of_both_states(model, tied):
    drafter = Chimera.from_target(model, tie_lm_head=tied)
    torch.nn.init.zeros_(drafter.encoder.project.weight)
    tokens, hidden = SOME_TEXT, states_of(model, SOME_TEXT)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        for k, prediction in enumerate(drafter.predictions(Target(model), tokens, hidden, mask)):
            h = hidden[0, prediction.positions[:, 1] - 1 - k]
            expected = model.lm_head(h) + model.lm_head(prediction.state)
            torch.testing.assert_close(prediction.logits, expected, atol=1e-9, rtol=0)
            drafter.heads[k].weight.zero_()
        for k, prediction in enumerate(drafter.predictions(Target(model), tokens, hidden, mask)):
            h = hidden[0, prediction.positions[:, 1] - 1 - k]
            assert torch.equal(prediction.logits, model.lm_head(h))


def test_2_initial_trigram_encoder_is_linear(model):
    drafter = Chimera.from_target(model)
    assert not drafter.encoder.mix.weight.any() and not drafter.encoder.mix.bias.any()
    e = drafter._encoded(Target(model), SOME_TEXT[0, :3], torch.float64)
    c = model.model.embed_tokens(SOME_TEXT[0, :3]).flatten() * drafter.embedding_scale
    torch.testing.assert_close(e, drafter.encoder.project.weight @ c, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_2_embeddings_are_read_at_unit_size(family):
    model = make_model(family)
    embedded = model.get_input_embeddings()(torch.arange(40)) * Chimera.from_target(model).embedding_scale
    assert float(embedded.detach().square().mean()) == pytest.approx(1, rel=1e-5)


def test_3_e_sees_three_tokens_and_g_all_of_them(model):
    for options in ({}, {"context_layers": 0}):
        drafter = scramble(Chimera.from_target(model, heads=1, tree=[(0,)], **options))
        mask = torch.ones_like(SOME_TEXT, dtype=torch.bool)

        def states(tokens, drafter=drafter, mask=mask):
            with torch.no_grad():
                return next(drafter.predictions(Target(model), tokens, states_of(model, tokens), mask)).state

        before, j = states(SOME_TEXT), 8
        for changed in range(SOME_TEXT.shape[1]):
            tokens = SOME_TEXT.clone()
            tokens[0, changed] = (tokens[0, changed] + 5) % 40
            # State number i is that of token i + 2.
            difference = float((states(tokens)[j - 2] - before[j - 2]).detach().abs().max())
            reach = j if drafter.context is not None else 2
            assert (difference > 1e-6) if 0 <= j - changed <= reach else (difference == 0), (options, changed)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("options", VARIANTS)
def test_3_and_4_drafting_in_any_chunks_is_each_path_alone(family, options):
    model = make_model(family)
    drafter = scramble(Chimera.from_target(model, heads=3, tree=[*TREE, (0, 0, 1), (1, 0, 0)], **options))
    for length, ways in ((9, ([9], [5, 1, 3], [1] * 9)), (1, ([1],)), (2, ([2], [1, 1]))):
        tokens = SOME_TEXT[:, : length + 1]
        hidden = states_of(model, tokens)[0, :length]
        for chunks in ways:
            tree, seen, state = serve(drafter, model, tokens, chunks)
            assert state.cache is None or state.cache.lengths == [length]
            for depth, level in enumerate(drafter.tree.levels):
                for g, path in zip(seen[depth][0], level.paths, strict=True):
                    expected = reference_g(drafter, model, hidden, tokens[0, :length].tolist(), tree.tokens[0, path])
                    torch.testing.assert_close(g, expected[-1], atol=1e-9, rtol=0)
                ranked = [
                    reference_logits(drafter, model, depth, hidden[-1], g).topk(level.width).indices
                    for g in seen[depth][0]
                ]
                children = [int(ranked[owner][rank]) for owner, rank in zip(level.owners, level.ranks, strict=True)]
                first = level.first_child
                assert tree.tokens[0, first : first + len(children)].tolist() == children


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [*VARIANTS, {"own_tokens": False}, {"vocabulary": torch.arange(3, 35)}])
@pytest.mark.parametrize("training", [False, True])
def test_4_training_is_drafting_at_every_position(family, options, training):
    model = make_model(family)
    drafter = scramble(Chimera.from_target(model, heads=3, tree=[(0,), (0, 0), (0, 0, 0)], **options)).train(training)
    tokens = torch.cat([SOME_TEXT, SOME_TEXT.flip(1)])
    hidden, mask = states_of(model, tokens), torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :5], mask[1, 7], mask[1, 10:] = False, False, False
    words = torch.arange(40) if drafter.vocabulary is None else drafter.vocabulary
    with torch.no_grad():
        predictions = list(drafter.predictions(Target(model), tokens, hidden, mask))
    found = [
        {tuple(position): (logits, label, state) for position, logits, label, state in zip(
            p.positions.tolist(), p.logits, p.labels.tolist(), p.state, strict=True)}
        for p in predictions
    ]  # fmt: skip
    expected: list[set] = [set(), set(), set()]
    for row in range(2):
        for t in range(1, tokens.shape[1] - 2):
            path = [int(tokens[row, t + 1])]
            for k in range(min(3, tokens.shape[1] - 2 - t)):
                label = int(tokens[row, t + 2 + k])
                if mask[row, t + 2 + k]:
                    expected[k].add((row, t + 1 + k))
                    logits, said, state = found[k][row, t + 1 + k]
                    g = reference_g(drafter, model, hidden[row, : t + 1], tokens[row, : t + 1].tolist(), path)[-1]
                    torch.testing.assert_close(state, g, atol=1e-9, rtol=0)
                    full = reference_logits(drafter, model, k, hidden[row, t], g)
                    torch.testing.assert_close(logits, full[words], atol=1e-9, rtol=0)
                    assert said == label
                    own = training and drafter.options["own_tokens"]
                    path.append(int(words[full[words].argmax()]) if own else label)
                else:
                    path.append(label)
    assert [set(level) for level in found] == expected


def test_4_what_is_fed_on_is_detached(model):
    drafter = scramble(Chimera.from_target(model, heads=2, tree=[(0,), (0, 0)]))
    hidden, mask = states_of(model, SOME_TEXT), torch.ones_like(SOME_TEXT, dtype=torch.bool)
    target = Target(model)
    list(drafter.predictions(target, SOME_TEXT, hidden, mask))[1].state[4].square().sum().backward()
    ours = {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad(set_to_none=True)
    # State number 4 of the second head belongs to t = 5.
    path = SOME_TEXT[0, 6:8].tolist()
    reference_g(drafter, model, hidden[0, :6], SOME_TEXT[0, :6].tolist(), path)[1].square().sum().backward()
    theirs = {name: p.grad for name, p in drafter.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and any(name.startswith("context") for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-9, rtol=1e-9)


def trigram_language(noise: float, tokens: int = 20, sequences: int = 256, length: int = 64):
    """Text of x_{j+1} = f(x_{j-1}, x_j), or any token with probability `noise`, and a model whose states are pairs.

    Returns the model, the text with states that say which pair of tokens came last, and the law of the next token after
    each pair.
    """
    torch.manual_seed(0)
    follows = torch.randint(tokens, (tokens, tokens))
    law = (1 - noise) * F.one_hot(follows, tokens).double() + noise / tokens
    text = torch.randint(tokens, (sequences, 2))
    for _ in range(length - 2):
        text = torch.cat([text, torch.multinomial(law[text[:, -2], text[:, -1]], 1)], dim=1)
    pair = F.pad(text, (1, 0))[:, :-1] * tokens + text
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=tokens**2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, head_dim=4,
        vocab_size=tokens, pad_token_id=None,
    )).eval()  # fmt: skip
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    torch.nn.init.zeros_(model.lm_head.weight)
    data = DraftingData(text, F.one_hot(pair, tokens**2).float(), torch.ones_like(text, dtype=torch.bool))
    return model, data, law


def test_5_a_trigram_language_is_drafted_and_independent_heads_stay_at_the_marginal_rate():
    noise = 0.15
    model, data, law = trigram_language(noise)
    tokens = len(law)
    # The chain of pairs (a, b) -> (b, c), its stationary law, and the best guess of the token after next.
    chain = torch.zeros(tokens, tokens, tokens, tokens, dtype=torch.float64)
    for b in range(tokens):
        chain[:, b, b, :] = law[:, b]
    chain = chain.view(tokens**2, tokens**2)
    stationary = torch.linalg.matrix_power(chain, 512)[0]
    two_steps = chain @ law.view(tokens**2, tokens)
    marginal = float(stationary @ two_steps.max(1).values)
    train, held_out = data.split(64)
    reached = {}
    for kind, options in ((Medusa, {"teacher_weight": 0.0}), (Chimera, {"distil_weight": 0.0})):
        torch.manual_seed(1)
        drafter = kind.from_target(model, heads=1, tree=[(0,)], tie_lm_head=False, label_weight=1.0, **options)
        train_drafter(drafter, model, train, epochs=8, batch_size=16, learning_rate=5e-3,
                      generator=torch.Generator().manual_seed(0))  # fmt: skip
        reached[kind] = float(rank_accuracy(drafter, model, held_out, ranks=1)[0, 0])
    assert reached[Chimera] >= 1 - noise - 0.03
    assert reached[Medusa] == pytest.approx(marginal, abs=0.025)
    assert marginal < 1 - noise - 0.1


def test_6_memoised_trigrams_draft_the_same(model, prompt, monkeypatch):
    plain = scramble(Chimera.from_target(model, heads=3, tree=TREE))
    memoised = Chimera.from_target(model, heads=3, tree=TREE, memoise=True).eval()
    memoised.load_state_dict(plain.state_dict())
    trees: dict[Chimera, list] = {plain: [], memoised: []}
    for drafter, seen in trees.items():
        propose = drafter.propose

        def record(*args, propose=propose, seen=seen):
            seen.append(propose(*args))
            return seen[-1]

        monkeypatch.setattr(drafter, "propose", record)
        generate(model, prompt, drafter=drafter, max_new_tokens=30, eos_token_id=[])
    assert len(trees[plain]) == len(trees[memoised]) > 5
    for one, other in zip(*trees.values(), strict=True):
        assert torch.equal(one.tokens, other.tokens)


def test_6_a_known_trigram_is_not_encoded_again(model):
    drafter = scramble(Chimera.from_target(model, memoise=True))
    known: dict = {}
    trigrams = torch.tensor([[[1, 2, 3], [4, 5, 6], [1, 2, 3]], [[-1, 2, 3], [2, 3, 3], [1, 2, 3]]])
    seen = []
    drafter.encoder.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        first = drafter._encoded(Target(model), trigrams, torch.float64, known)
        again = drafter._encoded(Target(model), trigrams, torch.float64, known)
        fresh = drafter._encoded(Target(model), trigrams, torch.float64)
    assert seen == [4, 2] and len(known) == 4
    assert torch.equal(first, again)
    torch.testing.assert_close(first, fresh, atol=1e-12, rtol=0)
    torch.testing.assert_close(first[1, 0], first[1, 1])


@pytest.mark.parametrize("options", [{}, {"tie_lm_head": False, "memoise": True}, {"vocabulary": torch.tensor([0, 2])}])
def test_7_exact_sampling_is_the_targets_law(options, monkeypatch):
    model, prompt = make_model(vocab=3), torch.tensor([[0, 2]])
    drafter = scramble(Chimera.from_target(model, heads=2, tree=[(0,), (1,), (0, 0), (1, 1)], **options))
    law = enumerate_law(lambda: output(model, prompt, drafter=drafter, max_new_tokens=3, temperature=1.0), monkeypatch)
    assert distance(law, model_law(model, prompt, 3)) < 1e-12


def test_7_an_oracle_is_accepted_whole():
    """The next token is the last one plus 1, of 7, and g is made to be the drafted token, as the target's state is."""
    config = LlamaConfig(hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=7)
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(model.model.norm.weight)
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    model.lm_head.weight.data[:, :7] = torch.eye(7, dtype=torch.float64).roll(1, dims=0)
    for heads in (1, 2, 4):
        drafter = Chimera.from_target(model, heads=heads, tree=[(0,) * depth for depth in range(1, heads + 1)]).eval()
        for parameter in [*drafter.context.parameters(), *drafter.residual.parameters()]:
            torch.nn.init.zeros_(parameter)
        drafter.encoder.project.weight.data = torch.cat([torch.zeros(8, 16), torch.eye(8)], dim=1).double()
        result = generate(
            model, torch.tensor([[3]]), drafter=drafter, max_new_tokens=1 + 3 * (heads + 1), eos_token_id=[]
        )
        assert result.statistics.emitted == [[heads + 1] * 3]
        assert result.new_tokens[0] == [(4 + i) % 7 for i in range(1 + 3 * (heads + 1))]


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, "hidden"), (0.5, 2.0, "logits"), (0.0, 1.0, "logits"), (1.0, 0.0, "hidden")]
)
@pytest.mark.parametrize("vocabulary", [None, torch.arange(3, 35)])
def test_loss_terms_equal_their_formulas(model, weights, vocabulary):
    label_weight, distil_weight, distil_on = weights
    drafter = scramble(Chimera.from_target(
        model, heads=2, tree=[(0,)], label_weight=label_weight, distil_weight=distil_weight, distil_on=distil_on,
        vocabulary=vocabulary,
    ))  # fmt: skip
    tokens = torch.cat([SOME_TEXT, SOME_TEXT.flip(1)])
    hidden, mask = states_of(model, tokens), torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = False
    words = list(range(40)) if vocabulary is None else vocabulary.tolist()
    expected = 0.0
    for k in range(2):
        labels, teachers, distances = [], [], []
        for row, t in [(r, t) for r in range(2) for t in range(1, 10 - k) if mask[r, t + 2 + k]]:
            path = tokens[row, t + 1 : t + 2 + k]
            g = reference_g(drafter, model, hidden[row, : t + 1], tokens[row, : t + 1].tolist(), path)[-1]
            logits = reference_logits(drafter, model, k, hidden[row, t], g)[words].log_softmax(-1)
            if int(tokens[row, t + 2 + k]) in words:
                labels.append(-logits[words.index(int(tokens[row, t + 2 + k]))])
            teachers.append(-(model.lm_head(hidden[row, t + 1 + k])[words].softmax(-1) * logits).sum())
            distances.append((g - hidden[row, t + 1]).square().mean())
        expected += label_weight * float(torch.stack(labels).mean())
        if distil_on == "logits":
            expected += distil_weight * float(torch.stack(teachers).mean())
        elif k == 0:
            expected += distil_weight * float(torch.stack(distances).mean())
    assert float(drafter.loss(Target(model), tokens, hidden, mask)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", VARIANTS[:4])
def test_training_on_own_text_raises_accuracy_and_leaves_the_target_alone(options):
    model = make_model(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    written = [([1], tokens) for tokens in generate(
        model, torch.arange(40)[:, None], max_new_tokens=30, eos_token_id=[],
        generator=torch.Generator().manual_seed(0)).new_tokens]  # fmt: skip
    train, held_out = collect(model, written).split(8)
    torch.manual_seed(0)
    drafter = Chimera.from_target(model, heads=2, tree=[(0,), (0, 0)], **options)
    untrained = rank_accuracy(drafter, model, held_out, ranks=3)
    train_drafter(drafter, model, train, epochs=10, learning_rate=1e-2, generator=torch.Generator().manual_seed(0))
    after = fit_tree(drafter, model, held_out, nodes=4, ranks=3)
    assert bool((after[:, 0] > untrained[:, 0] + 0.1).all())
    assert len(drafter.tree) == 5
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_default_tree_has_the_papers_counts(model):
    for heads, counts in ((4, [4, 8, 8, 3]), (5, [4, 8, 8, 3, 2]), (2, [4, 8])):
        tree = Chimera.from_target(model, heads=heads).tree
        assert [sum(len(path) == depth + 1 for path in tree.paths) for depth in range(heads)] == counts
        assert max(map(max, tree.paths)) == 3
    # At each depth, of all children of what is kept above, those with the smallest sums of ranks.
    level = {()}
    for depth, count in enumerate((4, 8, 8, 3), 1):
        children = sorted(
            ((*path, rank) for path in level for rank in range(4)), key=lambda path: (sum(path), path)
        )  # fmt: skip
        level = set(children[:count])
        assert level == {path for path in Chimera.from_target(model).tree.paths if len(path) == depth}


def test_saved_with_its_options_and_vocabulary(model, prompt, tmp_path):
    vocabulary = torch.tensor([1, 5, 7, 20, 33])
    options = {
        "trigram": False,
        "residual_heads": False,
        "tie_lm_head": False,
        "distil_on": "logits",
        "label_weight": 0.5,
    }
    drafter = scramble(Chimera.from_target(model, heads=2, tree=TREE[:5], vocabulary=vocabulary, **options))
    plain = generate(model, prompt, max_new_tokens=20, eos_token_id=[]).new_tokens
    assert generate(model, prompt, drafter=drafter, max_new_tokens=20, eos_token_id=[]).new_tokens == plain
    drafter.save_pretrained(tmp_path)
    again = Drafter.from_pretrained(tmp_path, model)
    assert again.config == drafter.config and again.vocabulary.tolist() == vocabulary.tolist()
    assert again.options.items() >= options.items()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"heads": 0}, "heads must be at least 1"),
        ({"context_layers": -1}, "must not be negative"),
        ({"distil_on": "states"}, "hidden or logits"),
        ({"label_weight": 0.0}, "learn nothing"),
        ({"label_weight": 0.0, "distil_weight": 0.0, "distil_on": "logits"}, "learn nothing"),
        ({"distil_weight": -1.0}, "none a negative one"),
        ({"heads": 1, "tree": [(0,), (0, 0)]}, "2 deep but there are 1 heads"),
        ({"vocabulary": 3}, "best 4 tokens but only 3 are scored"),
    ],
)
def test_bad_options_are_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        Chimera.from_target(model, **options)
