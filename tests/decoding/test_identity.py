"""A drafter knows the model it was made for, and what is misused says so in a sentence."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from transformers import BatchEncoding

from paperworks.decoding import (
    Drafter,
    DynamicInference,
    Hydra,
    Medusa,
    RecursiveSpeculation,
    as_custom_generate,
    collect,
    generate,
    train_drafter,
)
from paperworks.decoding.identity import difference, identity, weights_digest
from tests.decoding.conftest import FAMILIES, TREE, make_model


def medusa(model):
    return Medusa.from_target(model, heads=3, tree=TREE)


def digest(model):
    return weights_digest(copy.deepcopy(model))


@pytest.mark.parametrize("part", ["q_proj", "o_proj", "up_proj", "down_proj", "norm", "embed_tokens", "lm_head"])
def test_every_weight_counts(part):
    model = make_model()
    before, place = digest(model), 0
    for name in dict(model.named_parameters()):
        if part in name:
            # The last bit of one value, where no sum and no sample would see it.
            changed = copy.deepcopy(model)
            flat = dict(changed.named_parameters())[name].data.view(-1)
            flat[place] = torch.nextafter(flat[place], torch.tensor(torch.inf, dtype=flat.dtype))
            assert digest(changed) != before, name
            place = (place + 7) % 16
    assert digest(model) == before == digest(make_model())


def test_the_order_of_layers_counts_and_their_names_do_not():
    model = make_model()
    swapped = copy.deepcopy(model)
    layers = swapped.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert digest(swapped) != digest(model)
    assert weights_digest(torch.nn.Sequential(copy.deepcopy(model))) == digest(model)


@pytest.mark.parametrize("change", ["in place", "past autograd", "replaced", "loaded"])
def test_a_model_that_is_changed_is_read_anew(change):
    model = make_model(dtype=torch.float32)
    before = weights_digest(model)
    assert weights_digest(model) == before
    weight = model.model.layers[0].mlp.up_proj.weight
    if change == "in place":
        with torch.no_grad():
            weight[3, 5] += 1
    elif change == "past autograd":
        weight.data.mul_(1.001)
    elif change == "replaced":
        weight.data = weight.data + 0.01
    else:
        model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})
    assert weights_digest(model) == digest(model) != before


def test_what_was_read_of_a_model_is_kept(monkeypatch):
    model = make_model()
    found = identity(model)
    monkeypatch.setattr("paperworks.decoding.identity._digest", None)
    assert identity(model) == found


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_type_are_the_same_model(family, kept, given):
    model = make_model(family, dtype=kept)
    record = json.loads(json.dumps(identity(model)))
    copied, other = copy.deepcopy(model).to(given), copy.deepcopy(model)
    with torch.no_grad():
        # By more than what any of the types rounds away.
        other.get_input_embeddings().weight[4, 3] *= 1.5
    reason = difference(record, copied)
    if {kept, given} == {torch.bfloat16, torch.float16}:
        wanted = str(kept).removeprefix("torch.")
        assert reason is not None and reason.endswith(f"cannot be compared: load the model in {wanted}")
    else:
        assert reason is None
        told = difference(record, other.to(given))
        assert told == f"this {model.config.model_type} has the same sizes and other weights"


def test_weights_that_are_not_in_memory_are_not_compared():
    model = make_model()
    with torch.device("meta"):
        absent = type(model)(model.config)
    assert weights_digest(absent) is None and difference(identity(model), absent.double()) is None


def test_a_saved_drafter_refuses_another_model(tmp_path):
    model, other = make_model(), make_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.add_(0.01)
    medusa(model).save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        for same in (model, make_model(), copy.deepcopy(model).to(torch.bfloat16)):
            loaded = Drafter.from_pretrained(tmp_path, same)
            assert loaded.made_for == identity(model)
            assert generate(same, torch.tensor([[1, 2]]), drafter=loaded, max_new_tokens=4).sequences.shape == (1, 6)
    with pytest.raises(ValueError, match=r"Medusa in .* was made for another model: this llama has the same sizes and"):
        Drafter.from_pretrained(tmp_path, other)
    with pytest.raises(
        ValueError, match=r"that was a llama of width 16 with 40 tokens, and this is a llama .* with 41"
    ):
        Medusa.from_pretrained(tmp_path, make_model(vocab=41))
    with pytest.raises(ValueError, match="and this is a qwen2 of width 16"):
        Medusa.from_pretrained(tmp_path, make_model("qwen2"))


def test_a_drafter_that_does_not_say_what_it_was_made_for_is_loaded_with_a_warning(tmp_path):
    model = make_model()
    medusa(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["made_for"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="does not say which model its Medusa was made for"):
        loaded = Drafter.from_pretrained(tmp_path, model)
    # Nor does it vouch for this one when it is saved again.
    assert loaded.made_for is None


def test_heads_of_dynamic_inference_refuse_another_model(tmp_path):
    model, other = make_model(), make_model()
    with torch.no_grad():
        other.model.layers[1].mlp.gate_proj.weight.add_(0.01)
    DynamicInference(model).save_pretrained(tmp_path)
    assert DynamicInference.from_pretrained(tmp_path, make_model()).options == DynamicInference(model).options
    with pytest.raises(ValueError, match="made for another model: this llama has the same sizes and other weights"):
        DynamicInference.from_pretrained(tmp_path, other)
    with pytest.raises(TypeError, match=r"DynamicInference\.from_pretrained\('.*', model\)"):
        DynamicInference.from_pretrained(tmp_path)


@pytest.mark.parametrize("way", ["generate", "custom_generate"])
def test_a_drafter_of_another_model_is_refused_where_text_is_written(way):
    model, prompt = make_model(), torch.tensor([[1, 2, 3]])
    drafter = medusa(model)

    def write(target):
        if way == "generate":
            return generate(target, prompt, drafter=drafter, max_new_tokens=3)
        return target.generate(prompt, custom_generate=as_custom_generate(drafter), max_new_tokens=3, pad_token_id=0)

    write(model)
    wide, other = make_model(vocab=50), make_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        # One that it has drafted for may be trained on.
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    write(model)
    with pytest.raises(
        ValueError, match="this Medusa was made for another model: that was a llama of width 16 with 40"
    ):
        write(wide)
    with pytest.raises(ValueError, match=r"same sizes and other weights; make and train one by Medusa\.from_target"):
        write(other)
    drafter.made_for = None
    write(other)


def test_training_makes_a_drafter_one_for_the_model_it_was_trained_against():
    model, other = make_model(), make_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    drafter = medusa(model)
    train_drafter(drafter, other, collect(other, [([1, 2], [3, 4, 5, 6])]), epochs=1)
    assert drafter.made_for == identity(other) != identity(model)


def test_a_drafter_is_loaded_for_a_model(tmp_path):
    medusa(make_model()).save_pretrained(tmp_path)
    for kind in (Drafter, Hydra, RecursiveSpeculation):
        with pytest.raises(
            TypeError, match=rf"for the model that it drafts for: {kind.__name__}\.from_pretrained\('.*', model\)"
        ):
            kind.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="expected a transformers causal language model with an output head, got str"):
        Drafter.from_pretrained(tmp_path, "smollm2-135m")


@pytest.mark.parametrize("given", ["encoding", "list"])
def test_what_a_tokenizer_returns_is_no_tensor_of_ids(given):
    model, ids = make_model(), torch.tensor([[1, 2]])
    encoding = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    value, name = (encoding, "BatchEncoding") if given == "encoding" else (ids.tolist(), "list")
    sentence = (
        rf"input_ids must be a tensor of token ids, got {name}: give tokenizer\(text, return_tensors='pt'\)\.input_ids"
    )
    with pytest.raises(TypeError, match=sentence):
        generate(model, value)
    with pytest.raises(TypeError, match=sentence):
        DynamicInference(model).generate(value)


def test_a_drafter_is_no_decoding_loop():
    model, prompt = make_model(), torch.tensor([[1, 2]])
    with pytest.raises(TypeError, match=r"a Medusa drafts and does not write: .*=as_custom_generate\(drafter\)"):
        model.generate(prompt, custom_generate=medusa(model), max_new_tokens=3, pad_token_id=0)


def test_what_drafts_is_a_drafter():
    with pytest.raises(TypeError, match=r"drafter must be one such as Hydra\.from_target\(model\), got str"):
        generate(make_model(), torch.tensor([[1, 2]]), drafter="hydra", max_new_tokens=3)
