"""The engineer's day, as docs/own-model.md has it: its Python runs as it stands, on a smaller model and less text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-model.md"
SMALLER = {'"smollm2-135m"': '"tiny-random-llama"', "tokens=50_000": "tokens=2_000", "split(64)": "split(4)"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.decoding.costs.user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.chdir(tmp_path)


def test_the_page_runs(capsys, tmp_path):
    text = PAGE.read_text()
    for whole, small in SMALLER.items():
        assert text.count(whole) == 1
        text = text.replace(whole, small)
    space: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), space)
    out, err = capsys.readouterr()
    assert re.match(r"\d+\.\d\d times plain, \d+\.\d\d tokens a call\n", out)
    assert "training Hydra: " in err and re.search(r"\nHydra: (\d+ nodes|no drafting pays)", err)
    assert (tmp_path / "hydra-for-my-model" / "model.safetensors").is_file()
    assert space["text"].tolist()[0] == space["result"].sequences.tolist()[0]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_short_way_runs_where_there_is_a_model(page, capsys):
    from paperworks.hub import load_model

    [block] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for whole, small in (("tokens=50_000", "tokens=2_000"), ("split(64)", "split(4)")):
        assert block.count(whole) == 1
        block = block.replace(whole, small)
    model, tokenizer = load_model("tiny-random-llama")
    exec(
        block, {"model": model, "tokenizer": tokenizer, "input_ids": tokenizer("Hello", return_tensors="pt").input_ids}
    )
    assert re.search(r"\nHydra: (\d+ nodes|no drafting pays)", capsys.readouterr().err)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/own-model.md", "docs/own-data.md", "docs/ray.md"])
def test_commands_are_those_of_the_program(page):
    from typer.main import get_command

    from paperworks.cli import app

    program = get_command(app())
    lines = re.findall(r"^paperworks (.*?)(?:  +#.*)?$", (ROOT / page).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        words, command = shlex.split(line, comments=True), program
        known = {option for parameter in program.params for option in parameter.opts}
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not program, line
        known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line
