"""What every drafter of the room keeps to."""

from __future__ import annotations

import copy

import pytest
import torch

from paperworks.decoding import (
    ClassifierFreeGuidance,
    Committed,
    ConditionalBeamSearch,
    Drafter,
    DynamicInference,
    EntropyAdaptiveDecoding,
    EntropySwitch,
    Exact,
    Greedy,
    HiddenStateOptimization,
    NextBlockPrediction,
    NGramModel,
    RecursiveSpeculation,
    RelaxedAcceptance,
    Sampling,
    SuperposedDecoding,
    Target,
    TemporalFusion,
    TokenTree,
    TreeCache,
    Typical,
    collect,
    generate,
    nearest_codes,
    train_drafter,
)
from tests.decoding.conftest import (
    CONTRACT,
    DRAFTERS,
    distance,
    enumerate_law,
    make_model,
    model_law,
    output,
    scramble,
)


@pytest.mark.parametrize("family", CONTRACT)
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_is_the_targets_whatever_the_weights(family, name, prompt):
    model = make_model(family)
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    drafter = scramble(DRAFTERS[name](model))
    result = generate(model, prompt, drafter=drafter, max_new_tokens=24, eos_token_id=[])
    assert result.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", DRAFTERS)
def test_output_law_is_the_targets_by_enumeration(name, monkeypatch):
    model = make_model(vocab=3)
    prompt = torch.tensor([[0, 2]])
    drafter = scramble(DRAFTERS[name](model))
    if isinstance(drafter, RecursiveSpeculation):
        pytest.skip("its trees are drawn at random; test_recursive_speculation enumerates those draws too")
    if name == "hydra":
        drafter.tree = type(drafter.tree)([(0,), (1,), (0, 0), (1, 1)])
    law = enumerate_law(lambda: output(model, prompt, drafter=drafter, max_new_tokens=3, temperature=1.0), monkeypatch)
    assert distance(law, model_law(model, prompt, 3)) < 1e-12


def test_typical_acceptance_is_not_lossless(monkeypatch):
    model = make_model(vocab=3)
    prompt = torch.tensor([[0, 2]])
    drafter = scramble(DRAFTERS["hydra"](model))
    law = enumerate_law(
        lambda: output(model, prompt, drafter=drafter, acceptance=Typical(), max_new_tokens=3, temperature=1.0),
        monkeypatch,
    )
    assert distance(law, model_law(model, prompt, 3)) > 1e-2


@pytest.mark.parametrize("family", CONTRACT)
@pytest.mark.parametrize("name", DRAFTERS)
def test_rows_of_a_padded_batch_equal_prompts_one_by_one(family, name):
    model = make_model(family)
    drafter = scramble(DRAFTERS[name](model))
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 8, 7]]
    for side in ("left", "right"):
        pads = [[0] * (8 - len(prompt)) for prompt in prompts]
        joined = [pad + prompt if side == "left" else prompt + pad for pad, prompt in zip(pads, prompts, strict=True)]
        ones = [[0] * len(pad) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(pad)
                for pad, p in zip(pads, prompts, strict=True)]  # fmt: skip
        batch = generate(
            model, torch.tensor(joined), attention_mask=torch.tensor(ones), drafter=drafter, max_new_tokens=12,
            eos_token_id=[],
        )  # fmt: skip
        alone = [list(output(model, torch.tensor([prompt]), max_new_tokens=12)) for prompt in prompts]
        assert batch.new_tokens == alone


@pytest.mark.parametrize("name", DRAFTERS)
def test_saved_and_loaded_drafter_drafts_the_same(name, model, prompt, tmp_path):
    drafter = scramble(DRAFTERS[name](model))
    drafter.save_pretrained(tmp_path / "saved")
    again = Drafter.from_pretrained(tmp_path / "saved", model)
    assert type(again) is type(drafter)
    one, other = (generate(model, prompt, drafter=d, max_new_tokens=16, eos_token_id=[]) for d in (drafter, again))
    assert one.statistics.emitted == other.statistics.emitted
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", DRAFTERS)
def test_same_seed_same_samples(name, model, prompt):
    drafter = scramble(DRAFTERS[name](model))
    texts = [
        output(
            model,
            prompt,
            drafter=drafter,
            max_new_tokens=20,
            temperature=5.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("family", CONTRACT)
def test_cache_after_a_rejected_branch_equals_one_built_from_scratch(family, prompt):
    model = make_model(family)
    drafter = scramble(DRAFTERS["hydra"](model))
    target = Target(model)
    cache = TreeCache(target.config, 1)
    with torch.inference_mode():
        logits, _ = target.prefill(list(prompt), cache)
        tree = drafter.tree.tree(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]))
        target.verify(tree, cache)
        cache.commit(torch.tensor([[0, 2, 5]]), [3])
        tokens = torch.cat([prompt, tree.tokens[:, [0, 2, 5]]], dim=1)
        fresh = TreeCache(target.config, 1)
        target.prefill(list(tokens), fresh)
    assert cache.lengths == fresh.lengths == [8]
    for one, other in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(one.keys[:, :, :8], other.keys[:, :, :8], atol=1e-10, rtol=0)
        torch.testing.assert_close(one.values[:, :, :8], other.values[:, :, :8], atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONTRACT)
