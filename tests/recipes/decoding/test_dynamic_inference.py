"""The recipe of dynamic inference, seconds long."""

from __future__ import annotations

import random
import re
from itertools import chain

import pytest

from paperworks.errors import UsageError
from paperworks.hub import load_model
from paperworks.lab import execute
from paperworks.recipes.decoding.dynamic_inference import _own_corpus, rouge_l


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / name)


def test_dynamic_inference_measures_the_whole_curve():
    run = execute("dynamic-inference", scale="tiny", show_progress=False)
    assert run.status == "finished", run.traceback
    figures = {(m.name, m.series): m for m in run.measurements}
    for threshold in ("0.5", "0.7", "0.9", "0.97"):
        name = f"exit at {threshold}"
        assert {("quality", name), ("speed-up", name)} <= figures.keys()
        # Random exits are the controller's own in another order: the cost is the same to the layer.
        assert figures["layers a token", name].value == pytest.approx(
            figures["layers a token", f"random for {name}"].value
        )
        ratio = figures["agreement at equal cost, ratio", name]
        assert ratio.low is not None and ratio.low <= ratio.value <= ratio.high
    assert figures["agreement", "all layers"].value == 1
    assert figures["layers a token", "all layers"].value == 2
    assert figures["layers a token", "layer 1"].value == 1
    assert {("speed-up", f"{what} at 0.9") for what in ("exit", "stop", "exit and stop", "confident")} <= figures.keys()
    lengths = [figures["length", f"stop at {threshold}"].value for threshold in ("0.5", "0.7", "0.9", "0.97")]
    assert lengths == sorted(lengths) and lengths[-1] <= figures["length", "all layers"].value
    assert run.artefacts["figure"].is_file()


def test_rouge_l_is_that_of_every_common_subsequence():
    from itertools import combinations

    chance = random.Random(0)
    for _ in range(30):
        one, other = ([chance.randrange(3) for _ in range(chance.randrange(1, 7))] for _ in range(2))
        parts = [{c for n in range(len(ids) + 1) for c in combinations(ids, n)} for ids in (one, other)]
        longest = max(map(len, parts[0] & parts[1]))
        expected = (
            2 * (longest / len(one)) * (longest / len(other)) / (longest / len(one) + longest / len(other))
            if longest
            else 0
        )
        assert rouge_l(one, other) == pytest.approx(expected)
    assert rouge_l([], [1]) == 0


def test_code_of_ones_own_is_learnt_and_completed(tmp_path, monkeypatch):
    (tmp_path / "own.rs").write_text("\n".join(f"fn add_{n}(a: u8) -> u8 {{ a + {n} }}" for n in range(120)))

    def elsewhere(*_):
        raise AssertionError("the standard library is not what was asked for")

    monkeypatch.setattr("paperworks.recipes.decoding.dynamic_inference._corpus", elsewhere)
    # At scale tiny prompts are the standard library's.
    options = {"data": str(tmp_path / "own.rs"), "prompts": "auto"}
    run = execute("dynamic-inference", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "finished", run.traceback
    assert {"quality", "speed-up", "right within a third"} <= {m.name for m in run.measurements}
    assert not any("HumanEval" in log.message for log in run.logs)


def test_a_text_of_ones_own_is_taken_in_its_order_and_no_token_twice():
    _, tokenizer = load_model("tiny-random-llama")
    text = "".join(chr(97 + n % 26) for n in range(95))
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts, pieces = _own_corpus(tokenizer, "own.txt", text, (3, 2, 1), 10, pieces=3, length=9)
    assert [tuple(part.shape) for part in parts] == [(3, 10), (2, 10), (1, 10)]
    assert [*(token for part in parts for token in part.flatten().tolist()), *chain.from_iterable(pieces)] == ids
    assert len(pieces) == 3 and min(map(len, pieces)) >= 10
    # To the token: 60 for the blocks, three pieces of ten.
    assert _own_corpus(tokenizer, "own.txt", text[:90], (3, 2, 1), 10, pieces=3, length=9)
    with pytest.raises(UsageError) as refused:
        _own_corpus(tokenizer, "own.txt", text[:89], (3, 2, 1), 10, pieces=3, length=9)
    assert str(refused.value) == (
        "own.txt has 89 tokens, and 6 blocks of 10 with 3 prompts take 90: give more text, or lower block, context and "
        "prompt_count"
    )
    with pytest.raises(UsageError, match=r"give more text, or head_blocks 22, controller_blocks 11, test_blocks 5$"):
        _own_corpus(tokenizer, "own.txt", text[:90] * 10, (60, 30, 15), 10, pieces=50, length=9)
    assert _own_corpus(tokenizer, "own.txt", text[:60], (3, 2, 1), 10, pieces=0, length=9)[1] == []


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (b"\xff\xfe\x00", {}, "own.rs cannot be read as text or code: it is not text in UTF-8"),
        (b" \n", {}, "own.rs cannot be read as text or code: the file is empty"),
        (b"fn main() {}", {"prompts": "standard library"}, "own.rs is what is completed: leave prompts out, or give humaneval"),
        (b"fn main() {}", {}, "own.rs has 12 tokens, and 18 blocks of 64 with 6 prompts take"),
        (b"", {"data": "iris"}, "iris is no running text: give a text or code file, wikitext-2 or standard library"),
        (b"", {"data": "there.is.none"}, "there.is.none"),
        (b"", {"data": "."}, r"\. is a folder: give one file"),
    ],
)  # fmt: skip
def test_what_is_no_text_or_too_little_is_one_sentence(tmp_path, content, options, sentence):
    (tmp_path / "own.rs").write_bytes(content)
    options = {"data": str(tmp_path / "own.rs"), "prompts": "auto", **options}
    run = execute("dynamic-inference", scale="tiny", parameters=options, show_progress=False)
    assert run.status == "failed" and isinstance(run.exception, UsageError), run.traceback
    assert re.search(sentence, run.error), run.error
