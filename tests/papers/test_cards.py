"""The seventy cards, and what happens to a bad one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from paperworks.papers import ROOMS, CardError, UsageError, get, load_cards

NAMES = {
    65: "Hydra", 23: "Chimera", 31: "FSPAD", 33: "RecursiveSpeculation", 49: "RelaxedAcceptance", 60: "SuperposedDecoding",
    66: "EntropyAdaptiveDecoding", 27: "TemporalFusion", 41: "DynamicInference", 35: "NextBlockPrediction",
    69: "ConditionalBeamSearch HiddenStateOptimization", 56: "ShardedAttention",
    32: "DualChunkAttention VerticalSlashAttention", 36: "Combiner", 34: "PyramidDrop", 43: "TempScale",
    67: "PowerLawGraphAttention", 21: "GradualMagnitudePruning", 22: "ProgressiveGradientFlow", 17: "MaskLLM", 29: "EvoPress",
    37: "LoRAPrune", 70: "ProSparse", 19: "SparseSubspaceVI", 58: "TurboVBI", 44: "ReadMe", 51: "FactorLLM",
    47: "MixtureCompressor", 63: "CompressedExperts", 52: "CorDA", 24: "fast_lora_gradient", 15: "DualHeadDistillation",
    42: "SinkhornDistillation", 28: "RobustActiveDistillation", 53: "WeakToStrong", 2: "ShrinkMatch",
    8: "LabelProportionClassifier", 9: "RePRI", 10: "PrototypicalContinualLearner SequentialHMC", 16: "NIWMeta", 18: "FedLoGe",
    48: "HalfspaceTesterLearner", 1: "DeepKernelMachine", 3: "PriorFittedNetwork", 5: "DistributionTransformer",
    6: "ScaleMixtureNNGPRegressor ScaleMixtureNNGPClassifier", 14: "FunctionalTucker", 26: "vi", 50: "FunctionalPrior", 59: "CertifiedConformalClassifier",
    13: "BNNSurrogate", 25: "SelfTuningNetwork", 64: "FeatureLearningLimit mup", 11: "MonotoneDBM", 12: "MarginalizationModel",
    40: "PerturbedLikelihood", 62: "DiffusionModel", 20: "FractionalSDE", 30: "PVRNN", 54: "continual", 55: "PointerNetwork",
    68: "TSDiff", 4: "PosteriorCollapse", 45: "VariableActivity", 7: "near_collapse", 57: "NeuralCollapse",
    38: "PretrainedFeatures", 39: "WassersteinDependency", 46: "CauchySchwarzBottleneck", 61: "advise",
}  # fmt: skip

CARD = """
number = 1
slug = "one"
title = "One"
year = 2024
room = "decoding"
names = ["One"]
summary = "It does. It is done so."
tags = ["one"]
[[claims]]
metric = "speed"
value = 2.0
setting = "here"
source = "abstract"
"""


def test_there_are_seventy_in_order():
    assert [paper.number for paper in load_cards().values()] == list(range(1, 71))


def test_public_names_are_those_of_the_design():
    # NeuralCollapse serves two papers; each card names its own part first.
    for paper in load_cards().values():
        assert set(NAMES[paper.number].split()) <= set(paper.names), paper.slug


@pytest.mark.parametrize("slug", list(load_cards()))
def test_card_is_whole(slug):
    paper = load_cards()[slug]
    assert paper.room in ROOMS
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", paper.summary.strip())
    assert len(sentences) == 2, sentences
    assert all(tag == tag.lower() for tag in paper.tags)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.toml").write_text(CARD)
    return tmp_path


@pytest.mark.parametrize("slug", list(load_cards()))
def test_every_card_names_its_authors(slug):
    authors = get(slug).authors
    assert authors and len(set(authors)) == len(authors)
    for name in authors:
        assert re.fullmatch(r"[^\W\d_][^,\d]*[ ][^,\d]*[^\W\d_]{2,}", name), f"{name!r} is no full name"


def test_good_card_loads(folder):
    assert load_cards(folder)["one"].claims[0].value == 2.0


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('title = "One"\n', "", "one.toml: field 'title': Field required"),
        ("year = 2024", 'year = "soon"', "field 'year'"),
        ('room = "decoding"', 'room = "attic"', "field 'room': there is no room 'attic'"),
        ('tags = ["one"]', 'tags = ["one"]\ncolour = "red"', "field 'colour'"),
        ('title = "One"', 'title = "One"\narxiv = "24.1"', "field 'arxiv'"),
        ('slug = "one"', 'slug = "two"', "field 'slug': it must be the file's name"),
        ('source = "abstract"', "", "field 'claims.0.source'"),
        ("number = 1", "number = ", "not valid TOML"),
        (
            'room = "decoding"',
            'room = "decoding"\naim = "write"',
            "field 'room': the room 'decoding' has its aim already",
        ),
        ('room = "decoding"', 'room = "The attic"\naim = "climb"', "field 'room'"),
    ],
)
def test_bad_card_is_refused_by_file_and_field(folder, old, new, words):
    (folder / "one.toml").write_text(CARD.replace(old, new))
    with pytest.raises(CardError) as error:
        load_cards(folder)
    assert str(error.value).startswith("one.toml") and words in str(error.value)


def test_a_room_of_ones_own_comes_with_its_aim(folder):
    (folder / "one.toml").write_text(CARD.replace('room = "decoding"', 'room = "attic"\naim = "keep things"'))
    paper = load_cards(folder)["one"]
    assert (paper.room, paper.aim) == ("attic", "keep things")


def test_names_are_imported_from_the_room_unless_a_plugin_says_otherwise(folder):
    paper = load_cards(folder)["one"]
    assert paper.imports == ["from paperworks.decoding import One"]
    assert paper.model_copy(update={"origin": "the folder x"}).imports == []
    assert paper.model_copy(update={"origin": "the plugin x", "module": "ones"}).imports == ["from ones import One"]


def test_two_cards_of_one_number_are_refused(folder):
    (folder / "two.toml").write_text(CARD.replace('"one"\ntitle', '"two"\ntitle'))
    with pytest.raises(CardError, match="field 'number'"):
        load_cards(folder)


@pytest.mark.parametrize("name", ["hydra", "Hydra", "HYDRA", "2402.05109", "2402.05109v2", "65"])
def test_paper_is_found_by_any_of_its_names(name):
    assert get(name).number == 65


def test_unknown_paper_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean hydra"):
        get("hidra")
    with pytest.raises(UsageError, match="paperworks list"):
        get("zzzzzz")


def test_cards_load_without_torch():
    code = "import sys, paperworks.papers as p; p.load_cards(); assert not {'torch', 'numpy', 'sqlalchemy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