def test_tree_attention_equals_every_path_run_alone(family, implementation):
    model = make_model(family, implementation=implementation)
    target = Target(model)
    # transformers' eager attention normalises in float32 whatever the model's type; CodeGen has that alone.
    close = {"atol": 1e-5 if implementation == "eager" or family == "codegen" else 1e-9, "rtol": 0}
    shape = DRAFTERS["hydra"](model).tree
    prompts = [torch.tensor([3, 1, 2, 0, 2, 9, 9, 4]), torch.tensor([5, 6])]
    cache = TreeCache(target.config, 2)
    tokens = torch.randint(40, (2, len(shape)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        target.prefill(prompts, cache)
        tree = shape.tree(tokens)
        logits, hidden = target.verify(tree, cache)
        for row, prompt in enumerate(prompts):
            for node in range(len(shape)):
                path = tree.ancestors[row, node].nonzero()[:, 0]
                ids = torch.cat([prompt, tokens[row, path]])[None]
                alone = model(ids, output_hidden_states=True)
                torch.testing.assert_close(logits[row, node], alone.logits[0, -1], **close)
                torch.testing.assert_close(hidden[row, node], alone.hidden_states[-1][0, -1], **close)


def test_exact_acceptance_of_a_random_model_passes_chi_square(model, prompt):
    """The compiled path too: 3,000 two-token samples against the model's own law, ends lumped."""
    model = make_model(vocab=4)
    drafter = scramble(DRAFTERS["hydra"](model))
    batch = prompt.expand(3000, -1)
    samples = generate(
        model, batch, drafter=drafter, acceptance=Exact(), max_new_tokens=2, temperature=1.0, eos_token_id=[],
        generator=torch.Generator().manual_seed(0),
    ).new_tokens  # fmt: skip
    law = model_law(model, prompt, 2)
    counts = {key: 0 for key in law}
    for sample in samples:
        counts[tuple(sample)] += 1
    statistic = sum((counts[key] - 3000 * p) ** 2 / (3000 * p) for key, p in law.items())
    assert statistic < 37.7  # 99.9 % point for 15 degrees of freedom


# Half precision: not only without an error, but with the effect that the method has in float32.

HALF = [torch.bfloat16, torch.float16]
TEXTS = torch.randint(40, (6, 24), generator=torch.Generator().manual_seed(4))


def _rule(logits, acceptance):
    """What an acceptance makes of 200 trees at random, at these logits."""
    tree = TokenTree(TEXTS[:, :6].repeat(34, 1)[:200], torch.tensor([-1, 0, 0, 1, 1, 2]).expand(200, -1))
    accepted = acceptance(tree, logits, Sampling(temperature=1.0), torch.Generator().manual_seed(1))
    return torch.cat([accepted.lengths, accepted.next_tokens]).double()


def _logits(model):
    with torch.no_grad():
        hidden = torch.randn(200, 6, 16, generator=torch.Generator().manual_seed(3)).to(model.dtype)
        return Target(model).logits(hidden)


def _by(acceptance):
    """What comes of the rule, or of another one in its place."""

    def measured(model, use):
        return _rule(_logits(model) / 4, acceptance=acceptance if use else Greedy())

    return measured


def _attribute(hidden, tokens):
    return torch.nn.functional.logsigmoid(3 * hidden.float().mean(-1))


def _search(model, use):
    search = ConditionalBeamSearch(model, _attribute, num_beams=4, weight=3.0 if use else 0.0)
    found = search.generate(TEXTS[:, :5], max_new_tokens=4, eos_token_id=[])
    return (found.log_likelihoods.double() + 3 * found.log_attributes.double()).amax(1)


def _superposed(model, use):
    options = {"drafts": 3, "temperature": 1.0, "top_tokens": 9}
    ngram = NGramModel().fit([list(range(40))]) if use else None
    return (
        SuperposedDecoding(model, ngram=ngram, **options)
        .generate(TEXTS[:, :5], max_new_tokens=3, eos_token_id=[])
        .scores
    )


def _guided(model, use):
    with torch.no_grad():
        steered = ClassifierFreeGuidance(model, condition=[5, 6, 7], null=2, scale=2.5 if use else 1.0)
        return steered(torch.cat([torch.full((6, 1), 5), TEXTS], 1)).logits.double().softmax(-1)


def _entropies(model, use):
    flat = copy.deepcopy(model)
    flat.lm_head.weight.data /= 8
    switch = EntropySwitch(3.0 if use else float("inf"), min_stay=2)
    decoding = EntropyAdaptiveDecoding(flat, model, switch)
    return torch.tensor(
        [decoding.generate(row[None], max_new_tokens=8, eos_token_id=[]).entropies for row in TEXTS[:, :6]]
    )


def _learning(model, use):
    reader = HiddenStateOptimization(model, steps=int(use), learning_rate=0.02, window=4)
    return reader.log_likelihood(torch.tensor([[1, 2, 3, 4] * 12, [9, 8, 9, 8] * 12])).double()


def _leaving(model, use):
    """Which layer each position leaves, by a controller and heads that have been trained, or by chance."""
    dynamic = DynamicInference(model, head="tuned")
    if use:
        order = {"generator": torch.Generator().manual_seed(0)}
        dynamic.fit_heads(TEXTS, epochs=20, learning_rate=1e-2, batch_size=6, **order)
        dynamic.fit_controller(TEXTS, epochs=20, learning_rate=1e-2, batch_size=6, **order)
    reading = dynamic.read(TEXTS)
    return reading.probabilities.double()


def _blocks(model, use):
    torch.manual_seed(0)
    network = NextBlockPrediction(vocab_size=5, grid=(2, 2, 4), block=(1, 2, 4), hidden_size=16, heads=2).eval()
    for parameter in network.parameters():
        parameter.data *= 4 if use else 1
    clips = torch.randint(5, (8, 2, 2, 4), generator=torch.Generator().manual_seed(1))
    return network.to(model.dtype).log_prob(clips).detach().double()


EFFECTS = {
    "greedy": lambda model, use: _rule(_logits(model) / 4, acceptance=Greedy() if use else Typical(0.5, 1.0)),
    "typical": _by(Typical(0.02, 0.1)),
    "exact": _by(Exact()),
    "relaxed": _by(RelaxedAcceptance(nearest_codes(torch.arange(40.0)[:, None]), delta=0.6)),
    "conditional beam search": _search,
    "superposed": _superposed,
    "guidance": _guided,
    "entropy-adaptive": _entropies,
    "hidden states": _learning,
    "dynamic": _leaving,
    "next block": _blocks,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", EFFECTS)
def test_the_effect_in_half_precision_is_that_in_float32(name, dtype):
    full, without = (EFFECTS[name](make_model(dtype=torch.float32), use) for use in (True, False))
    half = EFFECTS[name](make_model(dtype=dtype), True)
    assert bool(half.isfinite().all())
    effect, error = (full - without).abs().mean(), (full - half).abs().mean()
    assert effect > 0.005 and error < (0.35 if dtype == torch.bfloat16 else 0.1) * effect


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", DRAFTERS)
def test_what_is_drafted_in_half_precision_is_what_float32_drafts(name, dtype):
    shares = []
    models = [make_model(dtype=kind) for kind in (torch.float32, dtype)]
    drafter = scramble(DRAFTERS[name](models[0]).float())
    if name == "fspad":
        # What it feeds on grows with each level, with weights as these beyond what float16 holds.
        drafter.sampling.down.weight.data *= 0.1
    drafters = [drafter, copy.deepcopy(drafter).to(dtype)]
    for row in TEXTS:
        trees = []
        for model, drafter in zip(models, drafters, strict=True):
            target, cache = Target(model), TreeCache(model.config, 1)
            with torch.inference_mode():
                _, hidden = target.prefill([row], cache)
                state = drafter.start(target, 1, Sampling())
                tree = drafter.propose(state, Committed(row[None], hidden, [24]), row[:1])
            paths = tree.ancestors[0]
            trees.append({tuple(tree.tokens[0, path].tolist()) for path in paths})
        shares.append(len(trees[0] & trees[1]) / len(trees[0]))
    assert sum(shares) / len(shares) > (0.6 if dtype == torch.bfloat16 else 0.75)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["hydra", "hydra++", "chimera", "fspad"])
def test_a_drafter_learns_in_half_precision_what_it_learns_in_float32(name, dtype):
    gains, first = {}, {}
    for kind in (torch.float32, dtype):
        model = make_model(dtype=kind)
        texts = generate(model, TEXTS[:, :3], max_new_tokens=20, eos_token_id=[]).new_tokens
        data = collect(model, [([], text) for text in texts])
        drafter = DRAFTERS[name](model)
        losses = train_drafter(drafter, model, data, epochs=8, batch_size=2, learning_rate=1e-2,
                               generator=torch.Generator().manual_seed(0))  # fmt: skip
        assert all(parameter.dtype == kind for parameter in drafter.parameters())
        first[kind], gains[kind] = losses[0], losses[0] - sum(losses[-3:]) / 3
    assert gains[dtype] > 0.6 * gains[torch.float32] > 0


@pytest.mark.parametrize("dtype", HALF)
def test_requests_served_in_half_precision_have_the_texts_of_their_own(dtype):
    model = make_model(dtype=dtype)
    server = TemporalFusion(model, max_concurrency=3, max_seq_len=40)
    handles = [server.submit(row[:6], max_new_tokens=12, eos_token_id=[]) for row in TEXTS]
    # Rounding differs with the number of rows, and may tip the choice of a token that was as good as another.
    same = [
        tuple(handle.result()) == output(model, row[None, :6], max_new_tokens=12)
        for row, handle in zip(TEXTS, handles, strict=True)
    ]
    assert sum(same) >= 4
