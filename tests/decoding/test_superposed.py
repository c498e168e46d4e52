"""Superposed decoding and its n-gram model: what must be true of them, against brute force."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from paperworks.decoding.ngram import NGramModel
from paperworks.decoding.superposed import SuperposedDecoding, superpose
from tests.decoding.conftest import FAMILIES, make_model

WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)


def random_documents(vocab=6, count=12, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (count, length), generator=generator).tolist()


def oracle(model, laws):
    """Let the model answer its calls with the given logits, (steps, vocab), in order."""
    calls = iter(laws)

    def answer(module, args, output):
        output.logits = next(calls).expand_as(output.logits)
        return output

    return model.register_forward_hook(answer)


def watched(model):
    """Inputs and outputs of the model's calls, as they come."""
    seen = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True)
    return seen


def linear_model(vocab=12):
    """A model whose logits are linear in the current embedding: its layer adds nothing, its norm does nothing."""
    model = make_model(vocab=vocab)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.model.norm = torch.nn.Identity()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_1_one_draft_without_ngrams_is_greedy_decoding(family, prompt):
    model = make_model(family)
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    drafts = SuperposedDecoding(model, drafts=1).generate(prompt, max_new_tokens=24, eos_token_id=[])
    assert drafts.sequences[:, 0].tolist() == expected.tolist()


def test_2_equal_drafts_superpose_to_the_tokens_embedding():
    embedding = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[-0.3, -900.0, -2.0], [-1e9, -1e9, -1e9]], dtype=torch.float64)
    torch.testing.assert_close(superpose(embedding[:, None].expand(-1, 3, -1), scores), embedding, atol=1e-6, rtol=0)
    # The weights themselves, by one axis a draft: they sum to 1, and two drafts with one token share its axis.
    weights = superpose(torch.eye(3).expand(2, -1, -1), scores)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    expected = [
        [math.exp(s - max(row)) / sum(math.exp(t - max(row)) for t in row) for s in row] for row in scores.tolist()
    ]
    torch.testing.assert_close(weights, torch.tensor(expected))
    joined = superpose(torch.eye(3)[[0, 1, 0]].expand(2, -1, -1), scores)
    torch.testing.assert_close(joined[:, 0], weights[:, 0] + weights[:, 2])


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_3_one_pass_a_step_whatever_the_number_of_drafts(drafts, model, prompt):
    seen = watched(model)
    result = SuperposedDecoding(model, drafts=drafts).generate(prompt, max_new_tokens=7, eos_token_id=[])
    assert len(seen) == 7 == result.target_calls
    assert seen[0][0]["input_ids"].shape == (1, 5)
    assert all(kwargs["inputs_embeds"].shape == (1, 1, 16) for kwargs, _ in seen[1:])
    # The last tokens chosen are never read: there is a key for every other position, once.
    assert seen[0][0]["past_key_values"].lengths == [5 + 7 - 1]


def test_4_with_a_linear_model_superposed_logits_are_the_mean_of_the_drafts_logits():
    model, prompt = linear_model(), torch.tensor([[3, 1]])
    decoding = SuperposedDecoding(model, temperature=0.5)
    seen = watched(model)
    decoding.generate(prompt, max_new_tokens=6, eos_token_id=[])
    calls = [output.logits[0, -1] for _, output in seen]
    largest = []
    for step in range(1, 6):
        drafts = decoding.generate(prompt, max_new_tokens=step, eos_token_id=[])
        weights = drafts.scores[0].softmax(-1)
        with torch.no_grad():
            logits = model.lm_head(model.model.embed_tokens(drafts.sequences[0, :, -1]))
        torch.testing.assert_close(calls[step], weights @ logits)
        largest.append(float(weights.max()))
    assert min(largest) < 0.9  # the mean is one of several drafts


def test_4_a_nonlinear_layer_breaks_the_identity(prompt):
    model, tokens = make_model(), torch.tensor([4, 9, 17])
    with torch.no_grad():
        past = model.model.embed_tokens(prompt)
        newest = model.model.embed_tokens(tokens)
        mixed = superpose(newest[None], torch.zeros(1, 3, dtype=torch.float64))
        rows = torch.cat([newest, mixed])[:, None]
        states = model.model(inputs_embeds=torch.cat([past.expand(4, -1, -1), rows], 1)).last_hidden_state[:, -1]
    alike = torch.cosine_similarity(states[3], states[:3].mean(0), dim=0)
    assert 0.7 < float(alike) < 0.999


