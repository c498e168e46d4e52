"""Hydra's heads: what arXiv 2402.05109 says must be true of them, and training."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from paperworks.decoding import (
    Drafter,
    DraftingData,
    Hydra,
    Medusa,
    Sampling,
    Target,
    TreeShape,
    collect,
    fit_tree,
    generate,
    rank_accuracy,
    self_written,
    train_drafter,
)
from paperworks.decoding.drafter import Committed
from paperworks.decoding.training import soft_cross_entropy
from tests.decoding.conftest import TREE, make_model, scramble

CHAIN = [(0,), (0, 0), (0, 0, 0)]


def states_of(model, tokens):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states[-1]


def head_outputs(drafter, run):
    """States that come out of each head while `run` runs."""
    seen = []
    hooks = [head.register_forward_hook(lambda module, args, output: seen.append(output)) for head in drafter.heads]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def markov(states: int = 6, length: int = 64, sequences: int = 256):
    """A Llama whose blocks do nothing, so that its state is the last token, one-hot, and its law a Markov chain's."""
    torch.manual_seed(0)
    transition = torch.distributions.Dirichlet(torch.full((states,), 0.4)).sample((states,)).double()
    config = LlamaConfig(
        hidden_size=states, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, head_dim=4,
        vocab_size=states, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.model.norm.weight.data.fill_(states**-0.5)
    model.model.embed_tokens.weight.data.copy_(torch.eye(states))
    model.lm_head.weight.data.copy_(transition.clamp(min=1e-6).log().T)
    tokens = torch.randint(states, (sequences, 1))
    for _ in range(length - 1):
        tokens = torch.cat([tokens, torch.multinomial(transition[tokens[:, -1]].float(), 1)], dim=1)
    stationary = torch.linalg.matrix_power(transition, 200)[0]
    data = DraftingData(tokens, torch.eye(states)[tokens], torch.ones_like(tokens, dtype=torch.bool))
    return model.eval(), transition, stationary, data


def test_heads_on_a_markov_chain_reach_the_closed_forms():
    model, transition, stationary, data = markov()
    train, held_out = data.split(64)
    best = {
        Medusa: float((stationary * (transition @ transition).max(1).values).sum()),
        Hydra: float((stationary * transition.max(1).values).sum()),
    }
    for kind, expected in best.items():
        torch.manual_seed(1)
        drafter = kind.from_target(model, heads=1, tree=[(0,)], tie_lm_head=False, label_weight=1.0, teacher_weight=0.0)
        train_drafter(drafter, model, train, epochs=15, learning_rate=2e-2, generator=torch.Generator().manual_seed(0))
        reached = float(rank_accuracy(drafter, model, held_out, ranks=1)[0, 0])
        assert reached == pytest.approx(expected, rel=0.02), kind
    assert best[Hydra] > best[Medusa] * 1.1


def test_a_drafted_ancestor_changes_its_own_branch_only(model, prompt):
    drafter = scramble(Hydra.from_target(model, heads=3, tree=TREE))
    target = Target(model)
    committed = Committed(prompt, states_of(model, prompt), [5])
    shape, conditions = drafter.tree, []
    hooks = [
        head.register_forward_hook(lambda module, args, output: conditions.append(args[0])) for head in drafter.heads
    ]
    with torch.no_grad():
        drafter.propose(drafter.start(target, 1, Sampling()), committed, torch.tensor([4]))
    for hook in hooks:
        hook.remove()
    # Head 1 is given the states of nodes (0,) and (1,), head 2 that of (0, 0): change token (0,) in what they read.
    changed = conditions[1].clone()
    changed[:, 0, -16:] += 1.0
    before, after = drafter.heads[1](conditions[1]), drafter.heads[1](changed)
    assert shape.levels[1].paths.tolist() == [[0, 1], [0, 2]] and shape.levels[2].paths.tolist() == [[0, 1, 3]]
    assert not torch.allclose(before[:, 0], after[:, 0])
    assert torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize("prefix_layer", [False, True])
def test_a_head_does_not_see_later_tokens_in_training(model, prefix_layer):
    drafter = scramble(Hydra.from_target(model, heads=3, prefix_layer=prefix_layer, tree=CHAIN))
    tokens = torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(0))
    mask, position = torch.ones_like(tokens, dtype=torch.bool), 4
    for head in range(3):
        seen = position + 1 + head
        other = tokens.clone()
        other[:, seen + 1 :] = (other[:, seen + 1 :] + 1) % 40
        nearer = tokens.clone()
        nearer[:, seen] = (nearer[:, seen] + 1) % 40
        hidden = states_of(model, tokens)
        one, far, near = (
            list(drafter.predictions(Target(model), ids, hidden, mask))[head].logits[position]
            for ids in (tokens, other, nearer)
        )
        assert torch.equal(one, far)
        assert not torch.allclose(one, near)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"layers": 3}, {"prefix_layer": True}])
