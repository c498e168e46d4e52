"""What every metric of the room keeps to: order, splitting and processes change nothing, and bad input is one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

import paperworks.representation as room
from paperworks.representation import NeuralCollapse, PosteriorCollapse, VariableActivity


@dataclass(frozen=True)
class Subject:
    """How to make a metric, what to show it, and its figures as one vector."""

    make: Callable[[], Metric]
    data: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    figures: Callable[[Any], Tensor]


def _classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.arange(3).repeat(14)
    means = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    return means[labels] + 0.3 * torch.randn(42, 5, dtype=torch.float64, generator=generator), labels


def _posteriors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mu = torch.randn(42, 4, dtype=torch.float64, generator=generator) * torch.tensor([2.0, 1.0, 0.1, 0.0])
    return mu, torch.rand(42, 4, dtype=torch.float64, generator=generator) * 0.9 + 0.05


SUBJECTS = {
    "NeuralCollapse": Subject(
        lambda: NeuralCollapse(3), _classes, lambda found: torch.stack([found[name] for name in sorted(found)])
    ),
    "PosteriorCollapse": Subject(
        lambda: PosteriorCollapse(4), _posteriors,
        lambda report: torch.tensor([*report.kl, report.active_units, *report.below.ravel()]),
    ),
    "VariableActivity": Subject(
        lambda: VariableActivity(4), _posteriors,
        lambda report: torch.tensor(np.concatenate([report.mean_variance, report.mu_variance, report.covariance.ravel()])),
    ),
}  # fmt: skip


def told(subject: Subject, parts: list[tuple[Tensor, ...]]) -> Tensor:
    metric = subject.make()
    for part in parts:
        metric.update(*part)
    return subject.figures(metric.compute())


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


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_two_processes_saw_adds_up(name):
    subject = SUBJECTS[name]
    data = subject.data(torch.Generator().manual_seed(0))
    halves = [subject.make(), subject.make()]
    for half, part in zip(halves, zip(*(column.tensor_split(2) for column in data), strict=True), strict=True):
        half.update(*part)
    # What torchmetrics does once it has gathered the states of all processes.
    for state, reduce in halves[0]._reductions.items():
        setattr(halves[0], state, reduce(torch.stack([getattr(half, state) for half in halves])))
    both = subject.figures(halves[0].compute())
    assert torch.allclose(both, told(subject, [data]), atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", SUBJECTS)
def test_reset_forgets(name):
    subject = SUBJECTS[name]
    metric = subject.make()
    metric.update(*subject.data(torch.Generator().manual_seed(5)))
    metric.reset()
    data = subject.data(torch.Generator().manual_seed(0))
    metric.update(*data)
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
    assert torch.allclose(subject.figures(metric.compute()), told(subject, [data]), equal_nan=True)


@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_seen_is_one_sentence(name):
    with pytest.raises(ValueError) as error, pytest.warns(UserWarning):
        SUBJECTS[name].make().compute()
    assert len(str(error.value).splitlines()) == 1