def beam(laws, prompt, documents, *, k, m, temperature, alpha, penalty, end):
    """Superposed decoding's bookkeeping token by token, with lists and dictionaries."""
    counts = Counter(
        tuple(row[i : i + n]) for row in documents or [] for n in range(1, 7) for i in range(len(row) - n + 1)
    )
    followed = Counter()
    for ngram, count in counts.items():
        followed[ngram[:-1]] += count
    running, finished = [((), 0.0)], []
    for law in laws:
        best = sorted(range(len(law)), key=lambda v: -law[v])[:m]
        total = sum(math.exp(law[v] / temperature) for v in best)
        log_p = {v: law[v] / temperature - math.log(total) for v in best}
        candidates = []
        for draft, score in running:
            text, chance = (*prompt, *draft), dict.fromkeys(best, 0.0)
            for order in range(1, min(5, len(text)) + 1):
                if followed[text[-order:]]:
                    for v in best:
                        chance[v] += WEIGHTS[order - 1] * counts[(*text[-order:], v)] / followed[text[-order:]]
            for v in best:
                if documents is None:
                    candidates.append(((*draft, v), score + log_p[v]))
                elif not any(chance.values()):
                    candidates.append(((*draft, v), score + (1 - alpha) * log_p[v] - penalty))
                elif chance[v]:
                    joined = (1 - alpha) * log_p[v] + alpha * math.log(chance[v])
                    candidates.append(((*draft, v), score + joined))
        candidates = sorted(candidates, key=lambda pair: -pair[1])[: 2 * k]
        finished += [pair for pair in candidates if pair[0][-1] == end]
        finished = sorted(finished, key=lambda pair: -pair[1])[:k]
        running = [pair for pair in candidates if pair[0][-1] != end][:k]
    return sorted(running + finished, key=lambda pair: -pair[1] / len(pair[0]))[:k]


@pytest.mark.parametrize("alpha", [None, 0.2, 0.54, 1.0])
@pytest.mark.parametrize("end", [None, 1])
def test_5_drafts_and_scores_are_those_of_brute_force(alpha, end):
    model, prompt, ended, alone, short = make_model(vocab=6), (2, 0, 5), 0, 0, 0
    options = {"temperature": 0.7, "penalty": 3.0}
    for seed in range(25):
        laws = 3 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        documents = None if alpha is None else random_documents(count=5, length=2 + seed % 6, seed=seed)
        expected = beam(laws.tolist(), prompt, documents, k=3, m=5, alpha=alpha, end=end, **options)
        decoding = SuperposedDecoding(
            model, drafts=3, top_tokens=5, alpha=alpha or 0.5,
            ngram=None if documents is None else NGramModel().fit(documents), **options,
        )  # fmt: skip
        handle = oracle(model, laws)
        drafts = decoding.generate(torch.tensor(prompt), max_new_tokens=4, eos_token_id=[] if end is None else end)
        handle.remove()
        kept = drafts.scores[0].isfinite()
        assert drafts.new_tokens[0][: int(kept.sum())] == [list(draft) for draft, _ in expected]
        assert drafts.scores[0, kept].tolist() == pytest.approx([score for _, score in expected])
        assert drafts.perplexities[0, kept].tolist() == pytest.approx([math.exp(-s / len(d)) for d, s in expected])
        assert drafts.finished[0, kept].tolist() == [draft[-1] == end for draft, _ in expected]
        assert len(set(map(tuple, drafts.new_tokens[0]))) == 3
        ended += int(drafts.finished.sum())
        alone += int(bool((drafts.scores < -3).any()))
        short += int((~kept).sum())
    # All branches are met: ends, penalties, and fewer drafts than asked for.
    assert (ended > 5) == (end is not None)
    assert alpha is None or (alone and short)