def test_training_path_equals_inference_path(family, options):
    model = make_model(family)
    drafter = scramble(Hydra.from_target(model, heads=3, tree=CHAIN, **options))
    target = Target(model)
    tokens = torch.randint(40, (1, 10), generator=torch.Generator().manual_seed(3))
    hidden = states_of(model, tokens)
    state = drafter.start(target, 1, Sampling())
    with torch.no_grad():
        # The prefix layer reads the text in three pieces, as generation does.
        drafter.propose(state, Committed(tokens[:, :5], hidden[:, :5], [5]), tokens[:, 5])
        drafter.propose(state, Committed(tokens[:, 5:6], hidden[:, 5:6], [1]), tokens[:, 6])
        trees = []
        served = head_outputs(
            drafter,
            lambda: trees.append(drafter.propose(state, Committed(tokens[:, 6:8], hidden[:, 6:8], [2]), tokens[:, 8])),
        )
    drafted = torch.cat([tokens[:, :9], trees[0].tokens[:, 1:]], dim=1)
    padded = torch.cat([hidden[:, :8], torch.zeros(1, drafted.shape[1] - 8, 16, dtype=hidden.dtype)], dim=1)
    mask = torch.ones_like(drafted, dtype=torch.bool)
    with torch.no_grad():
        for head, prediction in enumerate(drafter.predictions(target, drafted, padded, mask)):
            torch.testing.assert_close(prediction.state[7], served[head][0, 0], atol=1e-9, rtol=0)
            assert int(prediction.logits[7].argmax()) == int(drafted[0, 9 + head])


def test_without_conditioning_columns_a_head_is_medusas(model):
    hydra = scramble(Hydra.from_target(model, heads=3, layers=2, tree=CHAIN))
    medusa = scramble(Medusa.from_target(model, heads=3, layers=2, tree=CHAIN))
    with torch.no_grad():
        for ours, theirs in zip(hydra.heads, medusa.heads, strict=True):
            ours.first.weight[:, 16:] = 0
            ours.residual.weight.zero_()
            ours.residual.weight[:, :16] = torch.eye(16)
            ours.first.weight[:, :16] = theirs.first.weight
            ours.first.bias.copy_(theirs.first.bias)
            ours.blocks.load_state_dict(theirs.blocks.state_dict())
    tokens = torch.randint(40, (2, 9))
    batch = (Target(model), tokens, states_of(model, tokens), torch.ones_like(tokens, dtype=torch.bool))
    for one, other in zip(hydra.predictions(*batch), medusa.predictions(*batch), strict=True):
        torch.testing.assert_close(one.logits, other.logits)


def test_untrained_head_has_zero_nonlinear_weights_and_the_targets_scores(model):
    hydra = Hydra.from_target(model, heads=2, layers=3, tie_lm_head=False, tree=[(0,)])
    assert all(not head.first.weight.any() and not head.blocks[0].weight.any() for head in hydra.heads)
    assert torch.equal(hydra.scorers[1].weight, model.lm_head.weight)


