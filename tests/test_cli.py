"""The command line as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from paperworks import __version__, cli
from paperworks.lab import Run, recipe
from paperworks.lab.cache import cached_folder
from paperworks.papers import get, load_cards


@pytest.fixture
def toys(registry):
    """Two recipes of the decoding room that take no time, and one that fails."""

    @recipe("hydra", baseline="plain", tiny={"throws": 1})
    def toy_hydra(run: Run, throws: int = 3, model: str = "dice") -> None:
        """Throws of a die.

        Args:
            run: Keeps them.
            throws: How many.
            model: Which die.
        """
        run.record("throws", throws, better="higher", series="Hydra")
        run.ratio("luck", method=[2.0, 3.0], baseline=[1.0, 1.5], series="Hydra", against="plain")

    @recipe("chimera", tiny={})
    def toy_chimera(run: Run, throws: int = 3) -> None:
        """Throws of another."""
        run.ratio("luck", method=[float(throws)], baseline=[1.0], series="Chimera", against="plain")

    @recipe("fspad")
    def toy_fspad(run: Run) -> None:
        """Breaks."""
        run.record("before", 1, better="higher")
        raise RuntimeError("the die is lost")


def invoke(monkeypatch, capsys, *words):
    """Exit status, standard output and standard error of `paperworks words`."""
    monkeypatch.setattr(sys, "argv", ["paperworks", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def paperworks(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *words: invoke(monkeypatch, capsys, *words)


def test_list_names_every_paper_of_a_room(paperworks):
    status, out, _ = paperworks("list", "--room", "decoding", "--json")
    listed = json.loads(out)
    assert status == 0
    assert [paper["slug"] for paper in listed] == [p.slug for p in load_cards().values() if p.room == "decoding"]
    assert all(paper["status"] in ("planned", "runs", "measured") for paper in listed)
    assert "hydra" in paperworks("list")[1]


def test_list_by_status_shows_what_runs(paperworks, toys):
    _, out, _ = paperworks("list", "--status", "planned", "--json")
    assert not {"chimera", "fspad"} & {paper["slug"] for paper in json.loads(out)}


def test_search_brings_decoding_papers_first(paperworks):
    status, out, _ = paperworks("search", "make my llm faster", "--words", "--json")
    found = json.loads(out)
    assert status == 0 and found[0]["room"] == found[1]["room"] == "decoding"


def test_show_tells_claims_and_import(paperworks):
    _, out, _ = paperworks("show", "Hydra")
    assert "from paperworks.decoding import Hydra" in out and "claims hold" in out and "2402.05109" in out


def test_claims_are_listed_with_their_verdicts_and_the_sum(paperworks):
    status, out, _ = paperworks("claims", "--room", "decoding", "--json")
    told = json.loads(out)
    assert status == 0 and sum(told["verdicts"].values()) == len(told["claims"])
    assert {one["paper"] for one in told["claims"]} <= {p.slug for p in load_cards().values() if p.room == "decoding"}
    _, out, _ = paperworks("claims", "hydra")
    verdicts_of_hydra = [one for one in told["claims"] if one["paper"] == "hydra"]
    assert out.splitlines()[-1].startswith(f"{len(verdicts_of_hydra)} claims: ")
    for one in verdicts_of_hydra:
        assert one["verdict"] in out
    only = json.loads(paperworks("claims", "hydra", "--verdict", verdicts_of_hydra[0]["verdict"], "--json")[1])
    assert {one["verdict"] for one in only["claims"]} == {verdicts_of_hydra[0]["verdict"]}
    status, _, err = paperworks("claims", "--verdict", "splendid")
    assert status == 2 and "there is no verdict 'splendid', only reproduced" in err
    status, _, err = paperworks("claims", "tsdiff")
    assert status == 2 and "tsdiff is planned" in err


def test_list_shows_what_a_paper_does_whole_and_its_verdicts(monkeypatch, paperworks):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = paperworks("list", "--room", "decoding")
    assert "…" not in out and all(len(line) <= 80 for line in out.splitlines())
    words = " ".join(out.split())
    for paper in (p for p in load_cards().values() if p.room == "decoding"):
        assert all(word in words for word in paper.summary.split(". ")[0].rstrip(".").split())
    assert words.count("measured:") == words.count(" claims ") > 10


def test_every_figure_of_a_run_is_told_on_request(paperworks, toys):
    _, out, _ = paperworks("run", "hydra", "--json")
    run = json.loads(out)["id"]
    for what in (run, "hydra"):
        _, out, _ = paperworks("results", what, "--all")
        assert all(f"{m['name']}" in out for m in json.loads(paperworks("results", run, "--json")[1])["measurements"])
        assert "higher" in out and "against" in out


def test_show_tells_why_a_figure_falls_short(paperworks):
    _, out, _ = paperworks("show", "fspad")
    assert " ".join(get("fspad").shortfall.split()) in " ".join(out.split())


def test_run_prints_table_and_keeps_the_run(paperworks, toys):
    status, out, _ = paperworks("run", "hydra", "--throws", "5")
    assert status == 0 and "2x (2–2)" in out and "claims is measured with these options" in out and "finished" in out
    status, out, _ = paperworks("results", "hydra", "--json")
    run = json.loads(out)[0]
    assert run["parameters"] == {"throws": 5, "model": "dice"} and run["measurements"][0]["value"] == 5


def test_run_json_is_json_alone(paperworks, toys):
    status, out, _ = paperworks("run", "hydra", "--scale", "tiny", "--json")
    record = json.loads(out)
    assert status == 0 and record["scale"] == "tiny" and record["parameters"]["throws"] == 1


def test_run_help_shows_the_recipes_options(paperworks, toys):
    status, out, _ = paperworks("run", "hydra", "--help")
    assert status == 0 and "--throws" in out and "Which die." in out and "Example" in out


def test_failed_run_exits_with_1_and_keeps_what_it_recorded(paperworks, toys):
    status, _, err = paperworks("run", "fspad")
    assert status == 1 and "the die is lost" in err and "Traceback" not in err
    run = json.loads(paperworks("results", "fspad", "--json")[1])[0]
    assert run["status"] == "failed" and run["measurements"][0]["name"] == "before"
    assert "RuntimeError" in paperworks("results", run["id"])[1]


def test_compare_puts_papers_side_by_side(paperworks, toys, tmp_path):
    status, out, _ = paperworks("compare", "hydra", "chimera", "--throws", "4")
    assert status == 0 and "hydra: Hydra" in out and "chimera: Chimera" in out and "4x" in out
    assert "compare-hydra-chimera.png" in out.replace("\n", "")
    # Only one of them counts its throws.
    assert "luck" in out and "throws" not in out


def test_a_tiny_run_looks_like_no_result_wherever_it_is_shown(paperworks, toys):
    mark = "Scale tiny shows that it works; it says nothing of the claims."
    _, out, _ = paperworks("results")
    assert "nothing was measured here yet" in out
    paperworks("run", "hydra")
    _, out, _ = paperworks("results")
    assert "luck 2x" in out and "tiny" not in out
    assert mark not in paperworks("results", "--markdown")[1]
    _, out, _ = paperworks("run", "hydra", "--scale", "tiny")
    assert "says nothing of the claims" in out
    _, out, _ = paperworks("results")
    assert "no figures, only a trial:" in out and out.count("luck 2x") == 2 and out.endswith(f"{mark}\n")
    # The newest whose figures say something.
    _, out, _ = paperworks("results", "hydra", "--markdown")
    assert "scale default" in out and mark not in out
    _, out, _ = paperworks("compare", "hydra", "chimera", "--scale", "tiny")
    assert re.findall(r"hydra.*?: Hydra", out) == ["hydra (tiny): Hydra"] and mark in out


def test_generate_streams_text_and_ends_with_its_speed(paperworks):
    status, out, err = paperworks(
        "generate", "Once", "--model", "tiny-random-llama", "--method", "plain", "--max-new-tokens", "5"
    )
    assert status == 0 and "tokens/s" in err and "a pass of the model" in err
    words = ("generate", "Once", "--model", "tiny-random-llama", "--method", "plain", "--max-new-tokens", "5", "--json")
    written = json.loads(paperworks(*words)[1])
    assert written["text"].strip() == out.strip() and 1 <= written["tokens"] <= 5


def test_generate_drafts_with_a_saved_drafter(paperworks, tmp_path):
    from paperworks.decoding import Medusa
    from paperworks.hub import load_model

    model, _ = load_model("tiny-random-llama")
    Medusa.from_target(model, heads=2, tree=[(0,), (0, 0)]).save_pretrained(tmp_path / "heads")
    words = ("generate", "Once", "--model", "tiny-random-llama", "--max-new-tokens", "9", "--json")
    texts = [
        json.loads(paperworks(*words, *how)[1])["text"]
        for how in (("--method", "plain"), ("--drafter", str(tmp_path / "heads")))
    ]
    assert texts[0] == texts[1]


def test_results_as_markdown(paperworks, toys):
    paperworks("run", "hydra")
    assert "| Hydra | 3 |" in paperworks("results", "hydra", "--markdown")[1]


def test_version(paperworks):
    assert paperworks("--version")[1].strip() == __version__


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("show", "hydro"), "did you mean hydra"),
        (("run", "hydro"), "did you mean hydra"),
        (("run", "tsdiff"), "tsdiff"),
        (("run", "hydra", "--throws", "many"), "Invalid value for '--throws'"),
        (("run", "hydra", "--scale", "huge"), "huge"),
        (("run", "hydra", "--thrws", "3"), "--thrws"),
        (("run", "hydra", "--on", "moon"), "moon"),
        (("run", "hydra", "--store", "postgresql+psycopg://nobody@127.0.0.1:1/x"), "does not answer"),
        (("list", "--room", "attic"), "no room 'attic'"),
        (("list", "--status", "done"), "no status 'done'"),
        (("search", " "), "the search is empty"),
        (("compare", "hydra"), "at least two"),
        (("compare", "hydra", "tsdiff"), "of several"),
        (("compare", "hydra", "chimera", "--thrws", "3"), "thrws"),
        (("results", "nothing"), "there is no paper 'nothing'"),
        (("generate", "Hi", "--model", "tiny-random-llama", "--method", "hydro"), "no method 'hydro'"),
        (
            ("generate", "Hi", "--model", "tiny-random-llama", "--method", "plain", "--max-new-tokens", "0"),
            "at least 1",
        ),
        (("generate", "Hi", "--model", "tiny-random-llama", "--drafter", "nowhere"), "nowhere holds no saved drafter"),
        (("generate", "Hi", "--model", "no-such-model"), "no-such-model"),
        (("lst",), "lst"),
    ],
)
def test_bad_use_is_one_sentence_and_status_2(paperworks, toys, words, sentence):
    status, out, err = paperworks(*words)
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err


def test_interrupt_says_so_and_exits_with_130(paperworks, registry):
    @recipe("hydra")
    def stopped(run: Run) -> None:
        """Is stopped by its user."""
        run.record("before", 1, better="higher")
        raise KeyboardInterrupt

    status, _, err = paperworks("run", "hydra")
    assert status == 130 and "what was recorded is kept" in err
    assert json.loads(paperworks("results", "hydra", "--json")[1])[0]["status"] == "interrupted"


def test_every_command_has_help_with_an_example():
    runner = CliRunner()
    for command in (
        "list",
        "search",
        "show",
        "run",
        "compare",
        "generate",
        "results",
        "bench",
        "inspect",
        "serve",
        "ingest",
        "digest",
    ):
        shown = runner.invoke(cli.app(), [command, "--help"], env={"COLUMNS": "120"})
        assert shown.exit_code == 0 and "Example" in shown.output, command


def test_listing_loads_no_torch():
    code = (
        "import sys; sys.argv = ['paperworks', 'list', '--json']\nfrom paperworks import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'sqlalchemy', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stderr.strip() == "[]"


def test_bench_within_minutes_keeps_each_record_and_tells_what_it_left_out(paperworks, registry, tmp_path):
    @recipe("hydra", gpu=5, tiny={"throws": 2})
    def quick(run: Run, throws: int = 3) -> None:
        run.record("throws", throws, better="higher")

    @recipe("chimera", gpu=1, tiny={})
    def slow(run: Run) -> None:
        time.sleep(60)

    @recipe("lantern", gpu=1)
    def only_default(run: Run) -> None: ...

    @recipe("fspad")
    def unchanged(run: Run) -> None: ...

    words = ("bench", "--device", "cpu", "--minutes", "0.25", "--scale", "tiny", "--out", str(tmp_path))
    status, out, err = paperworks(*words)
    assert status == 0, err
    assert (tmp_path / "benchmarks" / "records" / "hydra.json").is_file()
    assert not (tmp_path / "benchmarks" / "records" / "chimera.json").exists()
    assert "left out: fspad: a GPU changes nothing" in out
    assert "left out: lantern: it has no scale tiny, only default" in out
    assert (reason := re.search(r"left out: chimera: (its share of \d+ s was over)", out))
    assert json.loads(paperworks("results", "chimera", "--json")[1])[0]["error"] == reason[1]


def test_bench_packs_what_was_trained_for_a_machine_that_finds_it_there(paperworks, registry, tmp_path, monkeypatch):
    trained = []

    @recipe("hydra", gpu=5, tiny={})
    def learning(run: Run) -> None:
        for kind, size in (("drafting-data", 10), ("drafters", 30 * 2**20), ("models", 40 * 2**20), ("tables", 10)):

            def build(folder, kind=kind, size=size):
                trained.append(kind)
                (folder / "weights").write_bytes(bytes(size))

            cached_folder(kind, {"seed": 0}, build)
        run.record("throws", 1, better="higher")

    words = ("bench", "--scale", "tiny", "--out", str(tmp_path / "out"))
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / "here")
    status, out, err = paperworks(*words, "--pack", str(tmp_path / "parts"))
    assert status == 0, err
    assert f"parts: {tmp_path / 'parts'}, 30.0 MiB" in out
    assert re.search(r"left out: models/\w+: its 40.0 MiB have no room in ", out)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["drafters", "tables"]
    trained.clear()
    monkeypatch.setattr("paperworks.lab.cache.user_cache_path", lambda name: tmp_path / "elsewhere")
    monkeypatch.setenv("PAPERWORKS_PARTS", "")
    status, out, err = paperworks(*words, "--parts", str(tmp_path / "parts"))
    assert status == 0 and trained == ["drafting-data", "models"], err


def test_bench_refuses_what_it_cannot_do(paperworks, toys, tmp_path):
    status, _, err = paperworks("bench", "hydra", "--scale", "tiny")
    assert status == 2 and "runs of scale tiny are no benchmarks: give --out FOLDER" in err
    status, _, err = paperworks("bench", "hydra", "--out", str(tmp_path), "--parts", str(tmp_path / "none"))
    assert status == 2 and "is no folder of trained parts" in err
    status, _, err = paperworks("bench", "hydra", "--out", str(tmp_path), "--device", "cuda")
    assert status == 2 and "PyTorch sees no GPU here" in err


def test_a_run_ends_with_the_command_that_gives_it_again(paperworks, toys, tmp_path):
    out = paperworks("run", "hydra", "--throws", "5", "--model", str(tmp_path / "my model"))[1]
    assert f"paperworks run hydra --throws 5 --model '{tmp_path}/my model'\n" in out


def test_search_says_where_nothing_is_found(paperworks):
    assert paperworks("search", "--words", "xyzzy") == (0, "nothing found: try other words, or `paperworks list`\n", "")
    assert paperworks("search", "--words", "xyzzy", "--json")[1].strip() == "[]"


@pytest.mark.parametrize(
    "words, lacking, extra",
    [
        (["serve"], "fastapi", "page"),
        (["digest", "--dry-run", "--to", "digests"], "jinja2", "page"),
        (["inspect", "--model", "builder.py:build", "--data", "digits"], "torch", "analysis"),
        (["inspect", "--model", "builder.py:build", "--data", "digits"], "torchmetrics", "analysis"),
        (["generate", "--model", "tiny-random-llama", "hello"], "torch", "llm"),
        (["run", "hydra", "--scale", "tiny"], "torch", "llm"),
        (["run", "near-collapse", "--scale", "tiny"], "torch", "analysis"),
        (["run", "near-collapse", "--scale", "tiny"], "sklearn", "analysis"),
    ],
)
def test_a_command_says_which_extra_it_lacks(words, lacking, extra, tmp_path):
    (tmp_path / "builder.py").write_text("def build():\n    import torch\n\n    return torch.nn.Linear(64, 10)\n")
    (tmp_path / "without.py").write_text(
        "import sys\n\nfrom paperworks.cli import main\n\nlacking = sys.argv.pop(1)\n\n\n"
        "class Missing:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == lacking:\n            raise ModuleNotFoundError(name=name)\n\n\n"
        "sys.meta_path.insert(0, Missing())\nmain()\n"
    )
    command = [sys.executable, "without.py", lacking, *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    package = {"sklearn": "scikit-learn"}.get(lacking, lacking)
    said = f"{package} is not installed: pip install 'paperworks[{extra}]'"
    assert ended.returncode in (1, 2) and said in ended.stderr and "Traceback" not in ended.stderr


def test_a_room_is_compared_by_its_name(paperworks):
    status, out, err = paperworks("compare", "--room", "nowhere")
    assert status == 2 and "there is no comparison of a room 'nowhere': there is one of uncertainty" in err
    status, out, err = paperworks("compare", "hydra", "--room", "uncertainty")
    assert status == 2 and "not both" in err
    status, out, err = paperworks("compare", "--room", "uncertainty", "--speed", "3")
    assert status == 2 and "no option speed" in err