def test_6_without_ngrams_drafts_are_the_best_of_the_outer_sum(prompt):
    model = make_model(vocab=9)
    laws = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    oracle(model, laws)
    drafts = SuperposedDecoding(model, drafts=3, temperature=1.0).generate(prompt, max_new_tokens=2, eos_token_id=[])
    first, second = laws.log_softmax(-1)
    sums = first.topk(3).values[:, None] + second
    scores, places = sums.flatten().topk(3)
    pairs = [[int(first.topk(3).indices[place // 9]), int(place % 9)] for place in places]
    assert drafts.new_tokens == [pairs]
    torch.testing.assert_close(drafts.scores[0], scores)


def test_6_ngrams_join_only_what_the_corpus_joined():
    a, b, c, d = 1, 2, 3, 4
    model = make_model(vocab=6)
    laws = torch.full((2, 6), -9.0, dtype=torch.float64)
    laws[0, [a, c]] = torch.tensor([1.0, 0.9], dtype=torch.float64)
    laws[1, [b, d]] = torch.tensor([1.0, 0.2], dtype=torch.float64)
    texts = {}
    for ngram in (None, NGramModel().fit([[a, b], [c, d]])):
        handle = oracle(model, laws)
        decoding = SuperposedDecoding(model, drafts=2, top_tokens=2, temperature=1.0, ngram=ngram)
        texts[ngram is None] = decoding.generate(torch.tensor([[0]]), max_new_tokens=2, eos_token_id=[]).new_tokens[0]
        handle.remove()
    assert texts[False] == [[a, b], [c, d]]
    assert texts[True] == [[a, b], [c, b]]


@pytest.mark.parametrize("max_order", [2, 4, 6])
def test_7_counts_are_those_of_a_dictionary(max_order):
    documents = [*random_documents(vocab=4, count=6, length=15), [3], [], [1, 2]]
    ngram = NGramModel(max_order).fit(documents)
    counts = Counter(
        tuple(row[i : i + n]) for row in documents for n in range(2, max_order + 1) for i in range(len(row) - n + 1)
    )
    followed = Counter()
    for key, count in counts.items():
        followed[key[:-1]] += count
    for context in followed:
        shares = [ngram.prob(context, token) for token in range(4)]
        assert shares == pytest.approx([counts[(*context, token)] / followed[context] for token in range(4)])
        assert sum(shares) == pytest.approx(1)
    unseen = [tuple(row) for row in random_documents(vocab=4, count=200, length=max_order - 1, seed=1)]
    unseen = [context for context in unseen if context not in followed]
    assert (max_order == 2) == (not unseen)
    assert all(ngram.prob(context, token) is None for context in unseen for token in range(4))
    assert ngram.prob([1], 77) == 0 and ngram.prob([77], 1) is None


def test_7_no_ngram_reaches_over_the_end_of_a_document():
    ngram = NGramModel(3).fit([[1, 2], [3, 1]])
    assert ngram.prob([2], 3) is None and ngram.prob([1], 2) == 1 and ngram.prob([1, 2], 3) is None


def test_all_orders_of_a_batch_at_once():
    ngram = NGramModel(5).fit(random_documents(count=30))
    contexts = torch.tensor([[0, 1, 2, 3, 4, 5], [-1, -1, -1, 5, 0, 1], [-1, -1, -1, -1, -1, 2]], dtype=torch.int32)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5]] * 3, dtype=torch.int32)
    found = ngram.probabilities(contexts, tokens)
    assert found.shape == (3, 4, 6)
    for row, context in enumerate([[2, 3, 4, 5], [5, 0, 1], [2]]):
        for order in range(1, 5):
            for token in range(6):
                one = ngram.prob(context[-order:], token) if order <= len(context) else None
                assert found[row, order - 1, token].isnan() if one is None else found[row, order - 1, token] == one
    shorter = ngram.probabilities(contexts[:, -2:], tokens)
    torch.testing.assert_close(shorter, found[:, :2], equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_8_rows_of_a_padded_batch_equal_prompts_one_by_one(family, side):
    model = make_model(family)
    decoding = SuperposedDecoding(
        model, temperature=1.0, ngram=NGramModel().fit(random_documents(vocab=40, count=400, length=12))
    )
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 8, 7]]
    pads = [[0] * (8 - len(prompt)) for prompt in prompts]
    joined = [pad + prompt if side == "left" else prompt + pad for pad, prompt in zip(pads, prompts, strict=True)]
    ones = [[0] * len(pad) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(pad)
            for pad, p in zip(pads, prompts, strict=True)]  # fmt: skip
    batch = {"input_ids": torch.tensor(joined), "attention_mask": torch.tensor(ones)}
    options = {"max_new_tokens": 9, "pad_token_id": 39}
    # A token that ends some drafts and not others.
    tried = ((end, decoding.generate(**batch, eos_token_id=end, **options)) for end in range(40))
    end, batch = next((end, drafts) for end, drafts in tried if 0 < int(drafts.finished.sum()) < 9)
    for row, prompt in enumerate(prompts):
        alone = decoding.generate(torch.tensor(prompt), eos_token_id=end, **options)
        assert batch.new_tokens[row] == alone.new_tokens[0]
        torch.testing.assert_close(batch.scores[row], alone.scores[0])
        for draft, sequence in zip(batch.new_tokens[row], batch.sequences[row].tolist(), strict=True):
            assert sequence == joined[row] + draft + [39] * (9 - len(draft))


