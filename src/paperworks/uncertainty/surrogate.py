"""Estimators of this room as BoTorch models, so that Bayesian optimisation takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from botorch.models.model import Model
from botorch.posteriors import Posterior
from torch import Tensor


class SurrogateModel(Model):
    """A fitted estimator as a BoTorch model over features in the user's own units.

    Args:
        posterior: Of features (b1 x ... x n x d), the posterior of n targets for each batch, with shape b1 x ... x n x m;
            differentiable in the features. Its second argument says whether noise is included.
        num_outputs: m.
    """

    def __init__(self, posterior: Callable[[Tensor, bool], Posterior], num_outputs: int = 1) -> None:
        super().__init__()
        self._of = posterior
        self._outputs = num_outputs

    @property
    def num_outputs(self) -> int:
        """Targets m."""
        return self._outputs

    @property
    def batch_shape(self) -> torch.Size:
        """One model, no batch of them."""
        return torch.Size([])

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """The posterior at X (b1 x ... x n x d).

        Raises:
            ValueError: Some of the outputs are asked for, or noise is given as a tensor.
        """
        if output_indices is not None and output_indices != list(range(self._outputs)):
            raise ValueError(f"all {self._outputs} outputs are given together, got output_indices={output_indices}")
        if not isinstance(observation_noise, bool):
            raise ValueError("observation_noise is True or False: the noise is the model's own")
        found = self._of(X, observation_noise)
        return found if posterior_transform is None else posterior_transform(found)