def test_default_tree_has_the_papers_size(model):
    tree = Hydra.from_target(model).tree
    assert len(tree) == 64 and tree.depth <= 4 and max(map(max, tree.paths)) < 10


def test_best_tree_beats_every_other_of_its_size():
    from itertools import combinations

    accuracy = torch.tensor([[0.5, 0.3], [0.6, 0.1]], dtype=torch.float64)
    paths = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    for nodes in (1, 2, 3, 4):
        closed = [c for c in combinations(paths, nodes) if all(p[:-1] in (*c, ()) for p in c)]
        best = max(TreeShape(c).expected_length(accuracy) for c in closed)
        assert TreeShape.best(accuracy, nodes).expected_length(accuracy) == pytest.approx(best)


def test_loss_terms_equal_their_formulas(model):
    tokens = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(5))
    hidden, mask = states_of(model, tokens), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    size = model.model.embed_tokens.weight.pow(2).mean().sqrt()
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.25, 2.0)):
        drafter = scramble(
            Hydra.from_target(
                model, heads=2, tree=[(0,)], label_weight=weights[0], teacher_weight=weights[1], state_weight=weights[2]
            )
        )
        expected = 0.0
        for head in range(2):
            terms = []
            for row, t in [(r, t) for r in range(2) for t in range(7 - 2 - head) if mask[r, t + 2 + head]]:
                z = [hidden[row, t]] + [
                    model.model.embed_tokens(tokens[row, t + 1 + j]) / size for j in range(head + 1)
                ]
                u = drafter.heads[head](torch.cat(z))
                logits, teacher = model.lm_head(u), model.lm_head(hidden[row, t + 1 + head]).softmax(-1)
                label = torch.nn.functional.cross_entropy(logits, tokens[row, t + 2 + head])
                soft = -(teacher * logits.log_softmax(-1)).sum()
                state = torch.nn.functional.smooth_l1_loss(u, hidden[row, t + 1 + head])
                terms.append(weights[0] * label + weights[1] * soft + weights[2] * state)
            expected += float(torch.stack(terms).mean())
        assert float(drafter.loss(Target(model), tokens, hidden, mask)) == pytest.approx(expected, rel=1e-5)


def test_reduced_vocabulary_stays_lossless_and_is_saved(model, prompt, tmp_path):
    vocabulary = torch.tensor([1, 5, 7, 20, 33])
    drafter = scramble(Hydra.from_target(model, heads=2, tree=TREE[:5], vocabulary=vocabulary))
    plain = generate(model, prompt, max_new_tokens=20, eos_token_id=[]).new_tokens
    assert generate(model, prompt, drafter=drafter, max_new_tokens=20, eos_token_id=[]).new_tokens == plain
    drafter.save_pretrained(tmp_path)
    assert Hydra.from_pretrained(tmp_path, model).vocabulary.tolist() == vocabulary.tolist()


def test_training_on_own_text_raises_accuracy_and_acceptance():
    model = make_model(dtype=torch.float32)
    written = [([1], tokens) for tokens in generate(
        model, torch.arange(40)[:, None], max_new_tokens=40, eos_token_id=[],
        generator=torch.Generator().manual_seed(0)).new_tokens]  # fmt: skip
    data = collect(model, written)
    train, held_out = data.split(8)
    torch.manual_seed(0)
    drafter = Hydra.from_target(model, heads=2, tree=[(0,), (0, 0)])
    before = rank_accuracy(drafter, model, held_out, ranks=3)
    losses = train_drafter(drafter, model, train, epochs=60, learning_rate=1e-2)
    after = fit_tree(drafter, model, held_out, nodes=4, ranks=3)
    # The target's own entropy is the least that the loss can be.
    law = model.lm_head(train.hidden).detach().softmax(-1)
    entropy = -(law * law.log()).sum(-1)
    floor = sum(float(entropy[:, 1 + head : -1][train.mask[:, 2 + head :]].mean()) for head in range(2))
    assert sum(losses[-10:]) / 10 - floor < 0.5 * (sum(losses[:10]) / 10 - floor)
    assert bool((after[:, 0] > before[:, 0]).all())
    assert len(drafter.tree) == 5


