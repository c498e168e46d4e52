"""The attribute classifier: labels, calibration against a grid, and laws that can be enumerated."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from paperworks.decoding import collect, generate
from paperworks.decoding.attribute_classifier import AttributeClassifier, _temperature, degeneracy
from paperworks.decoding.training import DraftingData
from tests.decoding.conftest import make_model, model_law


@pytest.mark.parametrize(
    "tokens, options, expected",
    [
        ([], {}, "empty"),
        ([0], {}, "empty"),
        ([5, 6, 0], {}, None),
        ([5, 6, 1], {}, None),  # either end token ends
        ([5, 6], {}, "unfinished"),
        ([5, 6, 5, 6, 5, 6, 5, 6, 5, 6], {}, "repetitive"),  # worse than merely unfinished
        ([5, 6, 7, 8, 5, 6, 7, 8, 0], {}, None),  # 1 of 5 sequences of four comes back: 0.2
        ([5, 6, 7, 8, 9, 5, 6, 7, 8, 0], {"repeated": 0.16}, "repetitive"),  # 1 of 6
        ([5, 6, 7, 8, 9, 5, 6, 7, 8, 0], {"repeated": 0.17}, None),
        ([5, 5, 0], {"ngram": 1}, "repetitive"),
        ([5, 6, 7, 0], {"lengths": (4, 9)}, "short"),
        ([5, 6, 7, 0], {"lengths": (1, 2)}, "long"),
        ([5, 6, 7, 0], {"lengths": (3, 3)}, None),
    ],
)
def test_what_is_wrong_with_a_text(tokens, options, expected):
    assert degeneracy(tokens, {0, 1}, **options) == expected


def sampled(model, count, tokens):
    """Texts sampled from the model, and whether token 1 is in them."""
    prompt = torch.tensor([[0, 2]])
    texts = generate(
        model, prompt.expand(count, -1), max_new_tokens=tokens, temperature=1.0, eos_token_id=[],
        generator=torch.Generator().manual_seed(1),
    ).new_tokens  # fmt: skip
    return collect(model, [([0, 2], text) for text in texts]), torch.tensor([1 in text for text in texts]), prompt


def test_prefixes_are_judged_as_the_law_of_the_model_has_it():
    """Three tokens, texts of three: p(a | prefix) by enumeration, for every prefix."""
    model = make_model(vocab=3)
    data, labels, prompt = sampled(model, 4000, 3)
    torch.manual_seed(0)
    classifier = AttributeClassifier.from_target(model, max_new_tokens=3)
    fit = classifier.fit(
        data, labels, learning_rate=3e-3, epochs=30, weight_decay=0.0, generator=torch.Generator().manual_seed(0)
    )
    assert fit.held_out_loss < 0.7 * fit.prior_loss
    law = model_law(model, prompt, 3)
    judged = 0
    prefixes = {text[:end] for text in law for end in (1, 2, 3)}
    for prefix in prefixes:
        texts = {text: chance for text, chance in law.items() if text[: len(prefix)] == prefix}
        mass = sum(texts.values())
        chance = sum(value for text, value in texts.items() if 1 in text) / mass
        ids = torch.cat([prompt, torch.tensor([prefix])], dim=1)
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][:, -1]
            said = float(classifier(hidden, ids[:, 2:]).exp())
        if mass > 0.05:  # rarer ones have too few samples to learn from
            assert said == pytest.approx(chance, abs=0.12), prefix
            judged += 1
    assert judged > 6


def test_temperature_is_the_best_of_a_grid():
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(2000, generator=generator)
    truth = (torch.rand(2000, generator=generator) < honest.sigmoid()).float()
    found = _temperature(3 * honest, truth)
    grid = [1 + step / 100 for step in range(500)]
    best = min(grid, key=lambda t: float(F.binary_cross_entropy_with_logits(3 * honest / t, truth)))
    assert found == pytest.approx(best, abs=0.02) and found == pytest.approx(3, abs=0.4)


def test_overfitted_classifier_is_cooled_until_it_is_no_worse_than_the_base_rate():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 2, 64, generator=generator)
    labels = torch.rand(40, generator=generator) < 0.5
    data = DraftingData(torch.zeros(40, 2, dtype=torch.long), hidden, torch.ones(40, 2, dtype=torch.bool))
    torch.manual_seed(0)
    classifier = AttributeClassifier(64, 2)
    fit = classifier.fit(data, labels, epochs=100, learning_rate=1e-2, generator=generator)
    assert fit.temperature > 3 and fit.losses[-1] < 0.05
    assert fit.held_out_loss < fit.prior_loss + 0.05


def test_temperature_divides_what_the_classifier_says_of_held_out_prefixes():
    torch.manual_seed(0)
    hidden, labels = torch.randn(40, 2, 64), torch.rand(40) < 0.5
    data = DraftingData(torch.zeros(40, 2, dtype=torch.long), hidden, torch.ones(40, 2, dtype=torch.bool))
    classifier = AttributeClassifier(64, 2)
    fit = classifier.fit(data, labels, epochs=100, learning_rate=1e-2, generator=torch.Generator().manual_seed(1))
    kept = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:8]
    with torch.no_grad():
        said = torch.stack(
            [classifier(hidden[kept, 0], torch.zeros(8, 1)), classifier(hidden[kept, 1], torch.zeros(8, 2))]
        )
    truth = labels[kept].expand(2, 8)
    loss = -torch.where(truth, said, (-said.expm1()).log()).mean()
    assert fit.temperature > 3 and float(loss) == pytest.approx(fit.held_out_loss, rel=1e-5)


@pytest.mark.parametrize("width", [0, 5])
def test_log_odds_are_of_the_normed_state_and_the_share_of_the_length(width):
    """By hand: (h - mean) / sd and tokens / max_new_tokens, through a linear map or one hidden layer of SiLU."""
    torch.manual_seed(0)
    classifier = AttributeClassifier(4, 8, width=width)
    classifier.temperature.fill_(2.0)
    hidden, tokens = 30 * torch.randn(3, 2, 4).double(), torch.zeros(3, 2, 6, dtype=torch.long)
    normed = (hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, correction=0, keepdim=True)
    read = torch.cat([normed, torch.full((3, 2, 1), 6 / 8)], dim=-1).float()
    last = classifier.layers
    if width:
        first, _, last = classifier.layers
        u = read @ first.weight.T + first.bias
        read = u * u.sigmoid()
    odds = (read @ last.weight.T + last.bias)[..., 0]
    with torch.no_grad():
        torch.testing.assert_close(classifier.logits(hidden, torch.full((3, 2), 6)), odds, atol=1e-4, rtol=0)
        torch.testing.assert_close(classifier(hidden, tokens).exp(), (odds / 2).sigmoid(), atol=1e-4, rtol=0)
        halves = classifier(hidden.bfloat16(), tokens)
    assert halves.dtype == torch.float32 and AttributeClassifier(4, 1, width=0).config["max_new_tokens"] == 1


def test_fit_counts_prefixes_epochs_and_the_base_rate_of_the_training_texts():
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 6, (30,), generator=generator)
    mask = torch.arange(6) < (1 + lengths)[:, None]
    mask[:, 0] = False  # the prompt
    data = DraftingData(torch.zeros(30, 6, dtype=torch.long), torch.randn(30, 6, 8, generator=generator), mask)
    labels, done = torch.rand(30, generator=generator) < 0.3, []
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    kept, train = order[:6], order[6:]
    fit = AttributeClassifier(8, 5, width=0).fit(
        data, labels, epochs=3, batch_size=20, progress=done.append, generator=torch.Generator().manual_seed(5)
    )
    assert len(fit.losses) == 3 * math.ceil(int(lengths[train].sum()) / 20) and done == [1, 1, 1]
    rate = float((labels[train] * lengths[train]).sum() / lengths[train].sum())
    share = float((labels[kept] * lengths[kept]).sum() / lengths[kept].sum())
    assert fit.prior_loss == pytest.approx(-share * math.log(rate) - (1 - share) * math.log(1 - rate), rel=1e-4)
    # The rate falls to nothing in a line, without which the weights would go on moving.
    rates = []
    step = torch.optim.AdamW.step

    def watched(optimiser, *args, **options):
        rates.append((optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["weight_decay"]))
        return step(optimiser, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        AttributeClassifier(8, 5).fit(data, labels, epochs=2, batch_size=1000, held_out=0.5, learning_rate=0.25)
    assert rates == [(0.25, 0.1), (pytest.approx(0.125), 0.1)]
    assert len(AttributeClassifier(8, 5).fit(data, labels, epochs=1, batch_size=1).losses) > 24


def test_temperature_stays_within_1_and_20():
    truth = (torch.arange(8) % 2).float()
    assert _temperature(0.1 * (2 * truth - 1), truth) == 1  # asks for larger logits
    assert _temperature(torch.randn(8, generator=torch.Generator().manual_seed(0)) * 50, truth) <= 20
    assert _temperature(-50 * (2 * truth - 1), truth) == 20  # wrong about all


@pytest.mark.parametrize("width", [0, 16])
def test_saved_and_loaded_classifier_says_the_same(width, tmp_path):
    model = make_model(vocab=3)
    data, labels, _ = sampled(model, 60, 3)
    classifier = AttributeClassifier.from_target(model, max_new_tokens=3, width=width)
    classifier.fit(data, labels, epochs=2)
    for _ in range(2):  # into folders that are not there yet, and over what is
        classifier.save_pretrained(tmp_path / "some" / "saved")
    again = AttributeClassifier.from_pretrained(tmp_path / "some" / "saved")
    hidden, tokens = torch.randn(2, 5, 16), torch.zeros(2, 5, 2, dtype=torch.long)
    assert torch.equal(again(hidden, tokens), classifier(hidden, tokens))
    assert classifier(hidden, tokens).shape == (2, 5) and bool((classifier(hidden, tokens) < 0).all())
    assert sorted(path.name for path in (tmp_path / "some" / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_same_seed_same_classifier():
    model = make_model(vocab=3)
    data, labels, _ = sampled(model, 60, 3)
    fits = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        classifier = AttributeClassifier.from_target(model, max_new_tokens=3)
        fits.append(classifier.fit(data, labels, epochs=2, generator=torch.Generator().manual_seed(seed)).losses)
    assert fits[0] == fits[1] != fits[2]


def test_bad_input_is_refused(tmp_path):
    model = make_model(vocab=3)
    data, labels, _ = sampled(model, 20, 3)
    classifier = AttributeClassifier.from_target(model, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"bool of shape \(20,\)"):
        classifier.fit(data, labels[1:])
    with pytest.raises(ValueError, match="bool of shape"):
        classifier.fit(data, labels.float())
    with pytest.raises(ValueError, match="the same label"):
        classifier.fit(data, torch.ones_like(labels))
    with pytest.raises(ValueError, match="held_out must be within"):
        classifier.fit(data, labels, held_out=1.0)
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"held_out": 0.0}):
        with pytest.raises(ValueError, match="held_out must be within"):
            classifier.fit(data, labels, **wrong)
    for sizes in ((4, 3, -1), (0, 3, 1), (4, 0, 1)):
        with pytest.raises(ValueError, match="width at least 0"):
            AttributeClassifier(*sizes[:2], width=sizes[2])
    with pytest.raises(ValueError, match="repeated within"):
        degeneracy([1], {0}, ngram=0)
    with pytest.raises(ValueError, match="repeated within"):
        degeneracy([1], {0}, repeated=2.0)
    with pytest.raises(ValueError, match="no saved attribute classifier"):
        AttributeClassifier.from_pretrained(tmp_path)
