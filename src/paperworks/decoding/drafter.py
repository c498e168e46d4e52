"""What every drafter is: a module that proposes token trees, and can be saved and loaded."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree


class Committed(NamedTuple):
    """Tokens that the target has just read for good.

    Attributes:
        tokens: (batch, new), each row's first `lengths[b]` valid.
        hidden: The target's states at those tokens, (batch, new, d).
        lengths: Valid tokens of each row.
    """

    tokens: Tensor
    hidden: Tensor
    lengths: list[int]

    @property
    def last_hidden(self) -> Tensor:
        """The state at each row's last token, (batch, d)."""
        rows = torch.arange(len(self.lengths), device=self.hidden.device)
        ends = torch.tensor(self.lengths, device=self.hidden.device) - 1
        return self.hidden[rows, ends.clamp(min=0)]


class Drafter(nn.Module, ABC):
    """Proposes a tree of continuations at each step.

    A drafter holds weights only. What it remembers of one generation is the state made by `start`, so that one drafter
    can serve many generations at once.
    """

    classes: ClassVar[dict[str, type[Drafter]]] = {}
    lossless: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Drafter.classes[cls.__name__] = cls

    @classmethod
    def from_target(cls, model: nn.Module, **options: Any) -> Self:
        """An untrained drafter for `model`, on its device and in its dtype.

        Args:
            model: The model to draft for.
            options: The constructor's; a `vocabulary` given as a number n stands for the first n tokens.

        Raises:
            TypeError, ValueError: a model that cannot be a `Target`, a vocabulary of tokens that it does not know, or what
                the constructor refuses.
        """
        target = Target(model)
        vocabulary = options.pop("vocabulary", None)
        if isinstance(vocabulary, int):
            vocabulary = torch.arange(vocabulary)
        if vocabulary is not None and not (
            len(vocabulary) and 0 <= int(vocabulary.min()) <= int(vocabulary.max()) < target.vocab_size
        ):
            raise ValueError(
                f"a draft vocabulary holds at least one token id, all within 0..{target.vocab_size - 1} of this model's head, "
                f"got {len(vocabulary)} up to {int(vocabulary.max()) if len(vocabulary) else None}"
            )
        return cls(target, vocabulary=vocabulary, **options).to(target.device, target.dtype)

    def check_texts(self, lengths: list[int], new: int) -> None:
        """Raise ValueError if the drafter cannot read texts of such lengths that get so many new tokens."""
        return None

    def start(self, target: Target, batch: int, sampling: Sampling) -> Any:
        """State of a new generation over `batch` prompts; None for drafters that need none."""
        return None

    @abstractmethod
    def propose(
        self, state: Any, committed: Committed, root: Tensor, generator: torch.Generator | None = None
    ) -> TokenTree:
        """A tree whose root is the token `root` (batch,), which the target has chosen but not read yet.

        Args:
            state: What `start` made; the drafter may change it.
            committed: The tokens that the target has read since the last call, the prompt at the first. A row of
                length 0 has ended and may be given any tree.
            root: The target's latest token of each row.
            generator: Randomness for drafters that sample.
        """

    def loss(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """Training loss on sequences that the target has read.

        Args:
            target: The frozen target.
            tokens: (batch, length).
            hidden: The target's states at those tokens, (batch, length, d).
            mask: Whether each token may serve as a label, (batch, length).
        """
        raise TypeError(f"{type(self).__name__} is not trained")

    @property
    def config(self) -> dict[str, Any]:
        """The constructor arguments, JSON-serialisable."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps({"class": type(self).__name__, **self.config}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module) -> Self:
        """The drafter saved in `folder`, for the target `model`, ready to draft; device and dtype follow the model.

        Raises:
            ValueError: the folder holds no drafter of this class, or one for another model.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            name = config.pop("class")
            weights = load_file(folder / "model.safetensors")
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} holds no saved drafter (config.json and model.safetensors): {error}") from error
        if not issubclass(Drafter.classes.get(name, object), cls):
            raise ValueError(f"{folder} holds a {name}, not a {cls.__name__}")
        drafter = Drafter.classes[name].from_target(model, **config)
        try:
            drafter.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the {name} in {folder} was made for another model: {error}") from error
        return drafter.eval()  # type: ignore[return-value]
