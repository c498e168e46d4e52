"""Next-block prediction: the lines under "What must be true"."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from paperworks.decoding.next_block import NextBlockPrediction

GRID = (2, 2, 3)


def make(block=(1, 1, 3), grid=GRID, vocab=5, dtype=torch.float64, **options):
    torch.manual_seed(3)
    model = NextBlockPrediction(vocab_size=vocab, grid=grid, block=block, hidden_size=16, layers=2, heads=2, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def codes(count=2, grid=GRID, vocab=5, seed=0):
    return torch.randint(vocab, (count, *grid), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [(1, 1, 3), (1, 2, 3), (1, 1, 1), (2, 1, 3)])
def test_gradient_reaches_exactly_the_blocks_up_to_ones_own(block):
    model = make(block)
    blocks = model._in_blocks(codes(1))
    embedded = []
    model.backbone.embed_tokens.register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_(True)) or output
    )
    logits = model(blocks[:, :-1])
    states = embedded[0]
    for b in range(1, model.blocks):
        for slot in range(model.slots):
            (grad,) = torch.autograd.grad(logits[0, b, slot].sum(), states, retain_graph=True)
            reached = grad[0].abs().amax(-1).view(-1, model.slots) > 0
            assert reached[:b].all() and not reached[b:].any()


def test_block_of_one_is_a_plain_causal_decoder():
    model = make((1, 1, 1))
    tokens = codes(2)
    plain = LlamaForCausalLM(model.backbone.config).to(torch.float64).eval()
    plain.model.load_state_dict(model.backbone.state_dict())
    plain.lm_head.load_state_dict(model.head.state_dict())
    flat = tokens.flatten(1)
    states = model.backbone.embed_tokens(flat[:, :-1])
    coordinates = torch.cartesian_prod(*(torch.arange(side) for side in GRID))[:-1]
    states = states + sum(table(coordinates[:, axis]) for axis, table in enumerate(model.places))
    states = torch.cat([model.begin.expand(2, -1, -1), states], dim=1)
    expected = plain(inputs_embeds=states).logits
    torch.testing.assert_close(model(flat[:, :-1, None])[:, :, 0], expected, atol=1e-10, rtol=0)


def fit(model, sample, steps, lr=3e-3):
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model.loss(sample())
        loss.backward()
        optimiser.step()
    return loss.item()


def test_a_fixed_permutation_from_block_to_block_is_learnt():
    torch.manual_seed(0)
    grid, order = (1, 3, 4), torch.tensor([2, 0, 3, 1])
    model = NextBlockPrediction(vocab_size=6, grid=grid, block=(1, 1, 4), hidden_size=48, layers=2, heads=4)

    def sample():
        first = torch.randint(6, (64, 4))
        return torch.stack([first, first[:, order], first[:, order][:, order]], 1)[:, None]

    fit(model, sample, 250)
    with torch.no_grad():
        blocks = model._in_blocks(sample())
        log_law = model(blocks[:, :-1]).log_softmax(-1)
        later = -log_law.gather(-1, blocks[..., None])[:, 1:].mean()
    assert later < 0.05


def test_on_independent_tokens_the_loss_stays_at_log_vocab():
    torch.manual_seed(0)
    model = NextBlockPrediction(vocab_size=6, grid=(1, 3, 4), block=(1, 1, 4), hidden_size=48, layers=2, heads=4)
    fit(model, lambda: torch.randint(6, (64, 1, 3, 4)), 150)
    with torch.no_grad():
        assert model.loss(torch.randint(6, (2000, 1, 3, 4))).item() > math.log(6) - 0.01


@pytest.mark.parametrize("given", [0, 1, 2])
def test_generation_with_cache_follows_the_logits_of_one_full_pass(given, monkeypatch):
    model = make(grid=(3, 2, 3))
    known = codes(2, grid=(3, 2, 3))[:, :given] if given else None
    laws = []
    real = torch.nn.Module.__call__

    def call(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        if self is model:
            laws.append(output[:, -1])
        return output

    monkeypatch.setattr(torch.nn.Module, "__call__", call)
    made = model.generate(2, given=known, generator=torch.Generator().manual_seed(0))
    monkeypatch.undo()
    if given:
        assert made[:, :given].equal(known)
    with torch.no_grad():
        full = model(model._in_blocks(made)[:, :-1])
    torch.testing.assert_close(torch.stack(laws, 1), full[:, 2 * given :], atol=1e-10, rtol=0)


@pytest.mark.parametrize(("block", "calls"), [((1, 1, 3), 4), ((1, 2, 3), 2), ((1, 1, 1), 12)])
def test_steps_are_tokens_over_block_size(block, calls):
    model = make(block)
    count = []
    model.backbone.register_forward_hook(lambda *_: count.append(1))
    model.generate(2)
    assert len(count) == calls == math.prod(GRID) // math.prod(block)
    count.clear()
    model.generate(2, given=codes()[:, :1])
    assert len(count) == calls / 2


def test_probabilities_of_all_grids_sum_to_one_and_samples_match():
    model = make(grid=(1, 2, 2), block=(1, 1, 2), vocab=2)
    grids = torch.tensor(list(itertools.product(range(2), repeat=4))).view(16, 1, 2, 2)
    with torch.no_grad():
        law = model.log_prob(grids).exp()
    assert abs(law.sum().item() - 1) < 1e-12
    samples = model.generate(8000, generator=torch.Generator().manual_seed(0)).flatten(1)
    counts = torch.bincount(samples @ torch.tensor([8, 4, 2, 1]), minlength=16)
    statistic = ((counts - 8000 * law) ** 2 / (8000 * law)).sum()
    assert statistic < 37.7  # 99.9 % point for 15 degrees of freedom


def test_slots_of_one_block_are_independent_given_the_past():
    """Two equal fair coins in one block cost 2 log 2 nats; token by token they cost log 2."""

    def sample(count=256):
        return torch.randint(2, (count, 1, 1, 1)).expand(-1, -1, -1, 2).contiguous()

    costs = {}
    for block in ((1, 1, 2), (1, 1, 1)):
        torch.manual_seed(0)
        model = NextBlockPrediction(vocab_size=2, grid=(1, 1, 2), block=block, hidden_size=16, layers=1, heads=2)
        fit(model, sample, 150, lr=1e-2)
        with torch.no_grad():
            costs[block] = -model.log_prob(sample(2000)).mean().item()
    assert costs[(1, 1, 2)] > 2 * math.log(2) - 0.01
    assert costs[(1, 1, 1)] < math.log(2) + 0.05


def test_given_frames_bear_no_loss_and_labels_condition():
    model = make(classes=3)
    tokens, label = codes(2), torch.tensor([0, 2])
    with torch.no_grad():
        whole, rest = model.log_prob(tokens, label), model.log_prob(tokens, label, given_frames=1)
        blocks = model._in_blocks(tokens)
        first = model(blocks[:, :-1], label).log_softmax(-1).gather(-1, blocks[..., None])[:, :2].sum((1, 2, 3))
        assert (model.log_prob(tokens, label.flip(0)) - whole).abs().min() > 1e-3
    torch.testing.assert_close(whole - rest, first)


@pytest.mark.parametrize("given", [0, 1])
def test_the_loss_is_the_mean_over_all_tokens_that_are_not_given(given):
    model = make(classes=3)
    tokens, label = codes(4), torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        total = model.log_prob(tokens, label, given_frames=given).sum()
        loss = model.loss(tokens, label, given_frames=given)
    assert float(loss) == pytest.approx(-float(total) / (4 * (12 - 6 * given)))


def test_a_class_moves_the_begin_block_and_nothing_else():
    model, plain = make(classes=3), make()
    weights = {name: value for name, value in model.state_dict().items() if name != "label.weight"}
    for label in range(3):
        weights["begin"] = model.begin + model.label.weight[label]
        plain.load_state_dict(weights)
        with torch.no_grad():
            torch.testing.assert_close(model.log_prob(codes(), torch.tensor([label] * 2)), plain.log_prob(codes()))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_generation_without_a_choice_takes_the_most_likely_codes(options):
    model = make()
    made = model.generate(3, **options)
    with torch.no_grad():
        law = model(model._in_blocks(made)[:, :-1])
    assert torch.equal(law.argmax(-1), model._in_blocks(made)) and made.dtype == torch.long
    samples = model.generate(3, generator=torch.Generator().manual_seed(1))
    assert samples.equal(model.generate(3, temperature=1.0, generator=torch.Generator().manual_seed(1)))
    assert not samples.equal(made)


def test_sizes_follow_from_what_is_asked_for():
    model = NextBlockPrediction(vocab_size=5, grid=(2, 3, 4), block=(1, 3, 2), classes=2)
    config = model.backbone.config
    # Llama's two thirds of four widths, rounded up to a multiple of 16.
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (128, 352, 4)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 4)
    assert (model.slots, model.blocks) == (6, 4) and config.max_position_embeddings == 30
    assert (
        model.begin.shape == (6, 128) and model.head.weight.shape == (5, 128) and model.label.weight.shape == (2, 128)
    )
    assert [tuple(table.weight.shape) for table in model.places] == [(2, 128), (3, 128), (4, 128)]
    for weight in (model.begin, model.places[2].weight, model.label.weight):
        assert 0.015 < float(weight.detach().std()) < 0.025


def test_another_block_begins_with_these_weights_and_its_slots_take_turns():
    model = make((1, 1, 3), classes=2)
    for block in ((1, 2, 3), (1, 1, 1), (2, 1, 3)):
        other = model.with_block(block)
        assert other.block == block and other.config == {**model.config, "block": list(block)}
        assert other.begin.equal(model.begin[[slot % 3 for slot in range(math.prod(block))]])
        assert all(
            value.equal(other.state_dict()[name]) for name, value in model.state_dict().items() if name != "begin"
        )
        assert other.begin.dtype == torch.float64


def test_blocks_and_grid_are_inverse_and_in_order():
    model = make((1, 2, 1), grid=(2, 4, 3))
    grid = torch.arange(24).view(1, 2, 4, 3)
    blocks = model._in_blocks(grid)
    assert blocks[0, :4].tolist() == [[0, 3], [1, 4], [2, 5], [6, 9]]
    assert model._in_grid(blocks).equal(grid)


def test_saved_and_loaded_and_other_blocks(tmp_path):
    model = make()
    for _ in range(2):  # into folders that are not there yet, and over what is
        model.save_pretrained(tmp_path / "some" / "model")
    again = NextBlockPrediction.from_pretrained(tmp_path / "some" / "model")
    assert again.log_prob(codes()).equal(model.log_prob(codes())) and not again.training
    config = tmp_path / "some" / "model" / "config.json"
    config.write_text(config.read_text().replace("NextBlockPrediction", "Another"))
    with pytest.raises(ValueError, match="another class"):
        NextBlockPrediction.from_pretrained(config.parent)
    wider = make((1, 1, 1)).with_block((1, 1, 3))
    assert wider.blocks == 4 and wider.head.weight.equal(make((1, 1, 1)).head.weight)
    with pytest.raises(ValueError, match="holds no saved NextBlockPrediction"):
        NextBlockPrediction.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make((1, 1, 2)), "cannot be cut into blocks"),
        (lambda: make().log_prob(codes().float()), "expected int64 codes"),
        (lambda: make().log_prob(codes(grid=(2, 2, 4))), "expected int64 codes"),
        (lambda: make().log_prob(codes() + 9), "within 0..4"),
        (lambda: make().log_prob(codes()[:0]), "there are no clips"),
        (lambda: make(classes=2).generate(2), "takes a label for each of 2"),
        (lambda: make(classes=2).generate(2, label=torch.tensor([0, 2])), r"labels must be within 0\.\.1"),
        (lambda: make(classes=2).log_prob(codes(), torch.tensor([-1, 0])), r"labels must be within 0\.\.1"),
        (lambda: make(classes=2).log_prob(codes(), torch.tensor([0])), "takes a label for each of 2"),
        (lambda: make().log_prob(codes(), torch.tensor([0, 0])), "takes no label"),
        (lambda: make().log_prob(codes() - 9), "within 0..4"),
        (lambda: make().log_prob(codes(), given_frames=-1), "given frames must be fewer"),
        (lambda: make(vocab=1), "vocab_size must be at least 2"),
        (lambda: make((1, 1, 0)), "all other sizes at least 1"),
        (lambda: make(classes=-1), "classes not negative"),
        (lambda: make().generate(3, given=codes()[:, :1]), "frames of 3 clips"),
        (lambda: make().generate(0), "count must be at least 1"),
        (lambda: make().generate(2, given=codes()), "given frames must be fewer"),
        (lambda: make((2, 1, 3), grid=(4, 2, 3)).log_prob(codes(grid=(4, 2, 3)), given_frames=1), "fill blocks of 2"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
