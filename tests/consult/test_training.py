"""`paperworks train-drafter`: says how long it takes, goes on where it was stopped, leaves a drafter that writes."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch

from paperworks.cli import main
from paperworks.consult.training import train
from paperworks.decoding import Drafter, generate
from paperworks.decoding.costs import Choice
from paperworks.decoding.tree import TreeShape
from paperworks.errors import UsageError
from paperworks.lab.display import Display
from paperworks.recipes.decoding import drafting

SMALL = {"model": "tiny-random-llama", "tokens": 300, "epochs": 1.0, "vocabulary": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for module in ("lab.cache", "decoding.costs"):
        monkeypatch.setattr(f"paperworks.{module}.user_cache_path", lambda name: tmp_path / "cache" / name)


@pytest.fixture
def choice(monkeypatch):
    """What is chosen as the fastest on this machine."""
    found = [Choice(TreeShape([(0,), (1,), (0, 0)]), 1.5, 1.8, 1.2)]
    monkeypatch.setattr("paperworks.decoding.costs.choose_tree", lambda drafter, model, accuracy: found[0])
    monkeypatch.setattr("paperworks.decoding.costs.choose_nodes", lambda drafter, model, tokens: (max(tokens), 1.2))
    return found


@pytest.fixture
def paperworks(capsys, monkeypatch):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["paperworks", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def words_of(options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("method", ["hydra", "medusa", "chimera", "fspad"])
def test_a_drafter_is_trained_saved_and_used_by_the_command_that_is_printed(method, paperworks, tmp_path, choice):
    folder = tmp_path / "my drafter"
    status, out, err = paperworks("train-drafter", "--method", method, "--out", folder, *words_of(SMALL))
    assert status == 0, err
    first, last = out.splitlines()
    assert first.lower() == f"{method}: {folder}".lower() and last.startswith("next: paperworks generate --model tiny")
    command = shlex.split(last.removeprefix("next: paperworks "))
    assert command[command.index("--drafter") + 1] == str(folder)
    status, text, _ = paperworks(*command, "--max-new-tokens", 12, "--json")
    plain = paperworks("generate", command[-1], "--model", "tiny-random-llama", "--method", "plain",
                       "--max-new-tokens", 12, "--json")  # fmt: skip
    assert status == 0 and json.loads(text)["text"] == json.loads(plain[1])["text"]
    config = json.loads((folder / "config.json").read_text())
    assert config["vocabulary"] == 32 and set(config["made_for"]) == {"kind", "hidden_size", "vocab_size", "weights"}
    assert config["nodes" if method == "fspad" else "tree"] == (16 if method == "fspad" else [[0], [1], [0, 0]])
    # It is told where else it is kept, and nothing is trained a second time for `generate`.
    assert re.search(rf"{config['class']} for tiny-random-llama lies in {tmp_path}/cache/paperworks/drafters/\w+", err)


def test_nodes_that_are_given_are_kept_to(tmp_path):
    trained = train(tmp_path / "out", nodes=5, **SMALL)
    assert (trained.method, trained.nodes) == ("Hydra", 5)
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["tree"]) == 5


def test_that_no_drafting_pays_is_said(paperworks, tmp_path, choice):
    choice[0] = Choice(TreeShape([]), 1.0, 1.0, 1.0)
    status, out, err = paperworks("train-drafter", "--out", tmp_path / "out", *words_of(SMALL))
    assert status == 0 and "no drafting pays on this machine" in out.splitlines()[1]
    assert "Hydra on this machine: no drafting pays here: text is written plainly" in err
    target, _ = drafting.load_target("tiny-random-llama", dtype=drafting.cpu_friendly_dtype())
    drafter = Drafter.from_pretrained(tmp_path / "out", target)
    assert generate(target, torch.tensor([[1, 2]]), drafter=drafter, max_new_tokens=5).statistics.drafted == 0


def test_it_goes_on_behind_the_last_part_that_was_written(tmp_path, monkeypatch, choice, capsys):
    monkeypatch.setitem(drafting._PART, "cpu", 100)
    monkeypatch.setattr(drafting, "_LONG", 200)
    written, asked = [], []
    real = __import__("paperworks.decoding", fromlist=["self_written"]).self_written

    def self_written(*args, **options):
        if len(written) == 2 and not asked:
            asked.append("stop")
            raise KeyboardInterrupt
        written.append(options["generator"].initial_seed())
        return real(*args, **options)

    monkeypatch.setattr("paperworks.decoding.self_written", self_written)
    with pytest.raises(KeyboardInterrupt), Display() as display:
        train(tmp_path / "out", display=display, **{**SMALL, "tokens": 400})
    assert not (tmp_path / "out").exists()
    estimate = (
        r"Hydra: about (\d+) s to write its text and (\d+) s to train on it; the text is kept, so that it goes on"
    )
    assert len(re.findall(estimate, capsys.readouterr().err)) == 1
    with Display() as display:
        train(tmp_path / "out", display=display, **{**SMALL, "tokens": 400})
    # Four parts, each written once; how long the rest takes is said behind the first of them that is new.
    assert len(written) == 4 and len(re.findall(estimate, capsys.readouterr().err)) == 1
    train(tmp_path / "more", **{**SMALL, "tokens": 500})
    assert len(written) == 5


def test_the_estimate_is_what_the_parts_and_steps_take(monkeypatch, tmp_path, choice):
    """On a clock on which a part takes 100 seconds and a step of training one."""
    monkeypatch.setitem(drafting._PART, "cpu", 200)
    monkeypatch.setattr(drafting, "_LONG", 400)
    now, said, parts = [0.0], [], []
    monkeypatch.setattr(drafting, "perf_counter", lambda: now[0])
    decoding = __import__("paperworks.decoding", fromlist=["self_written"])
    write, read, teach = decoding.self_written, decoding.collect, decoding.train_drafter

    def self_written(*args, **options):
        now[0] += 100
        return write(*args, **options)

    def train_drafter(*args, progress, **options):
        def step(steps):
            now[0] += 1
            progress(steps)

        return teach(*args, progress=step, **options)

    def collect(*args, **options):
        parts.append(read(*args, **options))
        return parts[-1]

    monkeypatch.setattr(decoding, "self_written", self_written)
    monkeypatch.setattr(decoding, "collect", collect)
    monkeypatch.setattr(decoding, "train_drafter", train_drafter)
    monkeypatch.setattr("paperworks.lab.run.Run.log", lambda run, message: said.append(message))
    train(tmp_path / "out", **{**SMALL, "tokens": 1200, "epochs": 10})
    steps = now[0] - 600 - 3
    seconds = re.match(r"Hydra: about 8 min 20 s to write its text and (\d+) s to train on it", said[0])[1]
    # Ten passes in batches of eight, over parts that all have as many sequences as the first.
    assert int(seconds) == pytest.approx(10 * 6 * len(parts[0]) / 8, abs=0.5)
    assert len(parts) == 6 and steps == pytest.approx(10 * sum(map(len, parts)) / 8, rel=0.2)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"method": "hydro"}, "there is no method 'hydro': drafters are medusa, hydra, hydra, 3 heads, hydra++"),
        ({"method": "plain"}, "there is no method 'plain': drafters are medusa"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"tokens": 199}, "tokens takes a whole number of at least 200, not 199"),
        ({"vocabulary": -1}, "vocabulary takes a whole number of at least 0, not -1"),
        ({"nodes": 0}, "nodes takes a whole number of at least 1, not 0"),
        ({"epochs": 0.0}, "epochs takes a number above 0, not 0.0"),
    ],
)
def test_bad_use_is_one_sentence(change, sentence, tmp_path):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        train(tmp_path / "out", **{**SMALL, **change})
    assert not list((tmp_path / "cache").rglob("data.safetensors"))


def test_what_a_folder_holds_is_not_overwritten(paperworks, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    status, _, err = paperworks("train-drafter", "--out", tmp_path / "out", *words_of(SMALL))
    assert status == 2 and err.strip() == (
        f"paperworks: {tmp_path / 'out'} holds something already: give the drafter a folder of its own by --out"
    )


@pytest.mark.parametrize(("gain", "drafts"), [(1.3, True), (0.8, False)])
def test_a_drafter_of_another_kind_is_used_where_it_pays(gain, drafts, monkeypatch, tmp_path):
    from paperworks.consult.writing import write
    from paperworks.decoding import costs, engine

    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(costs, "drafting_gain", lambda drafter, model, prompt: gain)
    monkeypatch.setattr("paperworks.recipes.decoding.drafting.Drafting.train_tokens", 600)
    used, whole = [], engine.generate_as_asked
    monkeypatch.setattr(
        engine,
        "generate_as_asked",
        lambda model, ids, drafter, *rest, **asked: used.append(drafter) or whole(model, ids, drafter, *rest, **asked),
    )
    text = write("Hello", model="tiny-random-llama", method="first layer", max_new_tokens=6, temperature=0.0).text
    assert (used[0] is not None) == drafts
    assert text == write("Hello", model="tiny-random-llama", method="plain", max_new_tokens=6, temperature=0.0).text
