"""The Stop&Exit Controller: what arXiv 2401.09964 says must be true of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, CodeGenConfig, GPT2Config

from paperworks.decoding import Target, TreeCache
from paperworks.decoding.dynamic_inference import DynamicInference, Reading, choose
from paperworks.decoding.layer_exit import Action, ExitCache, layer_outputs, read_token
from tests.decoding.conftest import FAMILIES

OFF = {"exit_threshold": 100.0, "stop_threshold": 100.0}
PROMPT = torch.tensor([[3, 1, 2, 0, 2]])


SMALL = dict(n_embd=16, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None, pad_token_id=None)
# The paper's own two families beside those of the room.
ALL = {
    **FAMILIES,
    "gpt2": lambda vocab: GPT2Config(vocab_size=vocab, n_inner=32, **SMALL),
    "codegen": lambda vocab: CodeGenConfig(vocab_size=vocab, n_inner=32, rotary_dim=2, n_ctx=64, **SMALL),
}


def deep_model(family="llama", layers=4, dtype=torch.float64, vocab=40, implementation="sdpa"):
    torch.manual_seed(7)
    config = ALL[family](vocab)
    config.num_hidden_layers = layers
    implementation = "eager" if family == "codegen" else implementation
    if family in ("qwen2", "qwen3", "gemma3"):
        kinds = ["sliding_attention", "full_attention"] if family == "gemma3" else ["full_attention"]
        config.layer_types = (kinds * layers)[:layers]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def scrambled(model, **options):
    torch.manual_seed(11)
    dynamic = DynamicInference(model, **options)
    for parameter in dynamic.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    # States are tens long; actions must be neither all alike nor all sure.
    dynamic.controller.weight.data.mul_(0.1)
    return dynamic


def text(count=6, length=14, vocab=40, seed=0):
    return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(seed))


def at(layer):
    """Leave at that layer always."""
    return lambda number, hidden: Action.EXIT if number == layer else Action.CONTINUE


def raw_outputs(model, tokens):
    """Output of each layer, through hooks on the model's own pass over the whole text."""
    seen = []
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    keep = lambda m, a, output: seen.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL)
def test_with_exit_and_stop_off_ids_are_the_models_greedy_output(family, implementation):
    model = deep_model(family, implementation=implementation)
    result = scrambled(model).generate(PROMPT, max_new_tokens=20, eos_token_id=[], **OFF)
    assert torch.equal(result.sequences, model.generate(PROMPT, max_new_tokens=20, do_sample=False))
    assert result.exit_layers == [4] * 20 and not result.stopped


def test_the_first_token_uses_all_layers():
    model = deep_model()
    plain = model.generate(PROMPT, max_new_tokens=1, do_sample=False)[0, -1]
    for action in (Action.EXIT, Action.STOP):
        result = scrambled(model).generate(PROMPT, policy=lambda layer, hidden: action, eos_token_id=[])
        assert result.new_tokens[0][0] == plain and result.exit_layers[0] == 4


def test_labels_by_brute_force():
    """Three layers, every pattern of which of them are right, against the table written by hand."""
    stop, leave, go = Action.STOP, Action.EXIT, Action.CONTINUE
    table = {
        (0, 0, 0): (0, [stop, stop, stop]),
        (0, 0, 1): (3, [go, go, leave]),
        (0, 1, 0): (2, [go, leave, leave]),
        (0, 1, 1): (2, [go, leave, leave]),
        (1, 0, 0): (1, [leave, leave, leave]),
        (1, 0, 1): (1, [leave, leave, leave]),
        (1, 1, 0): (1, [leave, leave, leave]),
        (1, 1, 1): (1, [leave, leave, leave]),
    }
    right = torch.tensor(list(table)).T[:, None]
    tokens = torch.arange(8)[None]
    reading = Reading(
        torch.tensor([1, 2, 3]), tokens, torch.where(right == 1, tokens, 99), torch.empty(0), torch.empty(0)
    )
    assert reading.first_correct[0].tolist() == [first for first, _ in table.values()]
    assert reading.labels[:, 0].T.tolist() == [labels for _, labels in table.values()]


