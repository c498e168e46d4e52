"""Programmable variational inference (arXiv 2406.15742): objectives as programs, a gradient strategy for every choice.

Model and guide are Python functions under `@program` which make named choices by `sample`, each with its own strategy:
`Reparam`, `Reinforce`, `Enum`, `MVD` or `Implicit`. The objective is a program too: `elbo`, `iwelbo` and the others, or one of your own
under `@expectation`, from `simulate` and `log_density`. What comes out is an unbiased value, and through `.backward()` an unbiased
gradient. Choices can be summed out (`Marginal`) and conditioned on (`Normalize`) within objectives.

Runs are vectorised: densities have one entry for each draw and item of a batch, values of `Enum` lie in a dimension before
these, and particles in one too. Of what it costs beside a gradient written by hand the most are the checks of torch.distributions;
`validate_args=False` there saves them in a program that is known to be right.

Example:
    >>> import torch
    >>> from torch.distributions import Bernoulli, Normal
    >>> from paperworks.uncertainty import vi
    >>> @vi.program
    ... def model():
    ...     rain = vi.sample("rain", Bernoulli(torch.tensor(0.2)))
    ...     vi.sample("wet", Bernoulli(0.1 + 0.8 * rain))
    >>> @vi.program
    ... def guide(logit):
    ...     vi.sample("rain", Bernoulli(logits=logit), vi.Enum())
    >>> logit = torch.zeros((), requires_grad=True)
    >>> step = torch.optim.SGD([logit], lr=2.0)
    >>> for _ in range(100):
    ...     step.zero_grad()
    ...     (-vi.elbo(model, guide, {"wet": 1.0}, guide_args=(logit,)).surrogate()).backward()
    ...     step.step()
    >>> round(logit.sigmoid().item(), 4), round(0.2 * 0.9 / (0.2 * 0.9 + 0.8 * 0.1), 4)
    (0.6923, 0.6923)
"""

from paperworks.uncertainty.vi.estimator import Estimator, expectation
from paperworks.uncertainty.vi.objectives import diwhvi, elbo, hvi_elbo, iwelbo, iwhvi, p_wake, q_wake, symmetric
from paperworks.uncertainty.vi.programs import (
    SIR,
    Density,
    Marginal,
    Normalize,
    Program,
    Trace,
    add_cost,
    log_density,
    minibatch,
    program,
    replicate,
    sample,
    simulate,
)
from paperworks.uncertainty.vi.strategies import MVD, Enum, Implicit, Reinforce, Reparam, Strategy

__all__ = [
    "MVD",
    "SIR",
    "Density",
    "Enum",
    "Estimator",
    "Implicit",
    "Marginal",
    "Normalize",
    "Program",
    "Reinforce",
    "Reparam",
    "Strategy",
    "Trace",
    "add_cost",
    "diwhvi",
    "elbo",
    "expectation",
    "hvi_elbo",
    "iwelbo",
    "iwhvi",
    "log_density",
    "minibatch",
    "p_wake",
    "program",
    "q_wake",
    "replicate",
    "sample",
    "simulate",
    "symmetric",
]