def test_greedy_accuracy_counts_what_greedy_decoding_accepts_on_sampled_text():
    model = make_model(dtype=torch.float32)
    sampled = generate(
        model, torch.arange(12)[:, None], max_new_tokens=20, temperature=0.5, eos_token_id=[],
        generator=torch.Generator().manual_seed(0)).new_tokens  # fmt: skip
    data = collect(model, [([1, 2], tokens) for tokens in sampled])
    torch.manual_seed(0)
    drafter = Hydra.from_target(model, heads=3, tree=[(0,)])
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    choice = model.lm_head(data.hidden).argmax(-1)
    hits, seen = torch.zeros(3, 4), torch.zeros(3)
    for depth, prediction in enumerate(drafter.predictions(Target(model), data.tokens, data.hidden, data.mask)):
        for logits, (row, state) in zip(prediction.logits, prediction.positions.tolist(), strict=True):
            drafted = range(state + 1 - depth, state + 1)
            if all(data.tokens[row, place] == choice[row, place - 1] for place in drafted):
                hits[depth] += logits.topk(4).indices == choice[row, state]
                seen[depth] += 1
    assert 0 < seen[2] < seen[1] < seen[0]
    for batch_size in (5, 12):
        found = rank_accuracy(drafter, model, data, ranks=4, batch_size=batch_size, greedy=True)
        assert torch.allclose(found, (hits / seen[:, None]).double(), atol=1e-6)