@pytest.mark.parametrize("every", [1, 2])
def test_labels_on_a_model_agree_with_heads_applied_one_by_one(every):
    model = deep_model()
    dynamic, blocks = scrambled(model, every=every), text()
    reading = dynamic.read(blocks, batch_size=4)
    outputs = raw_outputs(model, blocks)
    assert reading.layers.tolist() == ([1, 2, 3, 4] if every == 1 else [1, 3, 4])
    seen = set()
    for row in range(6):
        for t in range(13):
            first = 0
            for point, layer in enumerate(dynamic.layers, 1):
                state = outputs[layer - 1][row, t]
                best = (
                    model.model.norm(state) @ model.lm_head.weight.T if layer == 4 else dynamic.heads[point - 1](state)
                ).argmax()
                assert best == reading.predictions[point - 1, row, t]
                if not first and best == blocks[row, t + 1]:
                    first = point
            expected = [0 if not first else 1 if first <= k else 2 for k in range(1, len(dynamic.layers) + 1)]
            assert reading.labels[:, row, t].tolist() == expected
            seen.add(first)
    assert len(seen) > 2


@pytest.mark.parametrize("family", ALL)
def test_cache_after_an_exit(family):
    """Up to the exit as in a full pass; above, each layer's own norm, projections and rotary position of that state."""
    model, length = deep_model(family), 9  # the window of Gemma3's first layer holds 6
    tokens, target = text(1, length + 1, seed=3), Target(model)
    outputs, full = raw_outputs(model, tokens), TreeCache(target.config, 1)
    with torch.no_grad():
        target.prefill([tokens[0]], full)
        for exit_layer in (1, 2, 4):
            cache = ExitCache(target.config, 1)
            target.prefill([tokens[0, :length]], cache)
            out = read_token(target, tokens[:, length:], cache, at(exit_layer))
            assert out.layer == exit_layer and out.action == (Action.EXIT if exit_layer < 4 else Action.CONTINUE)
            hidden = outputs[exit_layer - 1][0, -1]
            if exit_layer < 4:
                torch.testing.assert_close(out.hidden[0, 0], hidden, atol=1e-6, rtol=1e-6)
            cache.commit(torch.zeros(1, 1, dtype=torch.long), [1])
            assert cache.lengths == [length + 1]
            for number, (stored, own) in enumerate(zip(cache.layers, full.layers, strict=True), 1):
                keys, values = stored.keys[0, :, length], stored.values[0, :, length]
                if number <= exit_layer:
                    torch.testing.assert_close(
                        stored.keys[:, :, : length + 1], own.keys[:, :, : length + 1], atol=1e-6, rtol=0
                    )
                    torch.testing.assert_close(values, own.values[0, :, length], atol=1e-6, rtol=0)
                else:
                    expected = by_hand(model, family, number, hidden, length)
                    torch.testing.assert_close(keys, expected[0], atol=1e-6, rtol=1e-6)
                    torch.testing.assert_close(values, expected[1], atol=1e-6, rtol=1e-6)
                    # The first layer left out reads the very state that a full pass would give it.
                    assert torch.allclose(keys, own.keys[0, :, length]) == (number == exit_layer + 1)


def by_hand(model, family, number, state, position):
    """W_K LN(h), turned by position * base^(-2i / dim) in the family's pairs, and W_V LN(h)."""
    if family in ("gpt2", "codegen"):
        layer = model.transformer.h[number - 1]
        x = (state - state.mean()) / (state.var(unbiased=False) + 1e-5).sqrt() * layer.ln_1.weight + layer.ln_1.bias
        if family == "gpt2":
            _, keys, values = (layer.attn.c_attn.weight.T @ x + layer.attn.c_attn.bias).view(3, 4, 4)
            return keys, values
        # Four slices for four machines, each with its queries, values and keys; one head a slice here.
        _, values, keys = (layer.attn.qkv_proj.weight @ x).view(4, 3, 4).unbind(1)
        angle = torch.tensor(float(position), dtype=torch.float64)
        one, other = keys[:, :1], keys[:, 1:2]
        return torch.cat(
            [one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin(), keys[:, 2:]], dim=1
        ), values
    layer = model.model.layers[number - 1]
    attention = layer.self_attn
    offset = 1.0 if family == "gemma3" else 0.0

    def norm(module, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (module.weight + offset)

    x = norm(layer.input_layernorm, state)
    keys = (attention.k_proj.weight @ x + (0 if attention.k_proj.bias is None else attention.k_proj.bias)).view(2, 8)
    values = (attention.v_proj.weight @ x + (0 if attention.v_proj.bias is None else attention.v_proj.bias)).view(2, 8)
    if family in ("qwen3", "gemma3"):
        keys = norm(attention.k_norm, keys)
    kind = model.config.layer_types[number - 1] if family == "gemma3" else None
    parameters = model.config.rope_parameters
    base = (parameters[kind] if kind else parameters)["rope_theta"]
    angle = position * base ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    one, other = keys[:, :4], keys[:, 4:]
    turned = torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], dim=1)
    return turned, values


