"""The pages that the site makes: the reference names what there is, and a planned paper does not look as if it ran."""

from __future__ import annotations

import io
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from paperworks.lab.recipe import recipes
from paperworks.lab.records import status
from paperworks.papers import ROOMS, load_cards

ROOT = Path(__file__).parents[1]


class Page(io.StringIO):
    """A page that is still there when it is closed."""

    def close(self) -> None:
        """Keep it."""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """What is written, by name."""
    written: dict[str, Page] = {}
    made = SimpleNamespace(open=lambda name, mode: written.setdefault(name, Page()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(ROOT / "docs"))
        patch.setitem(sys.modules, "mkdocs_gen_files", made)
        # A simulation, which has its own tests.
        patch.setitem(sys.modules, "coverage", SimpleNamespace(coverage_table=lambda: ["| simulated |"]))
        runpy.run_path("docs/gen_pages.py")
    return {name: page.getvalue() for name, page in written.items()}


def test_planned_papers_stand_apart_without_command_figure_or_name_to_import(pages):
    assert set(pages) >= {f"rooms/{room}.md" for room in ROOMS}
    for paper in load_cards().values():
        runs, _, planned = pages[f"rooms/{paper.room}.md"].partition("\n## Planned\n")
        if status(paper) == "planned":
            assert f"### {paper.title} (planned)" in planned and paper.title not in runs
            assert ":::" not in planned and "verdict" not in planned and "do not run here yet" in planned
        else:
            assert f"## {' and '.join(paper.names)}\n" in runs and paper.title not in planned
            assert all(f"::: paperworks.{paper.room}.{name}" in runs for name in paper.names)


def test_every_command_and_every_option_of_a_recipe_is_in_the_reference(pages):
    page = pages["reference/command-line.md"]
    for command in (
        "list",
        "search",
        "show",
        "claims",
        "run",
        "compare",
        "results",
        "inspect",
        "generate",
        "bench",
        "serve",
    ):
        assert f"\n## paperworks {command}\n" in page
    assert "\n### paperworks ingest arxiv\n" in page and "`--include`" in page
    for slug, recipe in recipes().items():
        part = page.partition(f"\n### paperworks run {slug}\n")[2].partition("\n### ")[0]
        for name, parameter in recipe.parameters.items():
            row = next(line for line in part.splitlines() if line.startswith(f"| `--{name.replace('_', '-')}`"))
            assert parameter.help in row.replace("\\|", "|") and f"`{parameter.default}`" in row


def test_what_the_reference_names_is_there():
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference" / "python.md").read_text(), flags=re.MULTILINE)
    wanted = {"generate", "train_drafter", "Run", "recipe", "load_model", "load_dataset"}
    assert wanted <= {name.rpartition(".")[2] for name in named}
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__


def test_plugins_have_a_page_and_own_data_names_every_recipe(pages):
    assert pages["plugins.md"].startswith("# A paper of your own") and "--include" in pages["plugins.md"]
    assert "plugins.md" in pages["adding.md"] and "PAPERWORKS_INCLUDE" not in pages["adding.md"]
    told = (ROOT / "docs" / "own-data.md").read_text()
    for slug, recipe in recipes().items():
        line = next((line for line in told.splitlines() if line.startswith("| ") and slug in line), "")
        named = [
            name
            for name, parameter in recipe.parameters.items()
            if parameter.names and name not in ("draft", "text_model")
        ]
        assert line, f"{slug} is not in own-data.md"
        assert all(f"`--{name}`" in line for name in named), (slug, named)
