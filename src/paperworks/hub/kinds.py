"""What a data set is, once read: text, questions, a table, images or series."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from paperworks.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Item = TypeVar("Item")


@dataclass(frozen=True)
class TextData:
    """Running text.

    Attributes:
        name: of the data set, or the file's name.
        split: which part, "" where there is only one.
        text: all of it.
    """

    name: str
    split: str
    text: str = field(repr=False)

    @property
    def paragraphs(self) -> tuple[str, ...]:
        """The lines that hold more than space, in order, without space around them."""
        return tuple(line.strip() for line in self.text.split("\n") if line.strip())


@dataclass(frozen=True)
class Question:
    r"""A question and its worked answer (GSM8K).

    Example:
        >>> Question("What are 2 and 3?", "They are 2 + 3 = <<2+3=5>>5.\n#### 5").number
        5.0
    """

    question: str
    answer: str

    @property
    def number(self) -> float:
        """The final number of the answer, which follows `####`.

        Raises:
            ValueError: there is none.
        """
        found = re.search(r"####\s*([-+]?[\d,]*\.?\d+)\s*$", self.answer)
        if found is None:
            raise ValueError(f"the answer ends with {self.answer[-20:]!r}, not with #### and a number")
        return float(found[1].replace(",", ""))


@dataclass(frozen=True)
class Problem:
    """A Python function to complete (HumanEval).

    Attributes:
        task_id: "HumanEval/0" and so on.
        prompt: imports, signature and docstring.
        solution: a right body to append to the prompt.
        test: code that defines `check(candidate)`.
        entry_point: name of the function.
    """

    task_id: str
    prompt: str
    solution: str
    test: str
    entry_point: str


@dataclass(frozen=True)
class Conversation:
    """What a user says in a conversation, turn by turn (MT-bench)."""

    question_id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class QuestionData(Generic[Item]):
    """Questions in a fixed order; a sequence of `Question`, `Problem` or `Conversation`.

    Example:
        >>> data = QuestionData("sums", "test", (Question("1 + 1?", "#### 2"),))
        >>> len(data), data[0].question
        (1, '1 + 1?')
    """

    name: str
    split: str
    items: tuple[Item, ...] = field(repr=False)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        """All of them, in order."""
        return iter(self.items)

    def __getitem__(self, index: int) -> Item:
        """The one at a position, from 0."""
        return self.items[index]


@dataclass(frozen=True, eq=False)
class TableData:
    """A table for regression or classification.

    Attributes:
        name: of the data set.
        split: which part, "" where there is only one.
        X: float64, n x d, finite.
        y: n targets: float64 for regression, int64 indices into `classes` for classification.
        features: d names, or () where the data has none.
        classes: names of the classes; () means regression, or whole numbers that may be either.
    """

    name: str
    split: str
    X: NDArray[np.float64] = field(repr=False)
    y: NDArray[Any] = field(repr=False)
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def labelled(self) -> TableData:
        """The same data with its target as classes, for who tells classes apart.

        Whole numbers from 0 on are the indices of their classes, as a network's outputs are counted, where that leaves no
        more classes than rows; other whole numbers are numbered in their order.

        Raises:
            UsageError: the target is no class: not whole, or of more than ten values with fewer than ten rows each.

        Example:
            >>> import numpy as np
            >>> table = TableData("own", "", np.zeros((4, 1)), np.array([-1.0, 1.0, 1.0, -1.0]))
            >>> labelled = table.labelled()
            >>> labelled.y.tolist(), labelled.classes
            ([0, 1, 1, 0], ('-1', '1'))
        """
        import numpy as np

        if self.classes:
            return self
        if (off := np.flatnonzero(self.y != np.round(self.y))).size:
            raise UsageError(
                f"the target of {self.name} is no class, but {self.y[off[0]]:g} in row {off[0] + 1}: give classes as whole "
                "numbers or as words"
            )
        values, indices = np.unique(self.y, return_inverse=True)
        if len(values) > max(10, len(self.y) // 10):
            raise UsageError(
                f"the target of {self.name} has {len(values)} different values in {len(self.y)} rows, as a number has "
                "and no class"
            )
        if values[0] >= 0 and values[-1] < len(self.y):
            return replace(
                self, y=self.y.astype(np.int64), classes=tuple(str(label) for label in range(int(values[-1]) + 1))
            )
        return replace(self, y=indices.astype(np.int64), classes=tuple(f"{value:.0f}" for value in values))

    def measured(self) -> TableData:
        """The same data, for who predicts a number.

        Raises:
            UsageError: the target is a class.
        """
        if self.classes:
            raise UsageError(
                f"the target of {self.name} is one of {len(self.classes)} classes (one is {self.classes[0]}), and a number is "
                "predicted here: give a table whose last column is one"
            )
        return self


@dataclass(frozen=True, eq=False)
class ImageData:
    """Grey images with labels.

    Attributes:
        name: of the data set.
        images: uint8, n x height x width; 0 is the background, 255 full ink.
        labels: int64, n indices into `classes`.
        classes: names of the classes.
    """

    name: str
    images: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    def as_table(self) -> TableData:
        """A row an image, its pixels within 0 and 1.

        Example:
            >>> import numpy as np
            >>> images = ImageData("own", np.array([[[0, 51], [255, 0]]], np.uint8), np.array([0]), ("ink",))
            >>> images.as_table().X.tolist()
            [[0.0, 0.2, 1.0, 0.0]]
        """
        return TableData(
            self.name, "", self.images.reshape(len(self.images), -1) / 255, self.labels, classes=self.classes
        )

    def resized(self, size: int) -> ImageData:
        """The same data with images of `size` x `size` pixels, each the mean of the pixels it covers.

        Raises:
            ValueError: size is not a whole number from 1 on.
        """
        import numpy as np
        from PIL import Image

        if type(size) is not int or size < 1:
            raise ValueError(f"size is {size!r}; give the side of the images in pixels, at least 1.")
        images = np.empty((len(self.images), size, size), np.uint8)
        for small, image in zip(images, self.images, strict=True):
            small[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
        return replace(self, images=images)


@dataclass(frozen=True, eq=False)
class CharacterData(ImageData):
    """Handwritten characters of many alphabets, each drawn once by each of several people (Omniglot).

    Attributes:
        alphabets: names of the alphabets.
        alphabet: int64, n indices into `alphabets`.
        drawer: int64, n; who drew the image, from 1. Drawers of different alphabets are different people.
    """

    alphabets: tuple[str, ...] = ()
    alphabet: NDArray[np.int64] = field(repr=False, kw_only=True)
    drawer: NDArray[np.int64] = field(repr=False, kw_only=True)


@dataclass(frozen=True, eq=False)
class SeriesData:
    """Time series observed together.

    Attributes:
        name: of the data set.
        values: float64, times x series, finite.
        step: time between two rows, in words.
    """

    name: str
    values: NDArray[np.float64] = field(repr=False)
    step: str


Dataset = (
    TextData
    | QuestionData[Question]
    | QuestionData[Problem]
    | QuestionData[Conversation]
    | TableData
    | ImageData
    | SeriesData
)