@pytest.mark.parametrize("family", ALL)
def test_leaving_at_the_last_layer_always_is_plain_decoding(family):
    model = deep_model(family)
    result = scrambled(model).generate(PROMPT, max_new_tokens=20, eos_token_id=[], policy=at(4))
    assert torch.equal(result.sequences, model.generate(PROMPT, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("head", ["linear", "tuned"])
@pytest.mark.parametrize("family", ALL)
def test_leaving_at_layer_one_always_is_a_model_of_one_layer(family, head):
    model = deep_model(family)
    dynamic = scrambled(model, head=head)
    result = dynamic.generate(PROMPT, max_new_tokens=20, eos_token_id=[], policy=at(1))
    assert result.exit_layers == [4] + [1] * 19
    short = copy.deepcopy(model.base_model)
    layers, norm = ("h", "ln_f") if hasattr(short, "h") else ("layers", "norm")
    setattr(short, layers, getattr(short, layers)[:1])
    setattr(short, norm, torch.nn.Identity())
    short.config.num_hidden_layers = 1
    ids = torch.cat([PROMPT, torch.tensor([result.new_tokens[0][:1]])], dim=1)
    for _ in range(19):
        with torch.no_grad():
            state = dynamic.heads[0](short(ids, use_cache=False).last_hidden_state[:, -1])
            best = (model.lm_head(state) if head == "tuned" else state).argmax(-1)
        ids = torch.cat([ids, best[None]], dim=1)
    assert torch.equal(result.sequences, ids)
    assert len(set(result.new_tokens[0])) > 1


def test_propagated_states_are_what_later_tokens_attend_to():
    """The whole free run with mixed exits, against a recomputation of every layer without any cache."""
    model = deep_model()
    dynamic = scrambled(model)
    plan = [4, 1, 3, 2, 4, 1, 4, 2, 3, 4, 4]
    steps = iter(plan[1:])
    now = [next(steps)]

    def policy(layer, hidden):
        if layer < now[0]:
            return Action.CONTINUE
        now[0] = next(steps, 4)
        return Action.EXIT

    result = dynamic.generate(PROMPT, max_new_tokens=11, eos_token_id=[], policy=policy)
    assert result.exit_layers == plan
    # Row t leaves at depth[t]: from there on its state stays, and the layers above read it as their input.
    depth = torch.tensor([4] * PROMPT.shape[1] + plan[1:])
    ids = result.sequences[:, :-1]
    with torch.no_grad():
        state = model.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(state, positions)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
        for number, layer in enumerate(model.model.layers, 1):
            new = layer(state, attention_mask=mask, position_embeddings=rotary)
            state = torch.where((depth >= number)[None, :, None], new, state)
        for row in range(PROMPT.shape[1] - 1, ids.shape[1]):
            last = depth[row] == 4
            scores = (
                model.lm_head(model.model.norm(state[0, row])) if last else dynamic.heads[depth[row] - 1](state[0, row])
            )
            assert scores.argmax() == result.sequences[0, row + 1]


def test_an_oracle_controller_reaches_the_share_that_any_layer_gets_right():
    model = deep_model(vocab=8)
    reading = scrambled(model).read(text(30, 20, vocab=8))
    oracle = replace(reading, probabilities=torch.nn.functional.one_hot(reading.labels, 3).double())
    given, tokens = oracle.decide(0.5, 0.5)
    right, layers, reached = 0, [], 0
    for row in range(30):
        for t in range(19):
            hits = [k + 1 for k in range(4) if reading.predictions[k, row, t] == reading.tokens[row, t]]
            reached += bool(hits)
            layers += hits[:1]
            right += tokens[row, t] == reading.tokens[row, t]
    assert right == reached and right >= (reading.predictions[-1] == reading.tokens).sum()
    kept = tokens >= 0
    assert given[kept].double().mean() == pytest.approx(sum(layers) / len(layers))
    assert bool((given[~kept] == 1).all()) and 0 < int(kept.sum()) < kept.numel()


THRESHOLDS = [0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]


def test_raising_exit_threshold_never_lowers_an_exit_layer():
    reading = scrambled(deep_model(layers=6)).read(text(20, 20))
    for stop in (0.5, 0.8, 100):
        layers = [reading.decide(threshold, stop)[0] for threshold in THRESHOLDS]
        assert all(bool((above >= below).all()) for below, above in pairwise(layers))
        assert int(layers[0].sum()) < int(layers[-1].sum())


def test_raising_stop_threshold_never_raises_the_number_of_stops():
    reading = scrambled(deep_model(layers=6)).read(text(20, 20))
    for leave in (0.5, 0.8, 100):
        stops = [reading.decide(leave, threshold)[1] < 0 for threshold in THRESHOLDS]
        assert all(bool((below | ~above).all()) for below, above in pairwise(stops))
        assert int(stops[0].sum()) > int(stops[-1].sum()) == 0


def test_a_stopped_completion_is_a_strict_prefix():
    dynamic, lengths = scrambled(deep_model(layers=6)), set()
    for prompt in text(12, 5, seed=5):
        whole = dynamic.generate(prompt, max_new_tokens=12, eos_token_id=[], **OFF).new_tokens[0]
        result = dynamic.generate(prompt, max_new_tokens=12, eos_token_id=[], exit_threshold=100, stop_threshold=0.5)
        kept = result.new_tokens[0]
        assert kept == whole[: len(kept)] and result.stopped == (len(kept) < 12)
        assert result.exit_layers == [6] * len(kept) and (result.stopped_at in range(1, 7)) == result.stopped
        lengths.add(len(kept))
    assert len(lengths) > 2


def test_decisions_while_generating_are_those_of_teacher_forcing_up_to_the_first_exit():
    dynamic, compared = scrambled(deep_model(layers=6)), 0
    for prompt in text(12, 5, seed=6):
        result = dynamic.generate(prompt, max_new_tokens=8, eos_token_id=[], exit_threshold=0.6, stop_threshold=0.6)
        ids = torch.cat([result.sequences, torch.zeros(1, 1, dtype=torch.long)], 1)
        layers, tokens = dynamic.read(ids).decide(0.6, 0.6)
        for step, place in enumerate(range(5, result.sequences.shape[1]), 1):
            compared += 1
            if step == len(result.exit_layers):
                if result.stopped:
                    assert tokens[0, place] == -1 and layers[0, place] == result.stopped_at
                break
            assert layers[0, place] == result.exit_layers[step]
            assert tokens[0, place] == result.new_tokens[0][step]
            if result.exit_layers[step] < 6:
                break
    assert compared > 15


def test_layer_weights():
    """The labels of point k weigh k / sum of the points in the controller's gradient."""
    dynamic, points = scrambled(deep_model()), 4
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(points, 3, 5, 16, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (points, 3, 5), generator=generator)
    weight = dynamic.controller.weight

    def gradient(loss):
        return torch.autograd.grad(loss, weight)[0]

    def of_point(k, labels):
        return gradient(torch.nn.functional.cross_entropy((states[k] @ weight.T).flatten(0, 1), labels[k].flatten()))

    base = gradient(dynamic.controller_loss(states, labels))
    torch.testing.assert_close(base, sum((k + 1) / 10 * of_point(k, labels) for k in range(points)))
    for k in range(points):
        wrong = labels.clone()
        wrong[k] = (wrong[k] + 1) % 3
        change = gradient(dynamic.controller_loss(states, wrong)) - base
        torch.testing.assert_close(change, (k + 1) / 10 * (of_point(k, wrong) - of_point(k, labels)))


def test_at_the_last_layer_a_stop_ends_and_an_exit_uses_norm_and_head():
    model = deep_model()
    dynamic = scrambled(model)
    late = lambda layer, hidden: Action.STOP if layer == 4 else Action.CONTINUE  # noqa: E731
    result = dynamic.generate(PROMPT, eos_token_id=[], policy=late)
    assert result.stopped_at == 4 and len(result.new_tokens[0]) == 1
    state = raw_outputs(model, PROMPT)[-1]
    with torch.no_grad():
        torch.testing.assert_close(dynamic.logits(4, model.model.norm(state)), model(PROMPT).logits)


def test_decision_points_follow_codegens_every_third_layer():
    dynamic = scrambled(deep_model(layers=7), every=3)
    assert dynamic.layers == [1, 4, 7] and len(dynamic.heads) == 2
    asked = []

    def policy(layer, hidden):
        asked.append(layer)
        return Action.CONTINUE

    dynamic.generate(PROMPT, max_new_tokens=2, eos_token_id=[], policy=policy)
    assert asked == [1, 4, 7]
    asked.clear()
    assert scrambled(deep_model(layers=6), every=3).layers == [1, 4, 6]


def test_thresholds_are_strict_and_need_the_largest_probability():
    law = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.2, 0.35, 0.45]], dtype=torch.float64)
    assert choose(law, 0.6, 0.6).tolist() == [2, 2, 2]
    assert choose(law, 0.59, 0.59).tolist() == [0, 1, 2]
    assert choose(law, 0.0, 0.0).tolist() == [0, 1, 2]
    assert choose(law, 0.0, 100).tolist() == [2, 1, 2]


