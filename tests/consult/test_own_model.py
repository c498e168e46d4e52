"""The engineer's day, as docs/own-model.md has it: its Python runs as it stands, on a smaller model and less text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "own-model.md"
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


def test_its_commands_are_those_of_the_program():
    from typer.main import get_command

    from paperworks.cli import app

    commands = get_command(app()).commands
    for line in re.findall(r"^paperworks .*", PAGE.read_text(), re.MULTILINE):
        _, name, *words = line.split()
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
