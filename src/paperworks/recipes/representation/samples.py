"""What the recipes of this room learn from: a data set of the hub, or the user's own, as rows within 0 and 1 with classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paperworks.errors import UsageError
from paperworks.lab.recipe import Data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

# Of a size that a run from the page may take.
CLASSED = Data("digits", "wine", "breast_cancer")


class Samples(NamedTuple):
    """Samples with classes.

    Attributes:
        name: What they are called in a run's figures.
        X: Rows within 0 and 1, (n, d).
        y: Their classes, (n,), of each of which there are two samples or more.
        classes: Names of the classes.
        shape: Height and width of an image that a row holds, None where it holds none.
    """

    name: str
    X: NDArray[np.float64]
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    shape: tuple[int, int] | None = None

    def as_many(self, wanted: Sequence[int]) -> tuple[Samples, list[int]]:
        """So many classes, with how many samples there are of each, at most as wanted.

        Where a class has fewer, the classes are taken with the largest first.
        """
        import numpy as np

        have = np.bincount(self.y, minlength=len(self.classes))
        enough = bool((have[: len(wanted)] >= np.array(wanted)).all())
        chosen = np.arange(len(wanted)) if enough else np.argsort(-have, kind="stable")[: len(wanted)]
        rank = np.full(len(have), -1)
        rank[chosen] = np.arange(len(chosen))
        rows = rank[self.y] >= 0
        taken = self._replace(X=self.X[rows], y=rank[self.y[rows]], classes=tuple(self.classes[one] for one in chosen))
        return taken, np.minimum(wanted, have[chosen]).tolist()

    def drawn(self, counts: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """So many samples of each of the first classes, drawn at random: rows within -1 and 1, and classes."""
        import numpy as np
        import torch

        random = np.random.default_rng(seed)
        rows = np.concatenate(
            [random.permutation(np.flatnonzero(self.y == label))[:count] for label, count in enumerate(counts)]
        )
        return torch.tensor(2 * self.X[rows] - 1, dtype=torch.float32), torch.tensor(self.y[rows])


def samples(data: str = "digits") -> Samples:
    """The samples of a data set with classes.

    Args:
        data: A name or path, as `paperworks.hub.load_dataset` takes it: a table, whose columns are stretched to 0 and 1, or
            images.

    Raises:
        UsageError: It is neither, its target is no class, or a class has a single sample.

    Example:
        >>> wine = samples("wine")
        >>> wine.X.shape, float(wine.X.min()), float(wine.X.max()), wine.classes
        ((178, 13), 0.0, 1.0, ('class_0', 'class_1', 'class_2'))
    """
    import numpy as np

    X, loaded, shape = _rows(data)
    table = loaded.labelled()
    # Classes are numbered without gaps.
    present, y, counts = np.unique(table.y, return_inverse=True, return_counts=True)
    classes = tuple(table.classes[label] for label in present)
    if len(classes) < 2 or counts.min() < 2:
        told = "only one class" if len(classes) < 2 else f"a single sample of class {classes[int(counts.argmin())]}"
        raise UsageError(f"{data} holds {told}: give two classes or more, with several samples each")
    return Samples(Path(data).name, X, y.astype(np.int64), classes, shape)


def rows(data: str = "digits") -> tuple[NDArray[np.float64], tuple[int, int] | None]:
    """The rows of a data set within 0 and 1, whatever its target is; and height and width of the image that a row holds.

    Args:
        data: As for `samples`.

    Raises:
        UsageError: It is neither a table nor images.
    """
    X, _, shape = _rows(data)
    return X, shape


def _rows(data: str) -> tuple[NDArray[np.float64], Any, tuple[int, int] | None]:
    from paperworks.hub import ImageData, TableData, load_dataset

    loaded = load_dataset(data)
    if isinstance(loaded, ImageData):
        height, width = loaded.images.shape[1:]
        table = loaded.as_table()
        return table.X, table, (height, width)
    if not isinstance(loaded, TableData):
        raise UsageError(f"{data} is neither a table nor images, and samples with their classes are wanted")
    if data == "digits":
        # scikit-learn has these images as a table, with ink from 0 to 16.
        return loaded.X / 16, loaded, (8, 8)
    low, high = loaded.X.min(0), loaded.X.max(0)
    extent = high - low
    extent[extent == 0] = 1
    return (loaded.X - low) / extent, loaded, None