def test_each_stage_trains_its_own_part_only():
    model = deep_model(dtype=torch.float32)
    dynamic, blocks = DynamicInference(model), text(8, 16)
    before = {name: value.clone() for name, value in {**dynamic.state_dict(), **model.state_dict()}.items()}

    def moved():
        now = {**dynamic.state_dict(), **model.state_dict()}
        return {name for name in now if not torch.equal(now[name], before[name])}

    dynamic.fit_heads(blocks, epochs=1, batch_size=4, learning_rate=1e-2)
    heads = {f"heads.{index}.weight" for index in range(3)}
    assert moved() == heads
    after_heads = copy.deepcopy(dynamic.heads.state_dict())
    dynamic.fit_controller(blocks, epochs=1, batch_size=4, learning_rate=1e-2)
    assert moved() == {*heads, "controller.weight"}
    assert all(torch.equal(value, after_heads[name]) for name, value in dynamic.heads.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *dynamic.parameters()))


@pytest.mark.parametrize("head", ["linear", "tuned"])
def test_the_heads_loss_is_the_sum_of_cross_entropies(head):
    model = deep_model()
    dynamic, blocks = scrambled(model, head=head), text(4, 9)
    outputs, expected = raw_outputs(model, blocks), 0.0
    for point in range(3):
        for row in range(4):
            for t in range(8):
                with torch.no_grad():
                    u = dynamic.heads[point](outputs[point][row, t])
                    scores = model.lm_head(u) if head == "tuned" else u
                expected += float(scores.logsumexp(-1) - scores[blocks[row, t + 1]]) / 32
    assert dynamic.fit_heads(blocks, epochs=1, batch_size=4)[0] == pytest.approx(expected, rel=1e-9)


