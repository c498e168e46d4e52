"""What every metric of the room keeps to: order, splitting and processes change nothing, and bad input is one sentence."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torchmetrics import Metric, MetricCollection

import paperworks.representation as room
from paperworks.representation import NeuralCollapse, PosteriorCollapse, VariableActivity


@dataclass(frozen=True)
class Subject:
    """How to make a metric, what to show it, its figures as one vector, and how many samples alone tell nothing.

    Some are shown the first column of the data again before their figures are told.
    """

    make: Callable[[], Metric]
    data: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    figures: Callable[[Any], Tensor]
    few: int
    again: Callable[[Any, Tensor], None] = lambda metric, part: None


def _classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.arange(3).repeat(14)
    means = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    return means[labels] + 0.3 * torch.randn(42, 5, dtype=torch.float64, generator=generator), labels


def _posteriors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mu = torch.randn(42, 4, dtype=torch.float64, generator=generator) * torch.tensor([2.0, 1.0, 0.1, 0.0])
    return mu, torch.rand(42, 4, dtype=torch.float64, generator=generator) * 0.9 + 0.05


SUBJECTS = {
    "NeuralCollapse": Subject(
        lambda: NeuralCollapse(3, weight=torch.eye(3, 5), bias=torch.tensor([0.0, 0.3, 0.1])), _classes,
        lambda found: torch.stack([found[name] for name in sorted(found)]), few=2,
        again=lambda metric, part: metric.agree(part),
    ),
    "PosteriorCollapse": Subject(
        lambda: PosteriorCollapse(4), _posteriors,
        lambda report: torch.tensor([*report.kl, report.active_units, *report.below.ravel()]), few=0,
    ),
    "VariableActivity": Subject(
        lambda: VariableActivity(4), _posteriors,
        lambda report: torch.tensor(np.concatenate([report.mean_variance, report.mu_variance, report.covariance.ravel()])),
        few=1,
    ),
}  # fmt: skip


def told(subject: Subject, parts: list[tuple[Tensor, ...]]) -> Tensor:
    metric = subject.make()
    for part in parts:
        metric.update(*part)
    for part in parts:
        subject.again(metric, part[0])
    return subject.figures(metric.compute())


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-6, rtol=1e-6, equal_nan=True)


def test_every_metric_of_the_room_is_a_subject():
    exported = {name: getattr(room, name) for name in room.__all__}
    metrics = {name for name, value in exported.items() if isinstance(value, type) and issubclass(value, Metric)}
    assert metrics == set(SUBJECTS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_order_and_splitting_change_nothing(name):
    subject = SUBJECTS[name]
    data = subject.data(torch.Generator().manual_seed(0))
    whole = told(subject, [data])
    order = torch.randperm(42, generator=torch.Generator().manual_seed(1))
    for cuts in ([42], [1, 2, 30], [20]):
        parts = list(zip(*(column[order].tensor_split(cuts) for column in data), strict=True))
        assert torch.allclose(told(subject, parts), whole, atol=1e-6, rtol=1e-6, equal_nan=True)


# How many of the 42 samples the first of two processes sees, the second sees the others.
SHARES = {"both saw some": 20, "the second saw nothing": 42, "the first saw nothing": 0}


def _process(rank: int, folder: str) -> None:
    """What one of two processes is told of each subject, for each share."""
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found: dict[Any, Tensor] = {}
    for name, subject in SUBJECTS.items():
        data = subject.data(torch.Generator().manual_seed(0))
        for share, cut in SHARES.items():
            part = tuple(column[:cut] if rank == 0 else column[cut:] for column in data)
            metric = subject.make()
            with pytest.raises(ValueError):
                metric.compute()
            for times in (1, 2):
                if len(part[0]):
                    metric.update(*part)
                for _ in range(times):
                    subject.again(metric, part[0])
                found[name, share, times] = subject.figures(metric.compute())
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Tensor]]:
    folder = Path(tmp_path_factory.mktemp("processes"))
    multiprocessing.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_two_processes_are_told_what_both_saw(name, share, processes):
    data = SUBJECTS[name].data(torch.Generator().manual_seed(0))
    for times in (1, 2):
        expected = told(SUBJECTS[name], [data] * times)
        assert all(same(found[name, share, times], expected) for found in processes)


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_another_saw_is_merged(name):
    subject = SUBJECTS[name]
    data = subject.data(torch.Generator().manual_seed(0))
    one, other = subject.make(), subject.make()
    one.update(*(column[:20] for column in data))
    one.compute()
    other.update(*(column[20:] for column in data))
    one.merge_state(other)
    subject.again(one, data[0])
    assert same(subject.figures(one.compute()), told(subject, [data]))
    states = subject.make()
    states.update(*(column[:20] for column in data))
    states.merge_state(other.metric_state)
    subject.again(states, data[0])
    assert torch.equal(subject.figures(states.compute()), subject.figures(one.compute()))
    assert states.higher_is_better is False
    with pytest.raises(ValueError, match="takes in another"):
        one.merge_state(next(other.make() for key, other in SUBJECTS.items() if key != name))


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_call_tells_the_figures_of_the_batch_and_takes_it_in(name):
    subject = SUBJECTS[name]
    data = subject.data(torch.Generator().manual_seed(0))
    metric, fresh = subject.make(), subject.make()
    for part in zip(*(column.tensor_split([20]) for column in data), strict=True):
        fresh.reset()
        fresh.update(*part)
        assert same(subject.figures(metric(*part)), subject.figures(fresh.compute()))
    few = tuple(column[: subject.few] for column in data)
    assert subject.figures(metric(*few)).isnan().any()
    subject.again(metric, data[0])
    subject.again(metric, few[0])
    assert same(subject.figures(metric.compute()), told(subject, [data, few]))


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_call_that_is_refused_changes_nothing(name):
    subject = SUBJECTS[name]
    data = subject.data(torch.Generator().manual_seed(0))
    metric = subject.make()
    metric(*data)
    with pytest.raises(ValueError):
        metric(data[0] * torch.nan, *data[1:])
    subject.again(metric, data[0])
    assert same(subject.figures(metric.compute()), told(subject, [data]))
    metric.reset()
    with pytest.raises(ValueError), pytest.warns(UserWarning):
        metric.compute()


@pytest.mark.parametrize("name", SUBJECTS)
def test_collected_it_tells_what_it_does_alone(name):
    subject = SUBJECTS[name]
    data = subject.data(torch.Generator().manual_seed(0))
    collected = MetricCollection({"one": subject.make(), "other": subject.make()})
    for part in zip(*(column.tensor_split([20]) for column in data), strict=True):
        collected(*part)
    for metric in collected.values():
        subject.again(metric, data[0])
        assert same(subject.figures(metric.compute()), told(subject, [data]))


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize(
    "change",
    [
        lambda metric: pickle.loads(pickle.dumps(metric)), deepcopy, lambda metric: metric.clone(),
        lambda metric: metric.half(), lambda metric: metric.to("cpu", torch.bfloat16),
        lambda metric: metric.set_dtype(torch.float16),
    ],
    ids=["pickled", "copied", "cloned", "half", "to bfloat16", "set to float16"],
)  # fmt: skip
def test_copies_and_other_dtypes_lose_nothing(name, change):
    subject = SUBJECTS[name]
    first, second = zip(
        *(column.tensor_split([20]) for column in subject.data(torch.Generator().manual_seed(0))), strict=True
    )
    metric = change(subject.make())
    metric.update(*first)
    metric = change(metric)
    metric.update(*second)
    subject.again(metric, torch.cat([first[0], second[0]]))
    expected = told(subject, [first, second])
    assert torch.allclose(subject.figures(metric.compute()), expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fewer_digits_are_rounded_in_the_data_alone(name, dtype):
    subject = SUBJECTS[name]
    data = tuple(
        column.to(dtype) if column.is_floating_point() else column
        for column in subject.data(torch.Generator().manual_seed(0))
    )
    exact = tuple(column.double() if column.is_floating_point() else column for column in data)
    assert torch.allclose(told(subject, [data]), told(subject, [exact]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SUBJECTS)
def test_arrays_are_taken_as_tensors_are(name):
    subject = SUBJECTS[name]
    data = subject.data(torch.Generator().manual_seed(0))
    assert torch.equal(told(subject, [tuple(column.numpy() for column in data)]), told(subject, [data]))
    metric = subject.make()
    with pytest.raises((ValueError, TypeError)) as error:
        metric.update(np.full(data[0].shape, "text"), *data[1:])
    assert len(str(error.value).splitlines()) == 1 and "numbers" in str(error.value)


@pytest.mark.parametrize("name", room.__all__)
def test_signatures_read_well(name):
    for parameter in inspect.signature(getattr(room, name)).parameters.values():
        assert len(repr(parameter.default)) < 60, parameter


@pytest.mark.parametrize("name", SUBJECTS)
def test_reset_forgets(name):
    subject = SUBJECTS[name]
    metric = subject.make()
    metric.update(*subject.data(torch.Generator().manual_seed(5)))
    metric.reset()
    data = subject.data(torch.Generator().manual_seed(0))
    metric.update(*data)
    subject.again(metric, data[0])
    assert torch.equal(subject.figures(metric.compute()).nan_to_num(), told(subject, [data]).nan_to_num())


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("spoil", ["NaN", "infinity", "shape"])
def test_bad_values_are_one_sentence_and_change_nothing(name, spoil):
    subject = SUBJECTS[name]
    metric = subject.make()
    data = subject.data(torch.Generator().manual_seed(0))
    metric.update(*data)
    spoilt = data[0].clone()
    if spoil == "shape":
        spoilt = spoilt[:, :-1]
    else:
        spoilt[3, 1] = float("nan") if spoil == "NaN" else float("inf")
    with pytest.raises(ValueError) as error:
        metric.update(spoilt, *data[1:])
    assert len(str(error.value).splitlines()) == 1
    subject.again(metric, data[0])
    assert torch.allclose(subject.figures(metric.compute()), told(subject, [data]), equal_nan=True)


@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_seen_is_one_sentence(name):
    with pytest.raises(ValueError) as error, pytest.warns(UserWarning):
        SUBJECTS[name].make().compute()
    assert len(str(error.value).splitlines()) == 1