def test_training_leaves_the_target_alone():
    model = make_model(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    drafter = Hydra.from_target(model, heads=2, tree=[(0,)], prefix_layer=True, label_weight=1.0)
    train_drafter(drafter, model, collect(model, [([1], [2, 3, 4, 5, 6])]))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_collect_gives_the_states_of_each_sequence_alone():
    model = make_model(dtype=torch.float32)
    written = [([1, 2], [3, 4, 5]), ([7], [8, 9])]
    data = collect(model, written, batch_size=2)
    assert data.tokens.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0]]
    assert data.mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    for row, (context, answer) in enumerate(written):
        alone = states_of(model, torch.tensor([[*context, *answer]]))[0]
        torch.testing.assert_close(data.hidden[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_drafting_data_survives_saving(tmp_path):
    data = collect(make_model(dtype=torch.float32), [([1], [2, 3])])
    data.save(tmp_path / "data.safetensors")
    again = DraftingData.load(tmp_path / "data.safetensors")
    assert torch.equal(again.hidden, data.hidden) and torch.equal(again.mask, data.mask)


class Words:
    """A tokenizer with a chat template: <system> question <answer> answer <user> question <answer>."""

    eos_token_id, bos_token_id, chat_template = 0, None, "yes"

    def apply_chat_template(self, messages, **options):
        first, reply, then = (message["content"] for message in messages)
        return f"ab{first}c{reply}d{then}c"

    def encode(self, text, **options):
        return [5 if letter == "\n" else ord(letter) - 96 for letter in text]


def test_text_is_written_through_the_chat_template():
    model = make_model(dtype=torch.float32)
    pairs = self_written(
        model,
        Words(),
        tokens=30,
        answer_tokens=8,
        question_tokens=4,
        batch_size=5,
        temperature=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert sum(len(answer) for _, answer in pairs) >= 30
    for context, answer in pairs:
        assert context[:2] == [1, 2] and context[-1] == 3 and 0 not in context
        alone = generate(model, torch.tensor([context]), max_new_tokens=8, eos_token_id=0).new_tokens[0]
        assert answer == alone


def test_questions_are_asked_behind_examples_that_answers_do_not_see():
    model = make_model(dtype=torch.float32)
    examples = ["ef", "ghi", "jk"]
    pairs = self_written(
        model, Words(), tokens=60, answer_tokens=4, question_tokens=4, question_temperature=0.0, temperature=0.0,
        examples=examples, shown=2, batch_size=30, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    asked = {
        tuple(token for token in generate(model, ids, max_new_tokens=4, eos_token_id=0).new_tokens[0] if token)
        for pair in itertools.permutations(examples, 2)
        for ids in [torch.tensor([[1, 2, *(token for text in pair for token in [*Words().encode(text), 4])]])]
    }
    assert len(asked) > 1
    assert {tuple(context[2:-1]) for context, _ in pairs} == asked
    for context, answer in pairs:
        assert answer == generate(model, torch.tensor([context]), max_new_tokens=4, eos_token_id=0).new_tokens[0]


def test_a_model_without_a_template_writes_on_behind_examples_one_to_a_line():
    model = make_model(dtype=torch.float32)
    tokenizer = Words()
    tokenizer.chat_template = None
    options = {"answer_tokens": 4, "question_tokens": 4, "question_temperature": 0.0, "temperature": 0.0}
    for examples, start in (((), [0]), (["ghi"], [0, 7, 8, 9, 5])):
        pairs = self_written(model, tokenizer, tokens=4, batch_size=2, examples=examples, **options)
        asked = generate(model, torch.tensor([start]), max_new_tokens=4, eos_token_id=0).new_tokens[0]
        assert {tuple(context) for context, _ in pairs} == {(0, *(token for token in asked if token))}


@pytest.mark.parametrize("positions", [1, 5, 70])
def test_soft_cross_entropy_and_its_slope_are_those_of_torch(positions):
    torch.manual_seed(0)
    logits = (4 * torch.randn(positions, 90)).requires_grad_()
    laws, which = torch.randn(6, 90).softmax(-1), torch.randint(0, 6, (positions,))
    ours = soft_cross_entropy(logits, laws, which)
    theirs = F.cross_entropy(logits, laws[which])
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(3 * loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"heads": 0}, "heads must be at least 1"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"label_weight": -1.0, "teacher_weight": 2.0}, "must not be negative"),
        ({"noise": -0.1}, "must not be negative"),
        ({"heads": 1, "tree": [(0,), (0, 0)]}, "2 deep but there are 1 heads"),
        ({"tree": [(0, 0)]}, "its prefix"),
        ({"tree": [(0,), (0,)]}, "distinct"),
        ({"teacher_weight": 0.0}, "label_weight or teacher_weight positive"),
    ],
)
def test_bad_options_are_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        Hydra.from_target(model, **options)


def test_loading_what_is_not_a_drafter_says_so(model, tmp_path):
    with pytest.raises(ValueError, match="holds no saved drafter"):
        Hydra.from_pretrained(tmp_path, model)
    Medusa.from_target(model, heads=1, tree=[(0,)]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("Medusa", "Nothing"))
    with pytest.raises(ValueError, match="holds a Nothing"):
        Drafter.from_pretrained(tmp_path, model)


def test_loading_for_another_model_says_so(model, tmp_path):
    Hydra.from_target(model, heads=1, tree=[(0,)]).save_pretrained(tmp_path)
    config = LlamaConfig(hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    with pytest.raises(ValueError, match="made for another model"):
        Hydra.from_pretrained(tmp_path, LlamaForCausalLM(config))


def test_diverging_training_stops_with_a_reason():
    model = make_model(dtype=torch.float32)
    data = collect(model, [([1], [2, 3, 4, 5])])
    drafter = Hydra.from_target(model, heads=1, tree=[(0,)])
    drafter.heads[0].first.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="lower learning_rate"):
        train_drafter(drafter, model, data)