def test_a_tuned_head_starts_as_the_models_own_on_that_layer():
    for family in ("llama", "gemma3"):
        model = deep_model(family)
        state = raw_outputs(model, PROMPT)[1]
        with torch.no_grad():
            expected = model.lm_head(model.model.norm(state))
            dynamic = DynamicInference(model, head="tuned")
            torch.testing.assert_close(dynamic.logits(2, state), expected)
            matrix = dynamic.heads[1].correction.weight.normal_(generator=torch.Generator().manual_seed(0))
            z = model.model.norm(state)
            torch.testing.assert_close(dynamic.logits(2, state), model.lm_head(z + z @ matrix.T))


def test_a_tuned_head_trains_a_norm_of_its_own_where_the_model_is_frozen_too():
    model = deep_model(dtype=torch.float32).requires_grad_(False)
    dynamic, before = DynamicInference(model, head="tuned"), model.model.norm.weight.clone()
    dynamic.fit_heads(text(4), epochs=1, batch_size=4, learning_rate=1e-2)
    assert all(not torch.equal(head.norm.weight, before) and head.correction.weight.any() for head in dynamic.heads)
    assert torch.equal(model.model.norm.weight, before)


def test_training_finds_easy_and_hopeless_tokens():
    """Of each pair the second token follows from the first, and the first from nothing."""
    torch.manual_seed(0)
    model = deep_model(dtype=torch.float32)
    for parameter in model.model.layers.parameters():
        parameter.data.mul_(0.1)  # states stay near the embeddings, which 16 dimensions tell apart
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(1, 8, (64, 12), generator=generator)
    blocks = torch.stack([first, first + 20], -1).flatten(1)
    dynamic = DynamicInference(model)
    losses = dynamic.fit_heads(blocks[:32], epochs=15, batch_size=4, learning_rate=5e-2, generator=generator)
    assert losses[-1] < 0.6 * losses[0]
    fitted = dynamic.fit_controller(blocks[32:48], epochs=30, batch_size=4, learning_rate=5e-2, generator=generator)
    assert fitted[-1] < 0.6 * fitted[0]
    reading, easy = dynamic.read(blocks[48:]), torch.zeros(16, 23, dtype=torch.bool)
    (layers, tokens), easy[:, ::2] = reading.decide(0.6, 0.6), True
    assert float((tokens == reading.tokens)[easy].float().mean()) > 0.95
    assert float(layers[easy].float().mean()) < 1.5
    assert float((tokens[~easy] < 0).float().mean()) > 0.9 and not bool((tokens[easy] < 0).any())


