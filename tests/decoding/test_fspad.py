"""FSPAD: what arXiv 2408.15562 says must be true of its draft layer, and of EAGLE-2's tree."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperworks.decoding import Drafter, DraftingData, Sampling, Target, collect, generate, rank_accuracy, train_drafter
from paperworks.decoding.draft_layer import DraftLayer
from paperworks.decoding.drafter import Committed
from paperworks.decoding.fspad import FSPAD, FeatureSampling
from tests.decoding.conftest import FAMILIES, distance, enumerate_law, make_model, model_law, output, scramble

SMALL = {"nodes": 8, "depth": 3, "top_k": 3, "noise": 0.0}
EAGLE = {"feature_sampling": False, "partial_alignment": False}
PARTS = [{}, {"feature_sampling": False}, {"partial_alignment": False}, EAGLE]


def states_of(model, tokens):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states[-1]


def sequence(length, rows=1, seed=3):
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(seed))


def alone(drafter, model, features, tokens):
    """The draft layer's outputs by the paper's formulas, position by position, over features (n, d) and tokens (n,)."""
    e = model.get_input_embeddings()(tokens) * drafter.embedding_scale
    s = features
    if drafter.sampling is not None:
        fs = drafter.sampling
        s = (F.silu(e @ fs.select.weight.T) * (features @ fs.up.weight.T)) @ fs.down.weight.T + features
    z = torch.cat([e, s], dim=-1) @ drafter.join.weight.T + drafter.join.bias
    return drafter.layer.model(inputs_embeds=z[None]).last_hidden_state[0]


@torch.no_grad()
def path_law(drafter, model, prompt, root, path):
    """Log-law of the draft behind the nodes of `path`, by plain passes over the whole text and no cache."""
    features = states_of(model, prompt[None])[0]
    tokens = torch.cat([prompt[1:], root[None], torch.tensor(path, dtype=torch.long)])
    for _ in path:
        o = alone(drafter, model, features, tokens[: len(features)])
        fed = o[-1] if drafter.align is None else drafter.align.weight @ o[-1]
        features = torch.cat([features, fed[None]])
    return Target(model).logits(alone(drafter, model, features, tokens)[-1]).log_softmax(-1)


# 1. Losslessness


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_output_is_the_targets_for_random_drafter_weights(family, parts, prompt):
    model = make_model(family)
    drafter = scramble(FSPAD.from_target(model, **SMALL, **parts))
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    result = generate(model, prompt, drafter=drafter, max_new_tokens=24, eos_token_id=[])
    assert result.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("parts", [{}, EAGLE])
def test_sampling_law_equals_the_targets_by_enumeration(parts, monkeypatch):
    model, prompt = make_model(vocab=3), torch.tensor([[0, 2]])
    drafter = scramble(FSPAD.from_target(model, nodes=4, depth=2, top_k=2, **parts))
    law = enumerate_law(lambda: output(model, prompt, drafter=drafter, max_new_tokens=3, temperature=1.0), monkeypatch)
    assert distance(law, model_law(model, prompt, 3)) < 1e-12


# 2. Reduction


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_switched_off_parts_and_neutral_parts_give_eagle_2s_logits_exactly(model, noise):
    eagle = scramble(FSPAD.from_target(model, **{**SMALL, "noise": noise}, **EAGLE))
    full = scramble(FSPAD.from_target(model, **{**SMALL, "noise": noise}))
    nn.init.zeros_(full.sampling.down.weight)
    nn.init.eye_(full.align.weight)
    full.join.load_state_dict(eagle.join.state_dict())
    full.layer.load_state_dict(eagle.layer.state_dict())
    tokens = sequence(9, rows=2)
    batch = (Target(model), tokens, states_of(model, tokens), torch.ones_like(tokens, dtype=torch.bool))
    laws = []
    for drafter in (eagle, full):
        torch.manual_seed(0)
        drafter.train(noise > 0)
        laws.append(next(drafter.predictions(*batch)))
    assert torch.equal(laws[0].logits, laws[1].logits) and torch.equal(laws[0].state, laws[1].state)
    # EAGLE's own formulas, without this module: o = layer(Linear([e ; f])), logits = W o, next feature = o.
    if not noise:
        e = model.get_input_embeddings()(tokens[:, 1:-1]) * eagle.embedding_scale
        z = eagle.join(torch.cat([e, batch[2][:, :-2]], dim=-1))
        by_hand = model.lm_head(eagle.layer.model(inputs_embeds=z).last_hidden_state)
        torch.testing.assert_close(laws[0].logits, by_hand.flatten(0, 1), atol=1e-10, rtol=0)


def test_an_untrained_fspad_is_eagle_2(model):
    torch.manual_seed(0)
    full = FSPAD.from_target(model, **SMALL)
    assert not full.sampling.down.weight.any() and torch.equal(full.align.weight, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_embeddings_are_read_at_unit_size(family):
    model = make_model(family)
    embedded = model.get_input_embeddings()(torch.arange(40)) * FSPAD.from_target(model, **SMALL).embedding_scale
    assert float(embedded.detach().square().mean()) == pytest.approx(1, rel=1e-5)


def test_eagles_layer_has_no_norm_before_its_attention(model):
    drafter = FSPAD.from_target(model, **SMALL, layers=2)
    first, second = drafter.layer.model.layers
    assert isinstance(first.input_layernorm, nn.Identity) and not isinstance(second.input_layernorm, nn.Identity)


# 3. Feature sampling


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
@pytest.mark.parametrize("residual", [True, False])
def test_feature_sampling_is_token_conditional(gate, residual):
    block = FeatureSampling(6, 64, gate, residual)
    nn.init.normal_(block.down.weight)
    f, one, other = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(block(f, one), block(f, other))


@pytest.mark.parametrize("residual", [True, False])
def test_with_zero_selection_and_a_sigmoid_gate_the_sample_is_one_linear_map_of_the_feature(residual):
    block = FeatureSampling(6, 64, "sigmoid", residual).double()
    nn.init.normal_(block.down.weight)
    nn.init.zeros_(block.select.weight)
    f, e = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = 0.5 * block.down.weight @ block.up.weight + (torch.eye(6) if residual else 0)
    torch.testing.assert_close(block(f, e), f @ matrix.T)


def test_expanded_width_is_rounded_to_a_multiple_of_64(model):
    widths = [FSPAD.from_target(model, **SMALL, fs_expand=x).sampling.up.out_features for x in (4.0, 1.0, 9.0)]
    assert widths == [64, 64, 128]


# 4. Gradient separation


def losses(drafter, model, tokens):
    batch = (Target(model), tokens, states_of(model, tokens), torch.ones_like(tokens, dtype=torch.bool))
    for weights in ((0.0, 1.0), (1.0, 0.0)):
        drafter.options["state_weight"], drafter.options["teacher_weight"] = weights
        drafter.zero_grad(set_to_none=True)
        drafter.loss(*batch).backward()
        yield


def test_gradients_are_separate_under_partial_alignment(model):
    drafter = scramble(FSPAD.from_target(model, **SMALL))
    at = losses(drafter, model, sequence(9))
    next(at)
    assert drafter.align.weight.grad is None  # the logit loss does not know the feature's projection
    assert drafter.join.weight.grad.abs().max() > 0
    next(at)
    assert drafter.align.weight.grad.abs().max() > 0


def test_without_partial_alignment_both_losses_pull_the_same_tensor(model):
    drafter = scramble(FSPAD.from_target(model, **SMALL, partial_alignment=False))
    tokens = sequence(9)
    made = []

    def keep(module, args, out):
        out.retain_grad()
        made.append(out)

    hook = drafter.layer.register_forward_hook(keep)
    for _ in losses(drafter, model, tokens):
        pass
    hook.remove()
    prediction = next(
        drafter.predictions(Target(model), tokens, states_of(model, tokens), torch.ones_like(tokens, dtype=torch.bool))
    )
    assert all(out.grad.abs().max() > 0 for out in made)
    torch.testing.assert_close(prediction.logits, model.lm_head(prediction.state), atol=1e-12, rtol=0)


def test_the_loss_equals_its_formula(model):
    drafter = scramble(FSPAD.from_target(model, **SMALL, state_weight=0.7, teacher_weight=0.3))
    tokens = sequence(8, rows=2)
    hidden, mask = states_of(model, tokens), torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    distances, entropies = [], []
    for row in range(2):
        o = alone(drafter, model, hidden[row, :-1], tokens[row, 1:])
        for t in (t for t in range(6) if mask[row, t + 2]):
            feature = drafter.align.weight @ o[t]
            distances.append(F.smooth_l1_loss(feature, hidden[row, t + 1]))
            law = model.lm_head(hidden[row, t + 1]).softmax(-1)
            entropies.append(-(law * model.lm_head(o[t]).log_softmax(-1)).sum())
    expected = 0.7 * torch.stack(distances).mean() + 0.3 * torch.stack(entropies).mean()
    assert drafter.loss(Target(model), tokens, hidden, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_noise_has_eagles_range(model):
    drafter = scramble(FSPAD.from_target(model, **{**SMALL, "noise": 0.1}, **EAGLE)).train()
    tokens = sequence(30, rows=8)
    hidden, seen = states_of(model, tokens), []
    hook = drafter.join.register_forward_hook(lambda module, args, out: seen.append(args[0][..., 16:]))
    for training in (True, False):
        drafter.train(training)
        list(drafter.predictions(Target(model), tokens, hidden, torch.ones_like(tokens, dtype=torch.bool)))
    hook.remove()
    noise, none = (features - hidden[:, :-2] for features in seen)
    bound = 0.1 * 512 / 30
    assert 0.99 * bound < noise.abs().max() <= bound and abs(float(noise.mean())) < 0.05 * bound
    assert not none.any()


# 5. Feature regression and sharp logits at once


def test_partial_alignment_reaches_features_and_hard_labels_which_one_vector_cannot():
    model = make_model(dtype=torch.float32)
    tokens = sequence(34)
    with torch.no_grad():
        features = states_of(model, tokens)
    target = Target(model)
    hard = F.one_hot(tokens[0, 2:], 40).float()
    reached = {}
    for aligned in (True, False):
        torch.manual_seed(0)
        drafter = FSPAD.from_target(model, **SMALL, layers=2, partial_alignment=aligned)
        optimiser = torch.optim.Adam(drafter.parameters(), 5e-3)
        for _ in range(300):
            prediction = next(drafter.predictions(target, tokens, features, torch.ones_like(tokens, dtype=torch.bool)))
            labels = -(hard * prediction.logits.log_softmax(-1)).sum(-1).mean()
            distance_ = F.smooth_l1_loss(prediction.state, features[0, 1:-1])
            optimiser.zero_grad()
            (labels + distance_).backward()
            optimiser.step()
        reached[aligned] = (labels.item(), distance_.item())
    print(f"label loss and feature loss: apart {reached[True]}, tied {reached[False]}")
    assert reached[True][0] < reached[False][0] and reached[True][1] < reached[False][1]


# 6. The dynamic tree


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nodes", [1, 5, 12, 39, 60])
def test_kept_nodes_are_the_most_confident_of_all_by_brute_force(family, nodes):
    model = make_model(family, vocab=3)
    drafter = scramble(FSPAD.from_target(model, nodes=nodes, depth=3, top_k=9))
    prompt, root = torch.tensor([0, 2, 1, 1]), torch.tensor(2)
    target = Target(model)
    with torch.no_grad():
        state = drafter.start(target, 1, Sampling())
        tree = drafter.propose(state, Committed(prompt[None], states_of(model, prompt[None]), [4]), root[None])
    confidence = {(): 0.0}
    for depth in range(3):
        for path in product(range(3), repeat=depth):
            law = path_law(drafter, model, prompt, root, path)
            confidence |= {(*path, token): confidence[path] + p for token, p in enumerate(law.tolist())}
    best = sorted((path for path in confidence if path), key=confidence.__getitem__, reverse=True)[:nodes]
    kept = [tuple(tree.tokens[0, tree.ancestors[0, node]].tolist()[1:]) for node in range(1, tree.tokens.shape[1])]
    assert sorted(kept) == sorted(best) and len(set(kept)) == len(kept) == min(nodes, 39)
    assert tree.tokens[0, 0] == 2 and tree.parents[0, 0] == -1
    assert bool((tree.parents[0, 1:] >= 0).all()) and bool((tree.parents[0] < torch.arange(len(kept) + 1)).all())


def test_only_the_top_k_of_a_level_are_expanded(model):
    drafter = scramble(FSPAD.from_target(model, nodes=60, depth=3, top_k=2))
    tokens = sequence(6)
    with torch.no_grad():
        state = drafter.start(Target(model), 1, Sampling())
        tree = drafter.propose(state, Committed(tokens, states_of(model, tokens), [6]), torch.tensor([4]))
    per_level = [int((tree.depths == depth).sum()) for depth in range(4)]
    assert per_level == [1, 2, 4, 4]
    assert all(len(tree.parents[0, tree.depths[0] == depth].unique()) <= 2 for depth in (1, 2, 3))


def test_equal_confidences_keep_parents(model):
    # A law with all its mass on one token: products of exactly 1 along that path.
    drafter = scramble(FSPAD.from_target(model, nodes=2, depth=4, top_k=3))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        state = drafter.start(Target(model), 1, Sampling())
        tokens = sequence(6)
        tree = drafter.propose(state, Committed(tokens, states_of(model, tokens), [6]), torch.tensor([4]))
    assert tree.parents.tolist() == [[-1, 0, 1]]


# 7. Cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [*PARTS, {"layers": 2}])
def test_drafting_with_the_cache_equals_drafting_without(family, parts):
    """Pieces of text as generation commits them, two rows of different lengths; every node's law by plain passes."""
    model = make_model(family)
    drafter = scramble(FSPAD.from_target(model, nodes=10, depth=3, top_k=3, **parts))
    tokens = sequence(10, rows=2)
    hidden, target = states_of(model, tokens), Target(model)
    pieces = [(5, 2), (1, 3), (2, 0), (1, 2)]
    done = [0, 0]
    with torch.no_grad():
        state = drafter.start(target, 2, Sampling())
        for piece in pieces:
            width = max(piece)
            place = [torch.arange(first, first + width).clamp(max=9) for first in done]
            committed = Committed(
                torch.stack([tokens[row, place[row]] for row in range(2)]),
                torch.stack([hidden[row, place[row]] for row in range(2)]),
                list(piece),
            )
            done = [first + count for first, count in zip(done, piece, strict=True)]
            tree = drafter.propose(state, committed, torch.stack([tokens[row, done[row]] for row in range(2)]))
            assert state.cache.lengths == done
    for row in range(2):
        prompt, root = tokens[row, : done[row]], tokens[row, done[row]]
        for node in range(11):
            path = tree.tokens[row, tree.ancestors[row, node]].tolist()[1:]
            children = tree.tokens[row, tree.parents[row] == node].tolist()
            law = path_law(drafter, model, prompt, root, path)
            assert sorted(children) == sorted(law.topk(len(children)).indices.tolist())


