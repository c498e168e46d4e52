"""From logits to the distribution that is sampled, and the one place where decoding draws at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the target's logits become the law of the next token.

    Args:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities reach p, within (0, 1]; None keeps all.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Sampling(temperature=1.0, top_k=2).probabilities(torch.tensor([0.0, 0.0, -5.0])).tolist()
        [0.5, 0.5, 0.0]
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or torch.finfo(torch.float32).tiny <= self.temperature < float("inf")):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be within (0, 1], got {self.top_p}; leave it out to keep every token")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Law of the next token, (..., vocab), in float32, or float64 for float64 logits.

        Raises:
            ValueError: the logits make no law, see `check_logits`.
        """
        check_logits(logits)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        # From the largest on, or a low temperature would make infinite numbers of them.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            mass = ordered.softmax(-1)
            outside = mass.cumsum(-1) - mass >= self.top_p
            logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
        return logits.softmax(-1)


def check_logits(logits: Tensor) -> None:
    """Raise ValueError if logits (..., vocab) make no law: NaN, an infinite one, or no token that is possible."""
    largest = logits.amax(-1)
    if bool(largest.isfinite().all()):
        return
    if bool((largest == -torch.inf).any()):
        raise ValueError(
            "no token is possible, all logits are minus infinity: check the logits processors and the model's weights"
        )
    raise ValueError(
        f"the model returned {'NaN' if bool(largest.isnan().any()) else 'infinite'} logits: its weights or its dtype "
        "overflow; load it in float32, or in bfloat16 where it is float16, or check the checkpoint"
    )


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index per row of `probabilities` (..., n); every random decision of this room comes through here.

    Example:
        >>> draw(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()
        [1, 0]
    """
    # One uniform number a row against the cumulated law; `torch.multinomial` draws one for every token.
    mass = probabilities.double().cumsum(-1)
    total = mass[..., -1:]
    uniform = torch.rand(total.shape, dtype=mass.dtype, device=mass.device, generator=generator)
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, point, right=True)[..., 0]