def test_a_smaller_vocabulary_leaves_other_tokens_to_the_last_layer():
    model, words = deep_model(), torch.tensor([1, 5, 7, 20, 33])
    for head in ("linear", "tuned"):
        dynamic, blocks = scrambled(model, vocabulary=words, head=head), text(20)
        reading = dynamic.read(blocks)
        assert bool(torch.isin(reading.predictions[:-1], words).all())
        assert set(dynamic.generate(PROMPT, policy=at(2), eos_token_id=[]).new_tokens[0][1:]) <= set(words.tolist())
        outside = ~torch.isin(reading.tokens, words)
        assert bool((reading.labels[:-1][:, outside] != Action.EXIT).all())
        before = dynamic.fit_heads(blocks, epochs=1, batch_size=20)[0]
        kept = torch.isin(blocks[:, 1:], words)
        place = {int(word): index for index, word in enumerate(words)}
        labels = torch.tensor([place[int(token)] for token in blocks[:, 1:][kept]])
        fresh = scrambled(model, vocabulary=words, head=head)
        with torch.no_grad():
            states = raw_outputs(model, blocks)
            expected = sum(
                torch.nn.functional.cross_entropy(fresh.logits(layer, states[layer - 1][:, :-1][kept]), labels)
                for layer in (1, 2, 3)
            )
        assert before == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"every": 2, "head": "tuned"}, {"vocabulary": torch.tensor([3, 9, 12, 30])}])
def test_what_is_saved_and_loaded_does_the_same(tmp_path, options):
    model = deep_model()
    dynamic = scrambled(model, **options)
    for _ in range(2):  # into folders that are not there yet, and over what is
        dynamic.save_pretrained(tmp_path / "some" / "heads")
    again = DynamicInference.from_pretrained(tmp_path / "some" / "heads", model)
    one, other = (d.generate(PROMPT, exit_threshold=0.5, stop_threshold=0.8, eos_token_id=[]) for d in (dynamic, again))
    assert (one.new_tokens, one.exit_layers, one.stopped) == (other.new_tokens, other.exit_layers, other.stopped)
    assert again.layers == dynamic.layers and again.state_dict().keys() == dynamic.state_dict().keys()
    with pytest.raises(ValueError, match="another model"):
        DynamicInference.from_pretrained(tmp_path / "some" / "heads", deep_model(layers=7))
    config = tmp_path / "some" / "heads" / "config.json"
    config.write_text(config.read_text().replace("DynamicInference", "Another"))
    with pytest.raises(ValueError, match="another class"):
        DynamicInference.from_pretrained(config.parent, model)
    with pytest.raises(ValueError, match="holds no saved"):
        DynamicInference.from_pretrained(tmp_path / "nowhere", model)


