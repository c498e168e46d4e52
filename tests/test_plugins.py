"""A paper of somebody else's: the example package, installed and included, and what is told of plugins that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "coin_flip"
SOURCE = EXAMPLE / "src" / "fair_bits"

# Commands in one process, as a user types them: each one's exit status, output and errors.
SCRIPT = """
import contextlib, io, json, sys
from paperworks import cli
told = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["paperworks", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
    told.append((status, out.getvalue(), err.getvalue()))
sys.stdout.write(json.dumps(told))
"""


def packages(path: Path | None) -> str:
    """The folder of packages before those that this process looks in."""
    return os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH")]))


def commands(*typed: str, folder: Path, path: Path | None = None, include: str = "") -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each command, in one new process that has `path` among its packages."""
    environment = {
        **os.environ, "PYTHONPATH": packages(path), "PAPERWORKS_INCLUDE": include, "COLUMNS": "160",
        "PAPERWORKS_STORE": f"sqlite:///{folder}/runs.db", "XDG_DATA_HOME": str(folder),
    }  # fmt: skip
    words = json.dumps([one.split() for one in typed])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=words,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=True,
    )
    return [(status, out, err) for status, out, err in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds the example, by pip where its build backend is at hand."""
    target = tmp_path_factory.mktemp("packages")
    if find_spec("hatchling"):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
        subprocess.run([*command, str(target), str(EXAMPLE)], check=True)
        return target
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copytree(SOURCE, target / SOURCE.name, ignore=shutil.ignore_patterns("__pycache__"))
    told = target / f"fair_bits-{project['version']}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["paperworks.recipes"].items()]
    (told / "entry_points.txt").write_text("\n".join(["[paperworks.recipes]", *lines, ""]))
    return target


# Known everywhere


@pytest.fixture(scope="module")
def told(installed, tmp_path_factory):
    """What each command says of the installed example."""
    typed = (
        "list --room chance",
        "list --json",
        "search --words --json fair bits unfair coin",
        "show coin-flip",
        "show peres --json",
        "claims coin-flip --json",
        "claims --room chance",
        "run coin-flip --scale tiny --depth 3",
        "results coin-flip --json",
        "run coin-flip --help",
        "run coin-flip --heads 2 --scale tiny",
    )
    folder = tmp_path_factory.mktemp("told")
    typed = tuple(one.replace("fair bits unfair coin", "fair-bits-unfair-coin") for one in typed)
    return {"folder": folder, **dict(zip(typed, commands(*typed, folder=folder, path=installed), strict=True))}


def test_a_plugin_is_listed_in_a_room_of_its_own(told):
    status, out, err = told["list --room chance"]
    assert status == 0 and err == ""
    assert "draw fair numbers from unfair ones" in out and "coin-flip" in out
    listed = json.loads(told["list --json"][1])
    [coin] = [paper for paper in listed if paper["slug"] == "coin-flip"]
    assert (
        len(listed) == 71
        and coin["status"] == "measured"
        and coin["origin"] == "the plugin fair-bits (fair_bits.coin_flip)"
    )


def test_a_plugin_is_found_by_what_it_does(told):
    status, out, _ = told["search --words --json fair-bits-unfair-coin"]
    assert status == 0 and json.loads(out)[0]["slug"] == "coin-flip"


def test_a_plugins_card_says_how_to_import_its_method(told):
    status, out, _ = told["show coin-flip"]
    assert status == 0 and "from fair_bits import peres" in out and "paperworks run coin-flip" in out
    assert "Yuval Peres" in out and "chance: draw fair numbers from unfair ones" in out
    assert json.loads(told["show peres --json"][1])["slug"] == "coin-flip"


def test_a_plugins_claims_have_verdicts_and_its_own_tests_prove_them(told):
    claims = json.loads(told["claims coin-flip --json"][1])["claims"]
    assert [claim["verdict"] for claim in claims] == ["reproduced", "proved"]
    assert claims[1]["why"] == "a test of the plugin fair-bits (fair_bits.coin_flip) shows it"
    assert told["claims --room chance"][1].splitlines()[-1] == "2 claims: 1 reproduced, 1 proved"


def test_a_plugins_recipe_runs_and_what_it_measured_is_kept(told):
    status, out, err = told["run coin-flip --scale tiny --depth 3"]
    assert status == 0 and "Peres, depth 3" in out and "says nothing of the claims" in out and "Traceback" not in err
    [run] = json.loads(told["results coin-flip --json"][1])
    figures = {(one["name"], one["series"]): one["value"] for one in run["measurements"]}
    # pq with p = 0.7.
    assert figures["bits a flip, in the long run", "von Neumann's pairs"] == pytest.approx(0.21)
    assert run["parameters"]["flips"] == 200 and list(run["artefacts"]) == ["figure"]
    assert "How often the coin falls on heads." in told["run coin-flip --help"][1]


def test_what_a_plugin_measured_is_shown_when_it_is_gone(told):
    [run] = json.loads(told["results coin-flip --json"][1])
    (status, shown, err), (listed, runs, _) = commands(f"results {run['id']}", "results", folder=told["folder"])
    assert status == 0 and err == "" and "who brought coin-flip is not here any more" in shown and "0.21" in shown
    assert listed == 0 and "coin-flip" in runs


def test_the_page_knows_a_plugin(installed, tmp_path):
    pytest.importorskip("fastapi")
    script = (
        "import json\nfrom paperworks.papers import load_cards\nload_cards()\n"
        "from fastapi.testclient import TestClient\nfrom paperworks.page.app import create_app\n"
        f"app = create_app('sqlite:///{tmp_path}/runs.db', meaning=False, base_url='http://127.0.0.1:8000', rates={{}})\n"
        "client = TestClient(app, base_url='http://127.0.0.1:8000')\n"
        "pages = ['/rooms/chance', '/search?q=unfair+coin', '/papers/card:coin-flip', '/rooms']\n"
        "print(json.dumps([(page.status_code, page.text) for page in map(client.get, pages)]))\n"
        "app.state.runner.close()\napp.state.store.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": packages(installed)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    room, found, paper, rooms = json.loads(done.stdout.splitlines()[-1])
    assert {status for status, _ in (room, found, paper, rooms)} == {200}
    assert "draw fair numbers from unfair ones" in room[1] and "draw fair numbers from unfair ones" in rooms[1]
    assert "Iterating Von Neumann" in found[1] and "Run it" in paper[1]


def test_the_examples_own_tests_pass(installed):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", str(EXAMPLE)]
    # Without the plugins of this project's tests, which take their time to load.
    environment = {**os.environ, "PYTHONPATH": packages(installed), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*command, str(EXAMPLE / "tests")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout


# What was measured


def test_a_plugin_brings_its_figures_and_the_verdicts_follow_from_them(installed, tmp_path):
    typed = ("show coin-flip --json", "claims coin-flip --json", "list --room chance", "show coin-flip")
    shown, claims, listed, card = commands(*typed, folder=tmp_path, path=installed)
    told = json.loads(shown[1])
    assert told["status"] == "measured" and told["records"][0]["scale"] == "default"
    assert [claim["verdict"] for claim in json.loads(claims[1])["claims"]] == ["reproduced", "proved"]
    assert "measured: 2 of 2 claims hold" in " ".join(listed[1].split()) and "2 of 2 claims hold" in card[1]


def test_a_record_that_cannot_be_read_is_told_in_a_line_and_a_tiny_one_says_nothing(installed, tmp_path):
    own = tmp_path / "packages"
    shutil.copytree(installed, own)
    kept = own / "fair_bits" / "coin-flip.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "scale": "tiny"}))
    (listed, shown) = commands("list --room chance", "show coin-flip", folder=tmp_path, path=own)
    assert "runs, tried at scale tiny" in " ".join(listed[1].split())
    assert (
        "Scale tiny shows that it works; it says nothing of the claims." in shown[1]
        and "1 of 2 claims hold" in shown[1]
    )
    kept.write_text("{}")
    [(status, out, err)] = commands("list --room chance --json", folder=tmp_path, path=own)
    assert status == 0 and json.loads(out)[0]["status"] == "runs"
    assert err.startswith(
        "paperworks: a record of the plugin fair-bits (fair_bits.coin_flip) is left out: coin-flip.json is not"
    )
    assert len(err.splitlines()) == 1


# A folder in its place

CARD = """
slug = "SLUG"
title = "A die that is loaded"
year = 2025
room = "chance"
aim = "draw fair numbers from unfair ones"
names = ["die"]
summary = "Throws a die. It is loaded."
tags = ["die"]
"""
RECIPE = """
from helper import SIDES
from paperworks.lab import Run, recipe

@recipe("SLUG", columns=("bits a flip",), tiny={"throws": 5})
def throw(run: Run, throws: int = 50) -> None:
    '''Throws of a die.'''
    import helper

    run.ratio("bits a flip, ratio", method=[2.0, 3.0], baseline=[1.0, 1.0], series="die", against="von Neumann's pairs")
    run.record("sides", helper.SIDES, better="higher")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a card, its recipe, and what that imports from beside it."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "loaded-die.toml").write_text(CARD.replace("SLUG", "loaded-die"))
    (own / "loaded_die.py").write_text(RECIPE.replace("SLUG", "loaded-die"))
    (own / "helper.py").write_text("SIDES = 6\n")
    (own / "shelf.py").write_text("raise OSError('what no card is named for is not imported to find recipes')\n")
    return own


def test_a_folder_is_included_wherever_the_option_stands(folder, tmp_path):
    told = commands(
        f"--include {folder} show loaded-die", f"run loaded-die --scale tiny --json --include={folder}",
        f"compare coin-flip loaded-die --scale tiny --include {SOURCE} --include {folder}", folder=tmp_path,
    )  # fmt: skip
    assert [(status, err) for status, _, err in told[:1]] == [(0, "")]
    # A folder is no package, so that nothing is said of importing from it.
    assert "paperworks run loaded-die" in told[0][1] and "import" not in told[0][1]
    record = json.loads(told[1][1])
    assert record["measurements"][-1]["value"] == 6 and record["parameters"] == {"throws": 5}
    status, out, _ = told[2]
    assert status == 0 and "coin-flip (tiny): Peres" in out and "loaded-die (tiny): die" in out
    assert "says nothing of the claims" in out


def test_a_folder_is_included_by_the_environment_and_a_package_in_it_by_its_name(folder, tmp_path):
    include = os.pathsep.join((str(folder), str(SOURCE)))
    (status, out, _), (_, shown, _) = commands(
        "list --room chance --json", "show coin-flip", folder=tmp_path, include=include
    )
    assert status == 0 and [paper["slug"] for paper in json.loads(out)] == ["loaded-die", "coin-flip"]
    assert "from fair_bits import peres" in shown


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    told = commands("list --include nowhere", "list --include", folder=tmp_path)
    assert [status for status, *_ in told] == [2, 2]
    assert "nowhere' to include: give one with TOML cards and recipe modules" in told[0][2]
    assert told[1][2] == "paperworks: --include takes a folder with TOML cards and recipe modules\n"


# What does not fit


def test_two_papers_of_one_slug_are_told_in_a_sentence_that_names_both(folder, installed, tmp_path):
    (folder / "coin-flip.toml").write_text(CARD.replace("SLUG", "coin-flip"))
    [(status, out, err)] = commands(f"list --room chance --json --include {folder}", folder=tmp_path, path=installed)
    assert status == 0 and [paper["title"] for paper in json.loads(out)] == ["A die that is loaded"] * 2
    assert err == (
        f"paperworks: the paper 'coin-flip' of the plugin fair-bits (fair_bits.coin_flip) is left out: the folder {folder} brings "
        "one of that slug; rename one of them\n"
    )
    (folder / "coin-flip.toml").unlink()
    (folder / "hydra.toml").write_text(CARD.replace("SLUG", "hydra"))
    [(status, out, err)] = commands(f"show hydra --include {folder}", folder=tmp_path)
    assert status == 0 and "Sequentially-Dependent Draft Heads" in out
    assert err.startswith(
        f"paperworks: the paper 'hydra' of the folder {folder} is left out: Paperworks itself brings one"
    )


def test_a_broken_plugin_is_told_in_a_line_and_the_rest_goes_on(folder, installed, tmp_path):
    (folder / "loaded_die.py").write_text("raise OSError('broken\\non purpose')\n")
    (folder / "torn.toml").write_text("slug = \n")
    (folder / "attic.toml").write_text(CARD.replace("SLUG", "attic").replace("aim =", "# aim ="))
    [(status, out, err)] = commands(f"list --json --include {folder}", folder=tmp_path, path=installed)
    by_slug = {paper["slug"]: paper["status"] for paper in json.loads(out)}
    assert (
        status == 0
        and by_slug["coin-flip"] == "measured"
        and by_slug["loaded-die"] == "planned"
        and "attic" not in by_slug
    )
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("paperworks: ") for line in lines)
    assert f"the recipe loaded_die.py of the folder {folder} could not be loaded: OSError: broken on purpose" in err
    assert f"a card of the folder {folder} is left out: torn.toml is not valid TOML" in err
    assert "attic.toml: field 'room': there is no room 'chance', only decoding" in err


def test_a_recipe_without_a_card_is_left_out(installed, tmp_path):
    bare = tmp_path / "packages"
    shutil.copytree(installed, bare)
    (bare / "fair_bits" / "coin-flip.toml").unlink()
    [(status, _, err)] = commands("run coin-flip", folder=tmp_path, path=bare)
    assert status == 2 and "its paper 'coin-flip' has no card" in err and "there is no paper 'coin-flip'" in err