def test_cache_after_a_rejected_draft_equals_a_fresh_one(model):
    drafter = scramble(FSPAD.from_target(model, **SMALL))
    tokens = sequence(12)
    hidden, target = states_of(model, tokens), Target(model)
    with torch.no_grad():
        one, other = drafter.start(target, 1, Sampling()), drafter.start(target, 1, Sampling())
        # The root drafted behind the first piece is the text's own, but its whole tree is thrown away.
        drafter.propose(one, Committed(tokens[:, :6], hidden[:, :6], [6]), tokens[:, 6])
        drafter.propose(one, Committed(tokens[:, 6:9], hidden[:, 6:9], [3]), tokens[:, 9])
        drafter.propose(other, Committed(tokens[:, :9], hidden[:, :9], [9]), tokens[:, 9])
    assert one.cache.lengths == other.cache.lengths == [9]
    for ours, fresh in zip(one.cache.layers, other.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, :9], fresh.keys[:, :, :9], atol=1e-10, rtol=0)
        torch.testing.assert_close(ours.values[:, :, :9], fresh.values[:, :, :9], atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", PARTS)
def test_first_step_in_training_equals_inference(family, parts):
    model = make_model(family)
    drafter = scramble(FSPAD.from_target(model, nodes=2, depth=1, top_k=2, **parts))
    tokens, seen = sequence(10), []
    hidden, target = states_of(model, tokens), Target(model)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    prediction = next(drafter.predictions(target, tokens, hidden, mask))
    assert torch.equal(prediction.labels, tokens[0, 2:])
    assert prediction.positions.tolist() == [[0, t + 1] for t in range(8)]
    hook = drafter.layer.model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    with torch.no_grad():
        state = drafter.start(target, 1, Sampling())
        for t in range(8):
            tree = drafter.propose(state, Committed(tokens[:, t : t + 1], hidden[:, t : t + 1], [1]), tokens[:, t + 1])
            torch.testing.assert_close(target.logits(seen[-1])[0, 0], prediction.logits[t], atol=1e-9, rtol=0)
            assert tree.tokens[0, 1:].tolist() == prediction.logits[t].topk(2).indices.tolist()
    hook.remove()


# Training, saving, bad input


def test_a_feature_is_paired_with_the_token_after_it(model):
    """Changing x_{t+1} changes what is said of x_{t+2}; changing x_{t+2} does not."""
    drafter = scramble(FSPAD.from_target(model, **SMALL))
    tokens = sequence(10)
    hidden, mask = states_of(model, tokens), torch.ones_like(tokens, dtype=torch.bool)

    def law(place):
        changed = tokens.clone()
        if place is not None:
            changed[:, place] = (changed[:, place] + 1) % 40
        return next(drafter.predictions(Target(model), changed, hidden, mask)).logits[4]

    assert torch.equal(law(None), law(6)) and torch.equal(law(None), law(7))
    assert not torch.allclose(law(None), law(5))


def test_training_on_own_text_makes_drafts_better_and_longer():
    model = make_model(dtype=torch.float32)
    starts = torch.arange(40)[:, None]
    written = generate(model, starts, max_new_tokens=30, eos_token_id=[]).new_tokens
    data = collect(model, [([start], tokens) for start, tokens in enumerate(written)])
    torch.manual_seed(0)
    drafter = FSPAD.from_target(model, nodes=9, depth=3, top_k=3, noise=0.0, teacher_weight=1.0).eval()

    def measured():
        accuracy = rank_accuracy(drafter, model, data, ranks=1)[0, 0]
        drafts = generate(model, starts[:8], drafter=drafter, max_new_tokens=25, eos_token_id=[]).statistics
        return float(accuracy), drafts.accepted_per_call

    before = measured()
    train_drafter(drafter, model, data, epochs=20, learning_rate=1e-2, generator=torch.Generator().manual_seed(0))
    after = measured()
    print(f"accuracy and tokens a call: {before} -> {after}")
    assert after[0] > 1.3 * before[0] and after[1] > 1.1 * before[1]


def test_training_leaves_the_target_alone():
    model = make_model(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = DraftingData(*(x for x in (sequence(9), states_of(model, sequence(9)), torch.ones(1, 9, dtype=torch.bool))))
    train_drafter(FSPAD.from_target(model, **SMALL), model, data)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_text_too_short_to_label_costs_nothing(model):
    drafter = scramble(FSPAD.from_target(model, **SMALL))
    tokens = sequence(2)
    assert drafter.loss(Target(model), tokens, states_of(model, tokens), torch.ones(1, 2, dtype=torch.bool)) == 0


def test_reduced_vocabulary_drafts_its_tokens_only_and_stays_lossless(model, prompt, tmp_path):
    vocabulary = torch.tensor([1, 5, 7, 20, 33])
    drafter = scramble(FSPAD.from_target(model, **SMALL, vocabulary=vocabulary))
    plain = generate(model, prompt, max_new_tokens=20, eos_token_id=[]).new_tokens
    assert generate(model, prompt, drafter=drafter, max_new_tokens=20, eos_token_id=[]).new_tokens == plain
    with torch.no_grad():
        state = drafter.start(Target(model), 1, Sampling())
        tree = drafter.propose(state, Committed(prompt, states_of(model, prompt), [5]), torch.tensor([4]))
    assert set(tree.tokens[0, 1:].tolist()) <= set(vocabulary.tolist())
    drafter.save_pretrained(tmp_path)
    assert FSPAD.from_pretrained(tmp_path, model).vocabulary.tolist() == vocabulary.tolist()


@pytest.mark.parametrize("parts", [*PARTS, {"layers": 2, "fs_gate": "sigmoid", "fs_residual": False, "fs_expand": 8.0}])
def test_saved_and_loaded_drafter_drafts_the_same(parts, model, prompt, tmp_path):
    drafter = scramble(FSPAD.from_target(model, **SMALL, **parts))
    drafter.nodes = 7
    drafter.save_pretrained(tmp_path / "saved")
    again = Drafter.from_pretrained(tmp_path / "saved", model)
    assert type(again) is FSPAD and again.config == drafter.config and again.nodes == 7
    one, other = (generate(model, prompt, drafter=d, max_new_tokens=16, eos_token_id=[]) for d in (drafter, again))
    assert one.statistics == pytest.approx(other.statistics) or one.statistics.emitted == other.statistics.emitted


def test_paper_defaults(model):
    config = FSPAD.from_target(model).config
    wanted = {"nodes": 60, "depth": 6, "top_k": 10, "fs_expand": 4.0, "state_weight": 1.0, "teacher_weight": 0.1}
    assert wanted.items() <= config.items() and config["feature_sampling"] and config["partial_alignment"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"nodes": -1}, "nodes must be at least 0, got -1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"fs_gate": "tanh"}, "silu, sigmoid, got 'tanh'"),
        ({"fs_expand": 0.0}, "fs_expand must be positive"),
        ({"state_weight": 0.0, "teacher_weight": 0.0}, "one of the weights must be positive"),
        ({"noise": -0.1}, "must not be negative"),
    ],
)
def test_bad_options_are_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        FSPAD.from_target(model, **options)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "llama"])
def test_a_draft_layer_reads_the_whole_text_behind_a_targets_window(family):
    model = make_model(family, dtype=torch.float32)
    layer = DraftLayer(Target(model))
    states = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = states.clone()
    changed[0, 0] += 1
    with torch.no_grad():
        one, other = (layer(part)[0, -1] for part in (states, changed))
    assert float((one - other).abs().max()) > 1e-4