def test_ngrams_change_what_later_steps_read(model, prompt):
    """The superposition follows the interpolated scores: with other n-grams the model reads another mix."""
    reads = []
    for ngram in (None, NGramModel().fit(random_documents(vocab=40, count=400))):
        seen = watched(model)
        SuperposedDecoding(model, temperature=1.0, ngram=ngram).generate(prompt, max_new_tokens=3, eos_token_id=[])
        reads.append(seen[1][0]["inputs_embeds"])
    assert not torch.allclose(*reads)


def test_saved_and_loaded_ngrams_say_the_same(tmp_path):
    ngram = NGramModel(4).fit(random_documents())
    ngram.save_pretrained(tmp_path / "saved")
    again = NGramModel.from_pretrained(tmp_path / "saved")
    contexts, tokens = torch.tensor(random_documents(count=5, length=3, seed=2)), torch.arange(6).expand(5, -1)
    torch.testing.assert_close(
        again.probabilities(contexts, tokens), ngram.probabilities(contexts, tokens), equal_nan=True, atol=0, rtol=0
    )
    assert (again.max_order, again.vocab_size) == (4, 6)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"rubbish")
    for folder in ("saved", "nowhere"):
        with pytest.raises(ValueError, match="holds no saved n-gram model"):
            NGramModel.from_pretrained(tmp_path / folder)


def test_half_precision_serves(prompt):
    model = make_model(dtype=torch.bfloat16)
    drafts = SuperposedDecoding(model).generate(prompt.int(), eos_token_id=[])
    assert drafts.sequences.dtype == torch.int32 and drafts.sequences.shape == (1, 3, 15)
    assert drafts.scores.dtype == torch.float64 and bool((drafts.perplexities[0].diff() >= 0).all())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"drafts": 0}, "drafts must be at least 1"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"alpha": 0.0}, "leave ngram out"),
        ({"alpha": 1.1}, r"within \(0, 1\]"),
        ({"penalty": -1.0}, "penalty"),
        ({"top_tokens": 2}, r"between drafts \(3\)"),
        ({"top_tokens": 41}, r"the vocabulary \(40\)"),
        ({"weights": (1.0,) * 6, "ngram": NGramModel().fit([[1, 2]])}, "max_order, got 6"),
        ({"weights": ()}, "at least one"),
        ({"weights": (-1.0,)}, "finite and not negative"),
        ({"weights": (float("nan"),)}, "finite and not negative"),
        ({"ngram": NGramModel().fit([[1, 40]])}, "up to 40, beyond the model's 40"),
        ({"ngram": NGramModel()}, "call fit"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 99}, "context"),
        ({"eos_token_id": [1, 2, 3, 4, 5, 6, 7]}, "top_tokens must be at least 10"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(options, words, model, prompt):
    call = {name: options.pop(name) for name in ("max_new_tokens", "eos_token_id") if name in options}
    prompt = options.pop("prompt", prompt)
    with pytest.raises(ValueError, match=words):
        SuperposedDecoding(model, **options).generate(prompt, **call)


def test_the_ends_of_what_is_allowed_are_allowed(model, prompt):
    for options in ({"penalty": 0.0}, {"alpha": 1.0}, {"drafts": 1}, {"top_tokens": 40}, {"weights": (0.0,)}):
        drafts = SuperposedDecoding(model, **options).generate(prompt, max_new_tokens=1, eos_token_id=[])
        assert drafts.sequences.shape == (1, options.get("drafts", 3), 6)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: NGramModel(1), ValueError, "at least 2"),
        (lambda: NGramModel().fit([]), ValueError, "nothing to count"),
        (lambda: NGramModel().fit([[1], [2]]), ValueError, "nothing to count"),
        (lambda: NGramModel().fit([[1, -100]]), ValueError, "must not be negative, got -100"),
        (lambda: NGramModel().fit([[1.5, 2.0]]), TypeError, "whole numbers"),
        (lambda: NGramModel().fit([torch.zeros(2, 3, dtype=torch.long)]), ValueError, r"shape \(2, 3\)"),
        (lambda: NGramModel().prob([1], 2), ValueError, "call fit"),
        (lambda: NGramModel(3).fit([[1, 2]]).prob([1, 2, 3], 2), ValueError, "1 to 2 tokens, got 3"),
        (lambda: NGramModel(3).fit([[1, 2]]).prob([], 2), ValueError, "1 to 2 tokens, got 0"),
        (
            lambda: NGramModel().fit([[1, 2]]).probabilities(torch.ones(2, 3), torch.ones(1, 3)),
            ValueError,
            "as many rows",
        ),
    ],
)
def test_bad_text_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
