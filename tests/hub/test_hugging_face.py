"""What comes from the Hugging Face Hub is what it announced: through the real client and its real cache, over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paperworks.errors import UsageError
from paperworks.hub import load_dataset, load_model, places
from tests.hub.conftest import Hub, git_name

NAME = "someone/tiny"
QUESTION = {"question": "2 + 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = load_model("tiny-random-llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def model_hub(hub: Hub, tiny: dict[str, bytes]) -> Hub:
    hub.files[f"models/{NAME}"] = tiny | {"pytorch_model.bin": b"a pickle", "README.md": b"# Tiny"}
    return hub


def norm(model: Any) -> float:
    return sum(float(parameter.detach().abs().sum()) for parameter in model.parameters())


def flip(file: Path, place: int = -5) -> None:
    """Change one bit of what a link leads to."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.resolve().write_bytes(content)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose checksums were computed."""
    names: list[str] = []

    def counted(function: Callable[[Path], str]) -> Callable[[Path], str]:
        def compute(file: Path) -> str:
            names.append(file.name)
            return function(file)

        return compute

    monkeypatch.setattr(places, "sha256", counted(places.sha256))
    monkeypatch.setattr(places, "_git_blob", counted(places._git_blob))
    return names


def test_a_model_is_fetched_once_and_without_pickles(model_hub: Hub, tiny: dict[str, bytes]) -> None:
    expected = norm(load_model("tiny-random-llama")[0])
    assert norm(load_model(NAME)[0]) == expected
    assert sorted(model_hub.fetched) == sorted(tiny)
    assert norm(load_model(NAME)[0]) == expected
    assert len(model_hub.fetched) == len(tiny)
    # Large files lie under their SHA-256, small ones under git's name; both are links.
    assert len(model_hub.cached("model.safetensors").readlink().name) == 64
    assert model_hub.cached("config.json").readlink().name == git_name(tiny["config.json"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_damaged_in_the_cache_is_fetched_again(model_hub: Hub, tiny: dict[str, bytes], name: str) -> None:
    load_model(NAME)
    flip(model_hub.cached(name), place=60)
    del model_hub.fetched[:]
    assert norm(load_model(NAME)[0]) == norm(load_model("tiny-random-llama")[0])
    assert model_hub.fetched == [name] and model_hub.cached(name).read_bytes() == tiny[name]


def test_a_file_damaged_in_the_cache_is_refused_where_nothing_answers(
    model_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(NAME)
    flip(model_hub.cached("model.safetensors"))
    model_hub.answers = False
    with pytest.raises(UsageError, match=r"model\.safetensors of 'someone/tiny' is damaged .* connect to a network"):
        load_model(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="is damaged"):
        load_model(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model_hub.answers = True
    assert norm(load_model(NAME)[0]) == norm(load_model("tiny-random-llama")[0])


def test_what_arrives_damaged_twice_is_refused(model_hub: Hub, tiny: dict[str, bytes]) -> None:
    weights = bytearray(tiny["model.safetensors"])
    weights[-5] ^= 1
    model_hub.damage["model.safetensors"] = bytes(weights)
    with pytest.raises(UsageError, match=r"is damaged .* the Hub gave it so again") as error:
        load_model(NAME)
    assert model_hub.fetched.count("model.safetensors") == 2 and "\n" not in str(error.value)
    model_hub.damage.clear()
    assert norm(load_model(NAME)[0]) == norm(load_model("tiny-random-llama")[0])


def test_checksums_are_computed_once_and_again_when_a_file_was_touched(
    model_hub: Hub, tiny: dict[str, bytes], computed: list[str]
) -> None:
    load_model(NAME)
    assert len(computed) == len(tiny)
    load_model(NAME)
    assert len(computed) == len(tiny)
    weights = model_hub.cached("model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes())
    load_model(NAME)
    assert computed[len(tiny) :] == [weights.name]


def test_where_the_cache_cannot_be_written_files_are_compared_each_time(
    model_hub: Hub, tiny: dict[str, bytes], computed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load_model(NAME)
    load_model(NAME)
    assert len(computed) == 2 * len(tiny)
    flip(model_hub.cached("model.safetensors"))
    model_hub.answers = False
    with pytest.raises(UsageError, match="is damaged"):
        load_model(NAME)


def test_contents_that_repositories_share_are_known_by_the_first_link(model_hub: Hub) -> None:
    """huggingface_hub can keep one copy for many repositories, under a third kind of name."""
    load_model(NAME)
    blob = model_hub.cached("model.safetensors").resolve()
    shared = model_hub.cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    load_model(NAME)
    flip(shared)
    model_hub.answers = False
    with pytest.raises(UsageError, match="is damaged"):
        load_model(NAME)


def test_a_cache_of_files_instead_of_links_is_read(model_hub: Hub) -> None:
    """As on systems without links: there is no name to compare with."""
    load_model(NAME)
    for link in model_hub.cached("config.json").parent.iterdir():
        content = link.read_bytes()
        link.unlink()
        link.write_bytes(content)
    assert norm(load_model(NAME)[0]) == norm(load_model("tiny-random-llama")[0])


def test_a_snapshot_copied_to_a_machine_without_a_network_is_read(model_hub: Hub, tmp_path: Path) -> None:
    load_model(NAME)
    shutil.copytree(model_hub.cache, tmp_path / "elsewhere", symlinks=True)
    shutil.rmtree(model_hub.cache)
    (tmp_path / "elsewhere").rename(model_hub.cache)
    model_hub.answers = False
    assert norm(load_model(NAME)[0]) == norm(load_model("tiny-random-llama")[0])


def test_a_part_of_a_snapshot_is_refused(model_hub: Hub) -> None:
    load_model(NAME)
    model_hub.cached("model.safetensors").unlink()
    model_hub.answers = False
    with pytest.raises(UsageError, match="connect to a network"):
        load_model(NAME)


def test_unknown_and_unreachable_repositories_get_their_sentences(hub: Hub) -> None:
    with pytest.raises(UsageError, match="has no model 'nobody/nothing' that you may read"):
        load_model("nobody/nothing")
    hub.answers = False
    with pytest.raises(UsageError, match="is not in the Hugging Face cache and the Hub does not answer"):
        load_model("nobody/nothing")


def test_weights_of_other_names_are_refused_from_the_hub_too(model_hub: Hub, tiny: dict[str, bytes]) -> None:
    from safetensors.torch import load, save

    weights = {name.replace("mlp", "ffn"): value for name, value in load(tiny["model.safetensors"]).items()}
    files = model_hub.files[f"models/{NAME}"]
    files["model.safetensors"] = save(weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 6 of the model's 21 tensors: .*mlp.*they have .*ffn"):
        load_model(NAME)


# Data sets


def parquet(rows: list[dict[str, Any]], folder: Path) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Callable[[str, str, list[dict[str, Any]]], Hub]:
    """Puts rows into a file of a repository of data."""

    def put(name: str, file: str, rows: list[dict[str, Any]]) -> Hub:
        hub.files.setdefault(f"datasets/{name}", {})[file] = parquet(rows, tmp_path)
        return hub

    return put


def test_data_of_the_hub_are_what_their_files_hold(repository: Any) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(1319)]
    hub = repository("openai/gsm8k", "main/test-00000-of-00001.parquet", rows)
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "pass",
    }
    repository("openai/openai_humaneval", "openai_humaneval/test-0.parquet", [problem | {"entry_point": "one"}] * 164)
    chat = {"category": "math", "prompt": ["a", "b"], "prompt_id": 7, "reference": []}
    repository("HuggingFaceH4/mt_bench_prompts", "data/train-0.parquet", [chat] * 80)
    assert load_dataset("gsm8k")[1318].number == 1319
    assert load_dataset("humaneval")[163].solution == "    return 1\n"
    assert load_dataset("mt_bench")[79].turns == ("a", "b")
    # At the commits that are known, not at whatever is newest.
    assert [commit for _, commit in hub.asked] == [
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        "e3a795c5e9a82ee40611c416b8a7786c73198991",
    ]


def test_wikitext_of_the_hub_has_the_lines_of_its_file(repository: Any) -> None:
    lines = [" = Title = \n", "", " A <unk> of words . \n", ""] * 940
    lines[2] = " " + " ".join(["word"] * (213_886 - 3 * 940 - 5 * 939)) + " \n"
    rows = [{"text": line} for line in lines]
    repository("Salesforce/wikitext", "wikitext-2-v1/validation-0.parquet", rows)
    repository("Salesforce/wikitext", "wikitext-2-v1/test-0.parquet", rows)
    found = load_dataset("wikitext-2", split="valid")
    assert found.text == "".join(line or " \n" for line in lines)
    with pytest.raises(UsageError, match="3760 lines and 213886 words, and wikitext-2 test has 4358 lines and 241211"):
        load_dataset("wikitext-2")
    with pytest.raises(UsageError, match=r"holds no file wikitext-2-v1/train-\*\.parquet: set PAPERWORKS_DATA"):
        load_dataset("wikitext-2", split="train")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([QUESTION] * 10, "it has 10 items, and gsm8k test has 1319 items; set PAPERWORKS_DATA to a folder"),
        ([{"question": "2 + 3?"}] * 1319, "record 1 has no field 'answer'"),
        (
            [QUESTION, QUESTION | {"answer": "five"}],
            "record 2: the answer ends with 'five', not with #### and a number",
        ),
        ([{"question": None, "answer": "#### 5"}], "record 1: question is None, not a text"),
    ],
)
def test_other_data_from_the_hub_are_refused(repository: Any, rows: list[dict[str, Any]], reason: str) -> None:
    repository("openai/gsm8k", "main/test-00000-of-00001.parquet", rows)
    with pytest.raises(UsageError, match=reason) as error:
        load_dataset("gsm8k")
    assert "openai/gsm8k" in str(error.value)


def test_data_damaged_in_the_cache_are_fetched_again(repository: Any) -> None:
    hub = repository("openai/gsm8k", "main/test-00000-of-00001.parquet", [QUESTION] * 1319)
    load_dataset("gsm8k")
    file = hub.cached("main/test-00000-of-00001.parquet")
    before = file.read_bytes()
    flip(file, place=40)
    assert len(load_dataset("gsm8k")) == 1319
    assert file.read_bytes() == before and hub.fetched == ["main/test-00000-of-00001.parquet"] * 2
    flip(file, place=40)
    hub.answers = False
    with pytest.raises(UsageError, match=r"damaged .* or set PAPERWORKS_DATA to a folder that holds gsm8k/test\.jsonl"):
        load_dataset("gsm8k")


def test_an_image_classifier_comes_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from paperworks.hub.models import load_image_classifier

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).half().save_pretrained(tmp_path / "vit")
    hub.files["models/someone/vit"] = {file.name: file.read_bytes() for file in (tmp_path / "vit").iterdir()}
    model = load_image_classifier("someone/vit")
    assert model.dtype == torch.float32 and not model.training
    assert json.loads(hub.cached("config.json").read_text())["dtype"] == "float16"
