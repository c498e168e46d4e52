"""What a node of a tree attends to, and what scores states."""

from __future__ import annotations

import pytest
import torch

from paperworks.decoding import Target, TokenTree
from paperworks.decoding.target import Head, tree_mask
from tests.decoding.conftest import make_model


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("first", [0, 2])
def test_a_node_sees_its_text_its_ancestors_and_itself(window, chunk, first):
    parents = [[-1, 0, 0, 1, 3], [-1, 0, 1, 2, 0]]
    lengths = [4, 2]
    tree = TokenTree(torch.zeros(2, 5, dtype=torch.long), torch.tensor(parents))
    mask = tree_mask(tree, lengths, torch.float32, window, chunk, first=first)
    assert mask.shape == (2, 1, 5 - first, 4 + 5)
    # A mask of its own, not a part of a larger one: kernels want it aligned.
    assert mask.storage_offset() == 0
    for row, (above, length) in enumerate(zip(parents, lengths, strict=True)):
        for node in range(first, 5):
            path = [node]
            while above[path[-1]] >= 0:
                path.append(above[path[-1]])
            position = length + len(path) - 1
            places = {place: place for place in range(length)}
            places |= {length + other: position - back for back, other in enumerate(path)}
            wanted = {
                slot
                for slot, place in places.items()
                if (window is None or position - place < window)
                and (chunk is None or place // chunk == position // chunk)
            }
            seen = mask[row, 0, node - first] == 0
            assert set(seen.nonzero().flatten().tolist()) == wanted
            assert bool((mask[row, 0, node - first][~seen] == torch.finfo(torch.float32).min).all())


def test_a_head_scales_what_its_weights_say_and_caps_what_comes_of_it():
    generator = torch.Generator().manual_seed(0)
    weight, bias, h = (torch.randn(*size, generator=generator).double() for size in ((7, 4), (7,), (2, 3, 4)))
    for b in (None, bias):
        for scale in (1.0, 0.25):
            for cap in (None, 2.0):
                said = scale * (torch.einsum("ijd,td->ijt", h, weight) + (0 if b is None else b))
                said = said if cap is None else cap * ((2 * said / cap).exp() - 1) / ((2 * said / cap).exp() + 1)
                head = Head(weight, b, scale, cap)
                torch.testing.assert_close(head(h), said)
                half = head(h.bfloat16())
                assert half.dtype == torch.bfloat16 and float((half.double() - said).abs().max()) < 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2", "opt"])
def test_states_are_scored_as_the_model_scores_them(family):
    model = make_model(family)
    if family in ("gemma2", "cohere", "granite"):
        torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(1))
    target, words = Target(model), torch.tensor([33, 2, 17])
    ids = torch.tensor([[3, 1, 2, 9]])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    scores = target.logits(output.hidden_states[-1])
    torch.testing.assert_close(scores, output.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(target.logits(output.hidden_states[-1], words), scores[..., words], atol=1e-12, rtol=0)
    assert torch.equal(target.head_rows(words), model.get_output_embeddings().weight[words])
    assert (target.hidden_size, target.vocab_size, target.context) == (16, 40, 64)
    assert (target.device, target.dtype) == (torch.device("cpu"), torch.float64)
    # What is not a head like this is told apart, and NaN is left to others.
    target.check_scorer(output.hidden_states[-1], output.logits)
    target.check_scorer(output.hidden_states[-1], output.logits * torch.nan)
    with pytest.raises(ValueError, match="does more to its states than a linear head"):
        target.check_scorer(output.hidden_states[-1], output.logits + 0.01 * output.logits.abs().max())
    with pytest.raises(ValueError, match="does more to its states than a linear head"):
        target.check_scorer(output.hidden_states[-1][..., :8], output.logits)


def test_places_past_the_context_are_its_last():
    target = Target(make_model())
    tokens, places = torch.tensor([[1, 2, 3]]), torch.tensor([[62, 63, 64]])
    given = target.inputs(tokens, places)
    assert given.keys() == {"input_ids", "position_ids"} and given["position_ids"].tolist() == [[62, 63, 63]]
    vectors = torch.zeros(1, 3, 16)
    assert target.inputs(vectors, places).keys() == {"inputs_embeds", "position_ids"}
    target.context = None
    assert target.inputs(tokens, places)["position_ids"].tolist() == [[62, 63, 64]]


def test_a_model_that_keeps_a_running_state_is_refused():
    model = make_model()
    model._is_stateful = True
    with pytest.raises(ValueError, match="keeps a running state, so that no token can be taken back"):
        Target(model)
