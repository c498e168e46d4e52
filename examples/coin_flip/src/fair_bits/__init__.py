"""Fair bits from a coin that is not fair (Peres, 1992)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["peres", "rate"]


def peres(flips: Sequence[int], depth: int) -> list[int]:
    """Fair, independent bits out of independent flips of one coin, whatever its bias.

    Of two unlike flips the first is kept, which is von Neumann's trick; the same is done again with what that throws away:
    whether the two flips of a pair were unlike, and the value of those that were alike.

    Args:
        flips: Zeros and ones.
        depth: How often it is done; 1 is von Neumann's trick alone.

    Example:
        >>> peres([0, 1, 1, 1, 0, 0, 1, 0], depth=1)
        [0, 1]
        >>> peres([0, 1, 1, 1, 0, 0, 1, 0], depth=2)
        [0, 1, 1, 0, 1]
    """
    pairs = list(zip(flips[::2], flips[1::2], strict=False))
    if not depth or not pairs:
        return []
    fair = [first for first, second in pairs if first != second]
    unlike = [first ^ second for first, second in pairs]
    alike = [first for first, second in pairs if first == second]
    return fair + peres(unlike, depth - 1) + peres(alike, depth - 1)


def rate(heads: float, depth: int) -> float:
    """Bits a flip in the long run: pq + r(p^2 + q^2) / 2 + (p^2 + q^2) r(p^2 / (p^2 + q^2)) / 2, with r of one depth less.

    Example:
        >>> rate(0.5, 1), rate(0.5, 2)
        (0.25, 0.4375)
    """
    if not depth:
        return 0.0
    tails = 1 - heads
    alike = heads**2 + tails**2
    return heads * tails + rate(alike, depth - 1) / 2 + alike * rate(heads**2 / alike, depth - 1) / 2
