"""Data for drafters and the loop that trains them, against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from paperworks.decoding import (
    Drafter,
    DraftingData,
    Hydra,
    Medusa,
    Sampling,
    Target,
    collect,
    fit_tree,
    generate,
    rank_accuracy,
    self_written,
    stream,
    train_drafter,
)
from tests.decoding.conftest import make_model, scramble


def data_of(rows, lengths, seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    mask[:, 0] = False
    tokens = torch.randint(40, (rows, length), generator=generator)
    return DraftingData(tokens, torch.randn(rows, length, size, generator=generator), mask)


class Line(Drafter):
    """Two weights, drawn to the mean label of a batch, with a slope that is sometimes cut and sometimes not."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor([50.0, 18.0])), []

    def propose(self, state, committed, root, generator=None):
        raise NotImplementedError

    def loss(self, target, tokens, hidden, mask):
        self.seen.append((tokens, hidden.dtype, mask, self.training, self.weight.dtype))
        return (self.weight - tokens[mask].float().mean()).square().sum() / 40


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 4, "warmup": 0.3, "final_fraction": 0.2, "weight_decay": 0.5, "learning_rate": 0.3, "batch_size": 2},
        {"epochs": 2.5, "learning_rate": 0.1},
        {"epochs": 0.01, "batch_size": 3, "warmup": 0.0},
    ],
)
def test_the_loop_is_adamw_with_a_rate_that_rises_in_a_line_and_falls_by_a_cosine(options):
    model, data, drafter, progress = make_model(dtype=torch.float32), data_of(5, [9, 4, 7, 7, 3]), Line(), []
    losses = train_drafter(
        drafter, model, data, generator=torch.Generator().manual_seed(3), progress=progress.append, **options
    )
    peak, batch = options.get("learning_rate", 1e-3), options.get("batch_size", 4)
    decay, final = options.get("weight_decay", 0.0), options.get("final_fraction", 0.1)
    steps = max(1, round(options["epochs"] * 5 / batch))
    rising = max(1, round(options.get("warmup", 0.05) * steps))
    weight = torch.tensor([50.0, 18.0])
    first, second = torch.zeros(2), torch.zeros(2)
    generator, order, expected = torch.Generator().manual_seed(3), [], []
    for step in range(steps):
        order = order or list(torch.randperm(5, generator=generator).split(batch))
        rows = order.pop(0)
        mean = data.tokens[rows][data.mask[rows]].float().mean()
        expected.append(float((weight - mean).square().sum() / 40))
        slope = (weight - mean) / 20
        slope = slope / max(1.0, float(slope.norm()))
        rate = (
            (step + 1) / rising
            if step < rising
            else final + (1 - final) * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
        )
        first, second = 0.9 * first + 0.1 * slope, 0.95 * second + 0.05 * slope.square()
        move = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        weight = weight - peak * rate * (decay * weight + move)
    assert losses == pytest.approx(expected, rel=1e-5) and progress == [1] * steps
    torch.testing.assert_close(drafter.weight.detach(), weight, atol=1e-3, rtol=1e-5)
    # Nothing is computed behind the last label of a batch.
    assert all(tokens.shape == mask.shape and bool(mask[:, -1].any()) for tokens, _, mask, *_ in drafter.seen)
    assert all(training for *_, training, _ in drafter.seen) and not drafter.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_drafter_is_trained_in_float32_and_has_its_own_type_again(dtype):
    model, drafter = make_model(dtype=dtype), Line().to(dtype)
    data = data_of(4, [6, 6, 6, 6])
    train_drafter(drafter, model, DraftingData(data.tokens, data.hidden.to(dtype), data.mask), epochs=2)
    assert drafter.weight.dtype == dtype and drafter.weight.grad is None
    assert {(hidden, weight) for _, hidden, _, _, weight in drafter.seen} == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_training_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="epochs and learning_rate must be positive and batch_size at least 1"):
        train_drafter(Line(), make_model(), data_of(2, [4, 4]), **options)


