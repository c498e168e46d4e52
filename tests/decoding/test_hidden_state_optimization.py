"""Hidden-state optimisation against its definition: plain transformers caches, closed forms, torch's own Adam."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from paperworks.decoding import generate
from paperworks.decoding.hidden_state_optimization import HiddenStateOptimization, _Descent, _StateCache
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree
from tests.decoding.conftest import FAMILIES, make_model

TEXT = torch.randint(40, (1, 23), generator=torch.Generator().manual_seed(3))


def plain_log_likelihood(model, text):
    with torch.no_grad():
        return model(text).logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]


def by_hand(model, text, window, rate, steps=1):
    """The algorithm over transformers' own cache: keys and values of all layers go down the gradient of each window."""
    kept, predicted = None, []
    for start in range(0, text.shape[1] - 1, window):
        inputs, labels = (
            text[:, start : start + window][:, : text.shape[1] - 1 - start],
            text[:, start + 1 : start + 1 + window],
        )
        shifts = None
        for step in range(steps):
            cache = DynamicCache()
            for index, (keys, values) in enumerate(kept or []):
                past = keys.shape[2]
                more = shifts[index] if shifts else (0, 0)
                pieces = [
                    states + (shift[:, :, :past] if shifts else 0)
                    for states, shift in zip((keys, values), more, strict=True)
                ]
                cache.update(*pieces, index)
            if shifts:
                # The window's own states are shifted where the model makes them.
                update = cache.update
                cache.update = lambda k, v, i, *a, **kw: update(
                    k + shifts[i][0][:, :, -k.shape[2] :], v + shifts[i][1][:, :, -k.shape[2] :], i
                )
            positions = torch.arange(start, start + inputs.shape[1])[None]
            logits = model(inputs, past_key_values=cache, position_ids=positions).logits
            loss = -logits.log_softmax(-1).gather(-1, labels[..., None])
            predicted += [-loss.detach()[..., 0]] if step == 0 else []
            states = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            down = [-rate * gradient for gradient in torch.autograd.grad(loss.sum(), states)]
            kept_now = [state.detach() for state in states]
            pairs = list(zip(down[::2], down[1::2], strict=True))
            shifts = (
                [tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(shifts, pairs, strict=True)]
                if shifts
                else pairs
            )
            moved = [state + move for state, move in zip(kept_now, down, strict=True)]
        kept = list(zip(moved[::2], moved[1::2], strict=True))
    return torch.cat(predicted, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_0_equal_the_plain_model(family):
    model = make_model(family)
    method = HiddenStateOptimization(model, steps=0, window=5)
    torch.testing.assert_close(
        method.log_likelihood(TEXT).double(), plain_log_likelihood(model, TEXT), atol=1e-5, rtol=1e-6
    )
    written = method.generate(TEXT, max_new_tokens=12, eos_token_id=[])
    assert written.sequences.tolist() == generate(model, TEXT, max_new_tokens=12, eos_token_id=[]).sequences.tolist()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_window_is_predicted_by_states_that_went_down_the_gradient_of_the_windows_before(family, steps):
    model = make_model(family)
    method = HiddenStateOptimization(model, steps=steps, learning_rate=0.05, window=4, optimizer="sgd")
    expected = by_hand(model, TEXT, 4, 0.05, steps)
    torch.testing.assert_close(method.log_likelihood(TEXT).double(), expected, atol=1e-5, rtol=1e-6)
    assert (expected - plain_log_likelihood(model, TEXT)).abs().max() > 0.05


def test_one_step_on_a_linear_softmax_raises_log_p_by_rate_times_squared_gradient():
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    h = torch.randn(1, 1, 1, 5, dtype=torch.float64, generator=generator)

    def log_p(state):
        return (state @ U.T).log_softmax(-1)[0, 0, 0, 3]

    eps = 1e-6
    slope = torch.stack(
        [(log_p(h + eps * e) - log_p(h - eps * e)) / (2 * eps) for e in torch.eye(5, dtype=torch.float64)]
    )
    leaf = h.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-log_p(leaf), leaf)
    for rate in (1e-3, 1e-4):
        moved = h.clone()
        _Descent("sgd", rate, (0.9, 0.999), 1e-8).step([moved], [gradient], torch.ones(1, 1, 1, 1, dtype=torch.bool))
        rise = float(log_p(moved) - log_p(h))
        assert rise > 0
        assert rise == pytest.approx(float(rate * slope.square().sum()), rel=20 * rate)


