"""What a data set is, once read: text, questions, a table, images or series."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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
        classes: names of the classes; () means regression.
    """

    name: str
    split: str
    X: NDArray[np.float64] = field(repr=False)
    y: NDArray[Any] = field(repr=False)
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


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