def test_half_precision_serves_and_trains():
    model = deep_model(dtype=torch.bfloat16)
    dynamic = DynamicInference(model, head="tuned")
    losses = dynamic.fit_heads(text(8, 16), epochs=10, batch_size=8, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    assert next(dynamic.heads.parameters()).dtype == torch.bfloat16
    assert dynamic.fit_controller(text(8, 16), epochs=1)[0] > 0 and dynamic.controller.weight.dtype == torch.float32
    assert len(dynamic.generate(PROMPT, policy=at(2), eos_token_id=[]).new_tokens[0]) == 10


def test_what_a_completion_cost_is_counted(monkeypatch):
    model, now = deep_model(), [0.0]
    monkeypatch.setattr("paperworks.decoding.dynamic_inference.perf_counter", lambda: now[0])
    dynamic = scrambled(model)
    with model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 10)):
        whole = dynamic.generate(PROMPT, max_new_tokens=6, eos_token_id=[], **OFF)
    # The prompt's pass goes through the model's own door; a pass that may be left early does not.
    assert whole.statistics.target_seconds == 10.0
    assert (whole.statistics.target_calls, whole.statistics.emitted) == (5, [[1] * 5])
    assert whole.stopped_at is None and whole.sequences[0].tolist() == PROMPT[0].tolist() + whole.new_tokens[0]
    asked = []

    def third(layer, hidden):
        asked.append(layer)
        return Action.STOP if len(asked) == 4 + 4 + 2 else Action.CONTINUE

    stopped = dynamic.generate(PROMPT, max_new_tokens=6, eos_token_id=[], policy=third)
    assert stopped.stopped_at == 2 and stopped.new_tokens[0] == whole.new_tokens[0][:3]
    assert (stopped.statistics.target_calls, stopped.statistics.emitted) == (3, [[1] * 2])


@pytest.mark.parametrize("part", ["fit_heads", "fit_controller"])
def test_training_is_adamw_at_a_rate_that_falls_to_nothing_in_a_line(part, monkeypatch):
    dynamic, seen, done = DynamicInference(deep_model(dtype=torch.float32)), [], []
    step = torch.optim.AdamW.step

    def watched(optimiser, *args, **options):
        (group,) = optimiser.param_groups
        norm = torch.stack([weight.grad.norm() for weight in group["params"]]).norm()
        seen.append((group["lr"], group["weight_decay"], float(norm)))
        return step(optimiser, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    options = {"epochs": 2.5, "batch_size": 3, "learning_rate": 0.5, "weight_decay": 0.25}
    losses = getattr(dynamic, part)(text(6), progress=done.append, **options)
    assert len(losses) == len(seen) == 5 and done == [1] * 5
    assert [rate for rate, *_ in seen] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert {decay for _, decay, _ in seen} == {0.25} and max(norm for *_, norm in seen) <= 1 + 1e-5
    assert len(getattr(dynamic, part)(text(6), epochs=0.01)) == 1
    for wrong in ({"batch_size": 0}, {"weight_decay": -0.1}, {"epochs": -1}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match="weight_decay not negative"):
            getattr(dynamic, part)(text(6), **wrong)


def test_the_controllers_first_step_is_as_long_for_entries_of_any_size():
    """From zero, a step of Adam is the rate times the slope's sign: on entries divided by their mean absolute value."""
    model = deep_model()
    dynamic, blocks = DynamicInference(model), text(4, 9)
    states, labels = dynamic.read(blocks).states, dynamic.read(blocks).labels
    weight = torch.zeros(3, 16, dtype=torch.float64, requires_grad=True)
    scale = states.abs().mean((0, 1, 2))
    points = torch.stack([
        torch.nn.functional.cross_entropy((states[k] / scale @ weight.T).flatten(0, 1), labels[k].flatten())
        for k in range(4)
    ])  # fmt: skip
    (slope,) = torch.autograd.grad((points * torch.tensor([0.1, 0.2, 0.3, 0.4])).sum(), weight)
    dynamic.fit_controller(blocks, epochs=1, batch_size=4, learning_rate=0.02)
    torch.testing.assert_close(dynamic.controller.weight.detach(), -0.02 * slope.sign() / scale, rtol=1e-4, atol=0)
    assert float(scale.max() / scale.min()) > 1.5
    # From elsewhere too it is the same map that is trained on.
    other = scrambled(model)
    before = other.controller.weight.detach().clone()
    said = other.controller_loss(states, other.read(blocks).labels).item()
    losses = other.fit_controller(blocks, epochs=1, batch_size=4, learning_rate=1e-12)
    assert losses[0] == pytest.approx(said) and torch.allclose(other.controller.weight, before)


def test_reading_is_the_same_in_batches_that_are_counted():
    dynamic, blocks, done = scrambled(deep_model()), text(5), []
    one, other = dynamic.read(blocks, batch_size=2, progress=done.append), dynamic.read(blocks)
    assert done == [2, 2, 1]
    for name in ("layers", "tokens", "predictions"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(one.probabilities, other.probabilities)
    torch.testing.assert_close(one.states, other.states)
    torch.testing.assert_close(
        one.probabilities, (one.states @ dynamic.controller.weight.T).softmax(-1), atol=1e-12, rtol=0
    )
    assert one.tokens.tolist() == blocks[:, 1:].tolist() and one.states.shape == (4, 5, 13, 16)


def test_an_end_token_ends():
    model = deep_model()
    whole = scrambled(model).generate(PROMPT, eos_token_id=[], **OFF).new_tokens[0]
    end = whole[3]
    result = scrambled(model).generate(PROMPT, eos_token_id=end, **OFF)
    assert result.new_tokens[0] == whole[: whole.index(end) + 1] and not result.stopped


def test_models_without_a_list_of_layers_are_refused():
    model = deep_model()
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="no list of its 3 layers"):
        DynamicInference(model)
    model = deep_model()
    model.model.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="no final norm"):
        DynamicInference(model, head="tuned")


