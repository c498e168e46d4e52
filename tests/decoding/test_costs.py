"""What a pass costs, and the tree that follows: many nodes where passes cost alike, none where each token costs its own."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch

from paperworks.decoding import (
    FSPAD,
    Chimera,
    Drafter,
    Hydra,
    Medusa,
    PassCosts,
    TreeShape,
    collect,
    costs,
    fit_tree,
    generate,
    pass_costs,
    rank_accuracy,
)
from paperworks.decoding.costs import Choice, choose_nodes, choose_tree, drafting_costs, fastest_tree, in_turn
from tests.decoding.conftest import TREE, make_model, scramble

ACCURACY = torch.tensor([[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.2, 0.1]])
KINDS = {
    "hydra": lambda model: Hydra.from_target(model, heads=3, tree=TREE),
    "hydra++": lambda model: Hydra.from_target(model, heads=3, tree=TREE, prefix_layer=True),
    "chimera": lambda model: Chimera.from_target(model, heads=3, tree=TREE),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.decoding.costs.user_cache_path", lambda name: tmp_path / name)


def data_of(model, rows=6):
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(40, (rows, 12), generator=generator).tolist()
    return collect(model, [(text[:2], text[2:]) for text in texts], progress=False)


def test_costs_lie_on_straight_lines_between_what_was_measured():
    measured = {1: 0.04, 2: 0.05, 4: 0.06, 8: 0.12}
    found = PassCosts(measured)
    for tokens in range(1, 9):
        expected = np.interp(tokens, list(measured), [cost / 0.04 for cost in measured.values()])
        assert found(tokens) == pytest.approx(expected)
    # Beyond, along the last of them.
    assert found(12) == pytest.approx((0.12 + 0.06) / 0.04)


def test_no_pass_costs_less_than_a_shorter_one():
    found = PassCosts({1: 2.0, 2: 1.9, 4: 3.0, 8: 2.8, 16: 4.0})
    assert dict(found.ratios) == {1: 1.0, 2: 1.0, 4: 1.5, 8: 1.5, 16: 2.0}


@pytest.mark.parametrize("wrong", [{}, {1: 1.0}, {2: 1.0, 4: 2.0}, {1: 0.0, 2: 1.0}])
def test_costs_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="costs are positive, of a pass over 1 token and of some over more"):
        PassCosts(wrong)


def test_where_passes_cost_alike_the_tree_is_as_large_as_is_tried():
    choice = fastest_tree(ACCURACY, lambda tokens: 1.0)
    # All 3 + 9 + 27 paths there are.
    assert len(choice.tree) == 40 and choice.gain == pytest.approx(choice.tokens)
    wide = torch.full((4, 10), 0.09)
    assert len(fastest_tree(wide, lambda tokens: 1.0).tree) == 64


def test_where_each_token_costs_its_own_pass_nothing_is_drafted():
    choice = fastest_tree(ACCURACY, lambda tokens: tokens)
    assert (len(choice.tree), choice.gain, choice.tokens, choice.cost) == (1, 1.0, 1.0, 1.0)
    assert str(choice) == "no drafting pays here: text is written plainly"


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.2, 0.35, 0.5, 0.61])
def test_no_tree_of_two_levels_gives_more_tokens_a_second(slope):
    accuracy = ACCURACY[:2, :2]
    paths = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]

    def gain(chosen):
        chances = [math.prod(accuracy[depth, rank].item() for depth, rank in enumerate(path)) for path in chosen]
        return (1 + sum(chances)) / (1 + slope * len(chosen))

    closed = [
        chosen
        for size in range(7)
        for chosen in itertools.combinations(paths, size)
        if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
    ]
    best = max(closed, key=gain)
    choice = fastest_tree(accuracy, lambda tokens: 1 + slope * (tokens - 1))
    assert choice.gain == pytest.approx(gain(best)) and set(choice.tree.paths) == set(best)


def test_what_drafting_costs_counts():
    # Levels hold 0.9, 0.72 and 0.504 accepted tokens in all.
    found = {
        price: fastest_tree(ACCURACY, lambda tokens: 1.0, lambda trees: [price * tree.depth for tree in trees])
        for price in (0.0, 0.4, 0.7, 1.0)
    }
    assert [choice.tree.depth for choice in found.values()] == [3, 2, 1, 0]
    assert found[0.4].gain == pytest.approx(2.62 / 1.8) and found[0.7].gain == pytest.approx(1.9 / 1.7)
    assert found[0.7].tree.paths == ((0,), (1,), (2,)) and found[0.7].cost == 1.7


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_tree_without_nodes_is_plain_decoding(kind, tmp_path):
    model = make_model()
    drafter, data = scramble(KINDS[kind](model)), data_of(model)
    fit_tree(drafter, model, data, costs=PassCosts({1: 1.0, 2: 3.0}), progress=False)
    assert len(drafter.tree) == 1
    drafter.save_pretrained(tmp_path)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = generate(model, prompts, max_new_tokens=9, eos_token_id=[])
    for one in (drafter, Drafter.from_pretrained(tmp_path, model)):
        result = generate(model, prompts, drafter=one, max_new_tokens=9, eos_token_id=[])
        assert result.new_tokens == expected.new_tokens
        assert (result.statistics.drafted, result.statistics.target_calls) == (0, 8)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_tree_is_fitted_to_costs_where_no_number_of_nodes_is_given(greedy, capsys):
    model = make_model()
    drafter, data = scramble(KINDS["hydra"](model)), data_of(model)
    table = PassCosts({1: 1.0, 2: 1.01, 64: 1.2})
    found = fit_tree(drafter, model, data, costs=table, ranks=4, greedy=greedy)
    assert torch.equal(found, rank_accuracy(drafter, model, data, ranks=4, greedy=greedy))
    assert drafter.tree.paths == fastest_tree(found, table).tree.paths and len(drafter.tree) > 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"Hydra: {len(drafter.tree) - 1} nodes, ")


def test_the_last_sequences_are_judged_where_there_are_many(monkeypatch):
    model = make_model()
    monkeypatch.setattr("paperworks.decoding.training._JUDGED", 2)
    drafter, data = scramble(KINDS["hydra"](model)), data_of(model, rows=5)
    found = fit_tree(drafter, model, data, costs=lambda tokens: 1.0, progress=False)
    assert torch.equal(found, rank_accuracy(drafter, model, data.split(2)[1], greedy=True))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("best", [None, 20, 10])
def test_fewer_tokens_are_drafted_where_that_is_faster(kind, best, monkeypatch):
    model = make_model()
    drafter, data, tried = scramble(KINDS[kind](model)), data_of(model), []

    def choose(drafter, model, accuracy, costs):
        count = None if drafter.vocabulary is None else len(drafter.vocabulary)
        tried.append((count, drafter.scored))
        return Choice(TreeShape([(0,), (1,), (0, 0)]), 2.0 if count == best else 1.5, 2.0, 1.0)

    monkeypatch.setattr("paperworks.decoding.training._VOCABULARIES", (80, 40, 20, 10))
    monkeypatch.setattr("paperworks.decoding.training.choose_tree", choose)
    fit_tree(drafter, model, data, progress=False)
    assert tried == [(None, 40), (20, 20), (10, 10)]
    kept = None if drafter.vocabulary is None else drafter.vocabulary.tolist()
    assert kept == (None if best is None else data.frequent_tokens(best).tolist())
    assert drafter.scored == (best or 40)
    prompt = torch.tensor([[1, 2, 3]])
    texts = [generate(model, prompt, drafter=d, max_new_tokens=8, eos_token_id=[]).new_tokens for d in (drafter, None)]
    assert texts[0] == texts[1]


def test_a_drafter_that_was_given_its_tokens_keeps_them(monkeypatch):
    model = make_model()
    monkeypatch.setattr("paperworks.decoding.training._VOCABULARIES", (10, 5))
    given = torch.arange(20)
    drafter = scramble(Medusa.from_target(model, heads=2, tree=[(0,)], vocabulary=given))
    fit_tree(drafter, model, data_of(model), costs=lambda tokens: 1.0, progress=False)
    assert torch.equal(drafter.vocabulary, given)
    own = scramble(Hydra.from_target(model, heads=2, tree=[(0,)], tie_lm_head=False))
    fit_tree(own, model, data_of(model), costs=lambda tokens: 1.0, progress=False)
    assert own.vocabulary is None


def test_trees_of_no_fixed_shape_are_not_fitted():
    model = make_model()
    with pytest.raises(TypeError, match="the trees of a FSPAD have no fixed shape that could be fitted"):
        fit_tree(FSPAD.from_target(model), model, data_of(model))


def test_passes_are_measured_once_a_model_and_machine(monkeypatch, tmp_path):
    model, measured = make_model(dtype=torch.float32), []

    def in_turn(calls, device, rounds):
        measured.append(len(calls))
        for call in calls:
            call()
        return [0.1 * (1 + index) for index in range(len(calls))]

    monkeypatch.setattr(costs, "in_turn", in_turn)
    first = pass_costs(model)
    # The context of this model holds 64 tokens, of which a text takes half.
    assert dict(first.ratios) == {1: 1.0, 2: pytest.approx(2.0)}
    assert pass_costs(copy.deepcopy(model)) == first and len(measured) == 1
    changes = {
        "weights": lambda: make_model("qwen2", dtype=torch.float32),
        "dtype": lambda: copy.deepcopy(model).double(),
    }
    for number, change in enumerate(changes.values(), 2):
        pass_costs(change())
        assert len(measured) == number
    for name, value in (("name", "Other Chip"), ("instructions", "Other")):
        monkeypatch.setattr(f"paperworks.processor.{name}", lambda value=value: value)
        pass_costs(model)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    pass_costs(model)
    assert len(measured) == 6
    # What is not whole is measured anew.
    for path in (tmp_path / "paperworks" / "costs").iterdir():
        path.write_text(path.read_text()[:-9])
    pass_costs(model)
    assert len(measured) == 7


def test_what_is_measured_is_a_table_of_costs():
    found = pass_costs(make_model(dtype=torch.float32), rounds=2)
    assert found(1) == 1.0 and all(found(n) <= found(n + 1) for n in range(1, 9))


def test_a_choice_is_kept_until_the_drafter_or_its_accuracy_changes(monkeypatch, tmp_path):
    model = make_model(dtype=torch.float32)
    drafter, chosen = scramble(KINDS["chimera"](model)), []
    before = drafter.tree

    def fastest(accuracy, table, drafting):
        trees = [TreeShape([(0,)]), TreeShape(TREE)]
        assert all(cost > 0 for cost in drafting(trees)) and table(1) == 1.0
        chosen.append(accuracy)
        return Choice(trees[1], 1.4, 2.1, 1.5)

    monkeypatch.setattr(costs, "fastest_tree", fastest)
    first = choose_tree(drafter, model, ACCURACY)
    assert choose_tree(drafter, model, ACCURACY).gain == first.gain == 1.4
    assert first.tree.paths == TreeShape(TREE).paths and len(chosen) == 1 and drafter.tree is before
    choose_tree(drafter, model, ACCURACY / 2)
    choose_tree(scramble(KINDS["hydra"](model)), model, ACCURACY)
    assert len(chosen) == 3
    kept = [json.loads(path.read_text())["measured"] for path in (tmp_path / "paperworks" / "costs").iterdir()]
    assert sum("paths" in one for one in kept) == 3


@pytest.mark.parametrize(("slope", "wanted"), [(0.01, (16, 3.0 / 1.36)), (0.1, (4, 2.2 / 1.6)), (0.6, (0, 1.0))])
def test_nodes_of_a_dynamic_tree_are_chosen_likewise(slope, wanted, monkeypatch):
    model = make_model(dtype=torch.float32)
    drafter = scramble(FSPAD.from_target(model, nodes=6, depth=3, top_k=2))
    monkeypatch.setattr(costs, "pass_costs", lambda model: PassCosts({1: 1.0, 101: 1 + 100 * slope}))
    monkeypatch.setattr(costs, "drafting_costs", lambda drafter, model, sizes, of: [0.2] * len(sizes))
    assert choose_nodes(drafter, model, {4: 2.2, 8: 2.6, 16: 3.0}) == (wanted[0], pytest.approx(wanted[1]))
    assert drafter.nodes == 6


def test_fspad_without_nodes_drafts_nothing(tmp_path):
    model = make_model()
    drafter = scramble(FSPAD.from_target(model, nodes=6, depth=3, top_k=2))
    assert all(cost > 0 for cost in drafting_costs(drafter, model, [4, 8], of="nodes", rounds=1)) and drafter.nodes == 6
    drafter.nodes = 0
    drafter.save_pretrained(tmp_path)
    prompt = torch.tensor([[1, 2, 3]])
    result = generate(
        model, prompt, drafter=Drafter.from_pretrained(tmp_path, model), max_new_tokens=9, eos_token_id=[]
    )
    assert result.new_tokens == generate(model, prompt, max_new_tokens=9, eos_token_id=[]).new_tokens
    assert result.statistics.drafted == 0


def test_drafting_of_most_trees_is_told_from_those_of_their_depth(monkeypatch):
    trees = [TreeShape.best(ACCURACY[:depth], nodes) for depth in (1, 2, 3) for nodes in range(depth, 3 * depth + 1)]
    asked = []

    def measured(drafter, model, some):
        asked.extend(some)
        return [10.0 * tree.depth + len(tree) for tree in some]

    monkeypatch.setattr(costs, "drafting_costs", measured)
    found = costs._between(trees, None, None)
    assert found == pytest.approx([10.0 * tree.depth + len(tree) for tree in trees])
    assert len(asked) == len(set(map(id, asked))) <= 9 < len(trees)


@pytest.mark.parametrize("kind", list(KINDS))
def test_drafting_is_measured_without_leaving_a_trace(kind):
    model = make_model(dtype=torch.float32)
    drafter = scramble(KINDS[kind](model))
    before = drafter.tree
    found = drafting_costs(drafter, model, [TreeShape([(0,)]), TreeShape(TREE)], rounds=1)
    assert len(found) == 2 and min(found) > 0 and drafter.tree is before


def test_calls_are_timed_in_turn_and_the_median_counts(monkeypatch):
    made, now = [], [0.0]
    takes = {"a": iter([9, 1, 2, 9]), "b": iter([9, 5, 4, 6])}
    monkeypatch.setattr(costs, "perf_counter", lambda: now[0])

    def call(name):
        def work():
            made.append(name)
            now[0] += next(takes[name])

        return work

    assert in_turn([call("a"), call("b")], torch.device("cpu"), 3) == [2, 5]
    assert "".join(made) == "abababab"


def test_what_a_drafter_of_another_kind_gains_is_timed_once(tmp_path, monkeypatch):
    from paperworks.decoding import RecursiveSpeculation, StochasticBeam
    from paperworks.decoding.costs import drafting_gain
    from paperworks.hub import load_model

    monkeypatch.setattr("paperworks.decoding.costs.user_cache_path", lambda name: tmp_path / name)
    model, _ = load_model("tiny-random-llama")
    drafter = RecursiveSpeculation.from_target(model, draft=1, tree=StochasticBeam(2, 2))
    seconds = iter([[2.0, 1.0], [9.0, 1.0]])
    monkeypatch.setattr(
        "paperworks.decoding.costs.in_turn",
        lambda calls, device, rounds: [call() and 0 for call in calls] and next(seconds),
    )
    prompt = torch.tensor([[1, 2, 3]])
    assert drafting_gain(drafter, model, prompt) == 2.0 == drafting_gain(drafter, model, prompt)
    # Behind another text it may be another.
    assert drafting_gain(drafter, model, torch.tensor([[4, 5]])) == 9.0
