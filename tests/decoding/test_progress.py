"""Long work called from Python says how far it is and how long it will take."""

from __future__ import annotations

import json
import re

import pytest
import torch

from paperworks.decoding import Medusa, collect, self_written, train_drafter
from paperworks.decoding.progress import telling
from tests.decoding.conftest import TREE, make_model


class Words:
    """A tokenizer without a chat template."""

    bos_token_id, eos_token_id = 1, None

    def encode(self, text, add_special_tokens=True):
        return [2]


@pytest.fixture
def work():
    model = make_model(dtype=torch.float32)
    return {
        "the model writes its training text": lambda **told: self_written(
            model, Words(), tokens=40, answer_tokens=8, question_tokens=3, batch_size=2, **told
        ),
        "the model reads its training text": lambda **told: collect(model, [([1, 2], [3, 4, 5])] * 20, **told),
        "training Medusa": lambda **told: train_drafter(
            Medusa.from_target(model, heads=2, tree=TREE[:2]), model,
            collect(model, [([1, 2], [3, 4, 5])] * 20, progress=False), epochs=2, **told
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["the model writes its training text", "the model reads its training text", "training Medusa"]
)
def test_it_tells_by_default_and_not_where_that_is_not_wanted(name, work, capsys):
    steps = []
    work[name](progress=steps.append)
    assert capsys.readouterr().err == ""
    for nobody in (False, None):
        work[name](progress=nobody)
    assert capsys.readouterr().err == ""
    work[name]()
    first, *_, last = capsys.readouterr().err.splitlines()
    total = {"the model writes its training text": 40, "training Medusa": 10}.get(name, 20)
    assert first.startswith(f"{name}: 0 of {total} after 00:00") and last.startswith(
        f"{name}: {total} of {total} after"
    )
    assert sum(steps) >= total


def test_what_is_left_is_estimated(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with telling(True, 100, "reading") as tell:
        for _ in range(4):
            now[0] += 15
            tell(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:5] == [
        f"reading: {10 * n} of 100 after 00:{15 * n:02d}, about 0{left // 60}:{left % 60:02d} left".replace(
            "00:60", "01:00"
        )
        for n, left in ((1, 135), (2, 120), (3, 105), (4, 90))
    ]


def test_more_than_was_asked_for_is_all_of_it(capsys):
    with telling(True, 5, "writing") as tell:
        tell(4)
        tell(4)
    assert re.search(r"writing: 5 of 5 after", capsys.readouterr().err)


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with telling(True, 5, "writing") as tell:
        tell(5)
    text = capsys.readouterr().err
    assert "\r" in text and "100%" in text and "5/5" in text


def test_a_drafter_is_put_on_the_hub_with_what_loads_it(monkeypatch):
    done = []

    class Api:
        def __init__(self, token=None):
            done.append(token)

        def create_repo(self, repo_id, *, private, exist_ok):
            done.append((repo_id, private, exist_ok))
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            files = {path.name: path.read_bytes() for path in sorted(__import__("pathlib").Path(folder_path).iterdir())}
            done.append((repo_id, commit_message, files))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = make_model()
    drafter = Medusa.from_target(model, heads=2, tree=TREE[:2])
    assert drafter.push_to_hub("ada/heads", private=True, token="secret") == "https://hub.example/ada/heads"
    token, made, (repo, message, files) = done
    assert (token, made, repo, message) == ("secret", ("ada/heads", True, True), "ada/heads", "Add a Medusa")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads(files["config.json"])["made_for"] == drafter.made_for
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: paperworks\n") and 'snapshot_download("ada/heads")' in card
    assert "# Medusa for a llama" in card