def test_data_is_split_at_its_end_and_joined_with_padding_that_is_no_label():
    one, other = data_of(5, [9, 4, 7, 7, 3]), data_of(2, [4, 3], seed=1)
    first, last = one.split(2)
    assert (len(one), len(first), len(last)) == (5, 3, 2)
    for name in ("tokens", "hidden", "mask"):
        whole = getattr(one, name)
        assert torch.equal(getattr(first, name), whole[:3]) and torch.equal(getattr(last, name), whole[3:])
        joined, rest = getattr(DraftingData.join([other, one]), name), getattr(other, name)
        assert torch.equal(joined[2:], whole) and torch.equal(joined[:2, :4], rest) and not joined[:2, 4:].any()
    for held_out in (0, 5):
        with pytest.raises(ValueError, match=f"held_out must be between 1 and 4, got {held_out}"):
            one.split(held_out)


def test_data_is_saved_however_it_lies_in_memory(tmp_path):
    data = data_of(3, [5, 4, 5])
    turned = DraftingData(data.tokens, data.hidden.transpose(0, 1).contiguous().transpose(0, 1), data.mask)
    assert not turned.hidden.is_contiguous()
    turned.save(tmp_path / "data")
    again = DraftingData.load(tmp_path / "data")
    assert all(torch.equal(getattr(again, name), getattr(data, name)) for name in ("tokens", "hidden", "mask"))
    assert [len(part) for part in again.split(1)] == [2, 1]


def test_frequent_tokens_are_those_met_most_often_as_labels():
    tokens = torch.tensor([[9, 5, 3, 9, 9], [5, 3, 1, 5, 9]])
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()  # 5, 3, 5, 3, 1, 5
    data = DraftingData(tokens, torch.zeros(2, 5, 4), mask)
    wanted = {1: [5], 2: [3, 5], 3: [1, 3, 5], 5: [0, 1, 2, 3, 5], 12: list(range(12))}
    assert {count: data.frequent_tokens(count).tolist() for count in wanted} == wanted


def test_states_are_collected_in_batches_that_are_counted():
    model = make_model(dtype=torch.float32)
    written = [([1] * (n % 3), list(range(2, 3 + n))) for n in (4, 1, 6, 2, 3)]
    done = []
    one, other = collect(model, written, batch_size=2, progress=done.append), collect(model, written)
    assert done == [2, 2, 1]
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)
    for row, (context, answer) in enumerate(written):
        read = slice(len(context) + len(answer))
        torch.testing.assert_close(one.hidden[row, read], other.hidden[row, read], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no answer text to train on"):
        collect(model, [([1, 2], []), ([3], [])])


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 5, 7, 20, 33])])
def test_rank_accuracy_counts_the_text_that_came(vocabulary):
    model = make_model(dtype=torch.float32)
    said = generate(model, torch.arange(9)[:, None], max_new_tokens=12, temperature=2.0, eos_token_id=[],
                    generator=torch.Generator().manual_seed(0)).new_tokens  # fmt: skip
    data = collect(model, [([1], text[: 4 + row]) for row, text in enumerate(said)])
    drafter = scramble(Hydra.from_target(model, heads=2, tree=[(0,)], vocabulary=vocabulary))
    words = torch.arange(40) if vocabulary is None else vocabulary
    ranks = min(8, len(words))
    hits, seen = torch.zeros(2, ranks), [0, 0]
    for depth, prediction in enumerate(drafter.predictions(Target(model), data.tokens, data.hidden, data.mask)):
        for logits, label in zip(prediction.logits, prediction.labels, strict=True):
            hits[depth] += words[logits.topk(ranks).indices] == label
            seen[depth] += 1
    assert seen[0] > seen[1] > 0
    expected = (hits / torch.tensor(seen)[:, None]).double()
    for batch_size in (4, 9):
        found = rank_accuracy(drafter, model, data, ranks=8, batch_size=batch_size)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    greedy = fit_tree(drafter, model, data, nodes=3, ranks=2)
    assert torch.equal(greedy, rank_accuracy(drafter, model, data, ranks=2, greedy=True)) and len(drafter.tree) == 4
    assert torch.equal(fit_tree(drafter, model, data, nodes=3, ranks=2, greedy=False), found[:, :2])