def test_one_step_on_a_transformer_raises_log_p_by_rate_times_squared_gradient():
    model, rate = make_model(), 1e-4
    target = Target(model)
    cache = _StateCache(target.config, 1, _Descent("sgd", rate, (0.9, 0.999), 1e-8))
    inputs, labels = TEXT[:, :-1], TEXT[:, 1:]

    def log_p():
        return target.verify(TokenTree.chain(inputs), cache)[0].log_softmax(-1).gather(-1, labels[..., None]).sum()

    before = log_p()
    cache.improve(-before, torch.ones(1, dtype=torch.bool), [inputs.shape[1]])
    squared = sum(float((offset.detach() / rate).square().sum()) for layer in cache.layers for offset in layer.offsets)
    assert float((log_p() - before).detach()) == pytest.approx(rate * squared, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_no_peeking_what_comes_never_changes_what_was_predicted(optimizer):
    model = make_model("gemma3")
    method = HiddenStateOptimization(model, steps=2, learning_rate=0.05, window=4, optimizer=optimizer)
    before = method.log_likelihood(TEXT)
    others = TEXT.repeat(22, 1)
    places = torch.arange(22)
    others[places, places + 1] = (others[places, places + 1] + 1) % 40
    after = method.log_likelihood(others)
    for place in range(22):
        torch.testing.assert_close(after[place, :place], before[0, :place], atol=1e-6, rtol=0)
        assert (after[place, place:] - before[0, place:]).abs().min() > 0


def test_weights_are_bit_identical_before_and_after():
    model = make_model().requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    method = HiddenStateOptimization(model, learning_rate=0.1, window=4)
    method.log_likelihood(TEXT)
    method.generate(TEXT, max_new_tokens=6)
    method.classify(TEXT, (torch.arange(23) % 5 == 4)[None], [torch.tensor([1])])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adam_is_torchs_and_counts_steps_for_each_state_by_itself():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1, 2, slots, 3, dtype=torch.float64, generator=generator) for slots in (4, 4, 6, 6)]
    descent = _Descent("adam", 0.01, (0.9, 0.999), 1e-8)
    total = torch.zeros(1, 2, 6, 3, dtype=torch.float64)
    for gradient in gradients:
        slots = gradient.shape[2]
        descent.step([total[:, :, :slots]], [gradient], torch.ones(1, 1, slots, 1, dtype=torch.bool))
    for places, steps in ((slice(0, 4), gradients), (slice(4, 6), gradients[2:])):
        expected = torch.zeros_like(total[:, :, places]).requires_grad_()
        adam = torch.optim.Adam([expected], lr=0.01)
        for gradient in steps:
            expected.grad = gradient[:, :, places].clone()
            adam.step()
        torch.testing.assert_close(total[:, :, places], expected.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_of_a_padded_batch_equal_texts_one_by_one(family, side):
    method = HiddenStateOptimization(make_model(family), learning_rate=0.05, window=4)
    texts = [TEXT[0, :17], TEXT[0, 3:12], TEXT[0, 20:21]]
    padded, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(17 - len(text), None) if side == "left" else slice(len(text))
        padded[row, place], mask[row, place] = text, 1
    together = method.log_likelihood(padded, attention_mask=mask)
    written = method.generate(padded, attention_mask=mask, max_new_tokens=9, eos_token_id=5)
    for row, text in enumerate(texts):
        alone = method.log_likelihood(text)
        torch.testing.assert_close(together[row, : len(text) - 1], alone[0], atol=1e-5, rtol=0)
        assert not together[row, len(text) - 1 :].any()
        assert written.new_tokens[row] == method.generate(text, max_new_tokens=9, eos_token_id=5).new_tokens[0]


def test_generated_text_is_the_greedy_text_of_states_that_learnt_from_all_windows_before():
    model = make_model()
    method = HiddenStateOptimization(model, learning_rate=0.05, window=4, optimizer="sgd")
    prompt = TEXT[:, :9]
    written = method.generate(prompt, max_new_tokens=8, eos_token_id=[]).sequences
    # Scoring cuts the same windows when the prompt is a whole number of them and one token.
    chosen = by_hand(model, written, 4, 0.05)
    for place in range(9, 17):
        others = written[:, : place + 1].repeat(40, 1)
        others[:, place] = torch.arange(40)
        assert float(by_hand(model, others, 4, 0.05)[:, -1].max()) == pytest.approx(
            float(chosen[0, place - 1]), abs=1e-9
        )
    assert written.tolist() != generate(model, prompt, max_new_tokens=8, eos_token_id=[]).sequences.tolist()


def test_what_was_written_is_counted_filled_up_and_drawn_from_the_law_asked_for():
    model = make_model()
    method = HiddenStateOptimization(model, learning_rate=0.05, window=4)
    prompts = torch.stack([TEXT[0, :7], TEXT[0, 9:16]]).int()
    free = method.generate(prompts, max_new_tokens=9, eos_token_id=[])
    assert free.statistics.target_calls == 9 and free.statistics.emitted == [[1] * 9] * 2
    assert free.sequences[:, :7].tolist() == prompts.tolist()
    ends = [next(token for token in free.new_tokens[0] if token not in free.new_tokens[1])]
    for end in (ends, ends[0]):
        cut = method.generate(prompts, max_new_tokens=9, eos_token_id=end, pad_token_id=39)
        place = free.new_tokens[0].index(ends[0]) + 1
        assert cut.new_tokens == [free.new_tokens[0][:place], free.new_tokens[1]]
        assert cut.sequences[0].tolist() == prompts[0].tolist() + free.new_tokens[0][:place] + [39] * (9 - place)
        assert cut.statistics.target_calls == 9 and cut.statistics.emitted == [[1] * place, [1] * 9]
    model.generation_config.eos_token_id = ends[0]
    assert method.generate(prompts, max_new_tokens=9, pad_token_id=39).new_tokens == cut.new_tokens
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        drawn = method.generate(prompts, max_new_tokens=9, temperature=5.0, eos_token_id=[], **narrow)
        assert drawn.new_tokens == free.new_tokens


@pytest.mark.parametrize("window", [1, 3, 22, 100])
def test_any_window_up_to_the_whole_text_and_beyond(window):
    model = make_model()
    method = HiddenStateOptimization(model, learning_rate=0.05, window=window, optimizer="sgd")
    torch.testing.assert_close(
        method.log_likelihood(TEXT).double(), by_hand(model, TEXT, window, 0.05), atol=1e-5, rtol=1e-5
    )


def test_few_shot_states_learn_the_labels_and_nothing_else():
    model = make_model()
    prompt, labels = TEXT[:, :12], torch.zeros(1, 12, dtype=torch.bool)
    answers = [torch.tensor([3]), torch.tensor([7, 1]), torch.tensor([9, 9, 2])]
    plain = torch.stack(
        [plain_log_likelihood(model, torch.cat([prompt[0], answer])[None])[0, 11:].sum() for answer in answers]
    )
    method = HiddenStateOptimization(model, learning_rate=0.02, steps=5)
    torch.testing.assert_close(method.classify(prompt, labels, answers).double(), plain, atol=1e-5, rtol=0)
    labels[0, [5, 8]] = True
    learnt = method.classify(prompt, labels, answers).double()
    assert (learnt - plain).abs().min() > 1e-3
    still = HiddenStateOptimization(model, steps=0).classify(prompt, labels, answers).double()
    torch.testing.assert_close(still, plain, atol=1e-5, rtol=0)
    # By hand: descent on the two labels' loss, read off a plain cache, then the answers behind it.
    cache = DynamicCache()
    law = model(prompt[:, :-1], past_key_values=cache).logits.log_softmax(-1)
    loss = -law.gather(-1, prompt[:, 1:, None])[0, [4, 7]].sum()
    states = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    moved = [s.detach() - 0.05 * g for s, g in zip(states, torch.autograd.grad(loss, states), strict=True)]
    once = HiddenStateOptimization(model, learning_rate=0.05, optimizer="sgd").classify(prompt, labels, answers)
    for answer, value in zip(answers, once, strict=True):
        cache = DynamicCache()
        for index in range(len(moved) // 2):
            cache.update(moved[2 * index], moved[2 * index + 1], index)
        inputs = torch.cat([prompt[0, -1:], answer[:-1]])[None]
        law = model(inputs, past_key_values=cache).logits.log_softmax(-1)
        assert float(value) == pytest.approx(float(law.gather(-1, answer[None, :, None]).sum()), abs=1e-5)


def test_works_inside_inference_mode():
    method = HiddenStateOptimization(make_model(), window=4)
    outside = method.log_likelihood(TEXT)
    with torch.inference_mode():
        assert torch.equal(method.log_likelihood(TEXT.clone()), outside)
        assert len(method.generate(TEXT.clone(), max_new_tokens=6, eos_token_id=[]).new_tokens[0]) == 6


def test_same_seed_same_samples():
    method = HiddenStateOptimization(make_model(), window=4)
    one, other, third = (
        method.generate(
            TEXT, max_new_tokens=12, temperature=2.0, eos_token_id=[], generator=torch.Generator().manual_seed(seed)
        ).new_tokens
        for seed in (1, 1, 2)
    )
    assert one == other != third


def test_a_text_may_fill_the_context_and_no_more():
    method = HiddenStateOptimization(make_model(), window=32)
    text = torch.randint(40, (1, 66), generator=torch.Generator().manual_seed(0))
    assert method.log_likelihood(text[:, :64]).shape == (1, 63)
    with pytest.raises(ValueError, match="context"):
        method.log_likelihood(text)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(steps=-1), "steps must be at least 0"),
        (dict(window=0), "window at least 1"),
        (dict(learning_rate=0.0), "learning_rate and epsilon must be positive"),
        (dict(learning_rate=float("nan")), "learning_rate"),
        (dict(optimizer="lbfgs"), "'adam' or 'sgd'"),
        (dict(learning_rate=float("inf")), "learning_rate"),
        (dict(epsilon=0.0), "learning_rate and epsilon must be positive"),
        (dict(betas=(1.0, 0.9)), "betas"),
        (dict(betas=(0.9, -0.1)), "betas"),
    ],
)
def test_bad_values_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        HiddenStateOptimization(make_model(), **options)


def test_bad_inputs_are_refused():
    method = HiddenStateOptimization(make_model())
    labels = torch.zeros_like(TEXT, dtype=torch.bool)
    with pytest.raises(TypeError, match="causal language model"):
        HiddenStateOptimization(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"outside 0\.\.39"):
        method.log_likelihood(torch.tensor([[1, 2, 40]]))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        method.generate(TEXT, max_new_tokens=0)
    with pytest.raises(ValueError, match="1-D tensors"):
        method.classify(TEXT, labels, [])
    with pytest.raises(ValueError, match="mask of its shape"):
        method.classify(TEXT, labels[:, 1:], [torch.tensor([1])])
    with pytest.raises(ValueError, match="leaves out the first token"):
        method.classify(TEXT, ~labels, [torch.tensor([1])])
    with pytest.raises(ValueError, match=r"outside 0\.\.39"):
        method.classify(TEXT, labels, [torch.tensor([77])])
    broken = make_model()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        HiddenStateOptimization(broken).log_likelihood(TEXT)