def test_layers_that_do_not_all_make_states_of_the_last_ones_shape_are_refused(monkeypatch):
    model = deep_model()
    last = model.model.layers[-1]
    whole = last.forward
    monkeypatch.setattr(last, "forward", lambda *args, **kwargs: whole(*args, **kwargs)[:, 1:])
    with pytest.raises(ValueError, match="each of which makes a state of the next"):
        layer_outputs(Target(model), text(), [1, 4])


def test_the_model_is_left_as_it_was(monkeypatch):
    """Layers get their own forward back, one set by someone else included, also when a policy fails."""
    model = deep_model()
    wrapped = model.model.layers[1].forward
    other = lambda *args, **kwargs: wrapped(*args, **kwargs)  # noqa: E731
    model.model.layers[1].forward = other
    dynamic = scrambled(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dynamic.generate(PROMPT, policy=at(2), eos_token_id=[])
    with pytest.raises(ZeroDivisionError):
        dynamic.generate(PROMPT, policy=lambda layer, hidden: 1 // 0, eos_token_id=[])
    dynamic.read(text())
    assert model.model.layers[1].forward is other and "forward" not in vars(model.model.layers[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: DynamicInference(d.model, every=0), "every must be at least 1"),
        (lambda d: DynamicInference(d.model, head="deep"), "'linear' or 'tuned'"),
        (lambda d: DynamicInference(d.model, vocabulary=torch.tensor([40])), r"within 0\.\.39"),
        (lambda d: d.generate(torch.zeros(2, 3, dtype=torch.long)), "one by one"),
        (lambda d: d.generate(torch.zeros(1, 0, dtype=torch.long)), "empty"),
        (lambda d: d.generate(PROMPT, max_new_tokens=100), "context"),
        (lambda d: d.generate(PROMPT, exit_threshold=-0.1), "probabilities"),
        (lambda d: d.generate(PROMPT, stop_threshold=float("nan")), "probabilities"),
        (lambda d: DynamicInference(d.model, vocabulary=torch.tensor([-1])), r"within 0\.\.39"),
        (lambda d: d.fit_heads(torch.zeros(3, dtype=torch.long)), "blocks must be int64"),
        (lambda d: d.fit_heads(torch.zeros(3, 4)), "blocks must be int64"),
        (lambda d: d.fit_heads(torch.zeros(3, 1, dtype=torch.long)), "at least 1 x 2"),
        (lambda d: d.fit_heads(torch.zeros(0, 4, dtype=torch.long)), "at least 1 x 2"),
        (lambda d: d.fit_heads(text() - 40), "wrong tokenizer"),
        (lambda d: d.read(torch.full((1, 4), 40)), r"outside 0\.\.39"),
        (lambda d: d.logits(0, torch.zeros(16)), "no head stands behind layer 0"),
        (lambda d: d.fit_heads(text(vocab=60)), "wrong tokenizer"),
        (lambda d: d.fit_heads(text(), epochs=0), "epochs"),
        (lambda d: d.fit_controller(text(), learning_rate=-1), "learning_rate"),
        (lambda d: d.logits(9, torch.zeros(16)), "no head stands behind layer 9"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(scrambled(deep_model()))