def test_noise_and_dropout_are_for_training_alone_and_of_their_size():
    model = make_model()
    tokens = torch.randint(40, (8, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[-1]
    batch = (Target(model), tokens, hidden, torch.ones_like(tokens, dtype=torch.bool))
    drafter = scramble(Hydra.from_target(model, heads=1, tree=[(0,)], noise=3.0))
    read = []
    hook = drafter.heads[0].register_forward_hook(lambda module, args, output: read.append(args[0]))
    for training in (False, True):
        drafter.train(training)
        list(drafter.predictions(*batch))
    hook.remove()
    shift = (read[1] - read[0]).detach()
    # Both ways, up to alpha / sqrt(length * d), on the state and on the embedding.
    bound = 3.0 / math.sqrt(20 * 16)
    for part in shift.split(16, dim=-1):
        assert 0.98 * bound < float(part.abs().max()) <= bound and abs(float(part.mean())) < 0.05 * bound
    torch.manual_seed(0)
    drafter = scramble(Medusa.from_target(model, heads=1, tree=[(0,)], layers=2, dropout=0.25)).train()
    seen = []
    drafter.heads[0].blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    list(drafter.predictions(*batch))
    list(drafter.eval().predictions(*batch))
    dropped = seen[0] == 0
    assert 0.2 < float(dropped.double().mean()) < 0.3 and not (seen[1] == 0).any()
    torch.testing.assert_close(seen[0][~dropped], seen[1][~dropped] / 0.75)


class Letters:
    """A tokenizer without a template; texts begin with 1, and 0 ends them."""

    eos_token_id, bos_token_id, chat_template = 0, 1, None

    def encode(self, text, **options):
        return [5 if letter == "\n" else ord(letter) - 96 for letter in text]


def test_written_text_is_counted_as_it_comes_and_drawn_with_the_settings_given(monkeypatch):
    model, counted, asked = make_model(dtype=torch.float32), [], []

    def watched(model, ids, **options):
        asked.append((ids.tolist(), options))
        return generate(model, ids, **options)

    def streamed(model, ids, **options):
        asked.append((ids.tolist(), options))
        return stream(model, ids, **options)

    monkeypatch.setattr("paperworks.decoding.training.generate", watched)
    monkeypatch.setattr("paperworks.decoding.training.stream", streamed)
    generator = torch.Generator().manual_seed(0)
    pairs = self_written(
        model, Letters(), tokens=20, answer_tokens=5, question_tokens=3, temperature=0.4, question_temperature=0.6,
        question_top_k=7, examples=["ab", "cd", "ef", "gh"], batch_size=2, generator=generator, progress=counted.append,
    )  # fmt: skip
    lengths = [len(answer) for _, answer in pairs]
    # Token by token of both answers.
    assert (
        max(counted) == 2
        and sum(counted) == sum(lengths)
        and len(counted) == sum(max(lengths[first : first + 2]) for first in range(0, len(pairs), 2))
    )
    assert sum(lengths[:-2]) < 20 <= sum(lengths)
    for (ids, question), (_, answer) in zip(asked[::2], asked[1::2], strict=True):
        # Three examples of the four, each once.
        assert all(len({tuple(row[1 + 3 * place : 3 + 3 * place]) for place in range(3)}) == 3 for row in ids)
        assert all(row[0] == 1 and row[3::3] == [5, 5, 5] and len(row) == 10 for row in ids)
        assert (question["temperature"], question["top_k"], question["max_new_tokens"]) == (0.6, 7, 3)
        assert (answer["sampling"], answer["max_new_tokens"]) == (Sampling(0.4), 5)
        assert question["generator"] is answer["generator"] is generator
    assert len({tuple(row) for ids, _ in asked[::2] for row in ids}) > 1
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        self_written(model, Letters(), tokens=0)
