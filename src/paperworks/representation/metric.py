"""What the metrics of this room keep to beyond torchmetrics: nothing that is refused, and no dtype, changes what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor
from torchmetrics import Metric


class StreamedMetric(Metric):
    """A metric whose sums stay in float64, and whose `forward` is as safe as its `update`.

    `metric(batch)` takes the batch in and gives the figures of this batch alone, NaN where a batch by itself tells nothing
    (a class is missing in it, say); `compute` raises a `ValueError` instead. A batch that is refused leaves the sums as they
    were in both. `to` moves the sums to another device, and no dtype changes them. `compute` keeps no earlier result: where
    processes share the work, one that saw nothing since would not take part in merging what the others saw.

    Args:
        **options: Of `torchmetrics.Metric`.
    """

    higher_is_better = False
    # Otherwise `forward` resets the sums first, and a batch that is then refused has cleared them.
    full_state_update = True
    _of_one_batch = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"compute_with_cache": False, **options})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a batch, as `update` does, and give the figures of it alone."""
        self._of_one_batch = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._of_one_batch = False

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same kind holds.

        Raises:
            ValueError: It is of another kind.
        """
        if isinstance(incoming_state, Metric) and not isinstance(incoming_state, type(self)):
            raise ValueError(f"a {type(self).__name__} takes in another, got a {type(incoming_state).__name__}")
        state = incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        self._reduce_states(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        # To the device alone: in fewer digits than float64's, sums over many batches would lose the later ones.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)

    def _untold(self, reason: str) -> None:
        """Refuse to tell what the samples do not tell; of a single batch, in `forward`, NaN tells it.

        Raises:
            ValueError: There are figures of more than one batch.
        """
        if self._of_one_batch:
            return
        # What torchmetrics gathered from other processes it hands back only after a result.
        if self._is_synced and self._should_unsync:
            self.unsync()
        raise ValueError(reason)
