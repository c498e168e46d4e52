"""What every drafter is: a module that proposes token trees, and can be saved and loaded."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paperworks.decoding.identity import difference, fits, identity
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

    Attributes:
        made_for: The `identity` of the model that it was made for or trained against, by which `generate` and
            `from_pretrained` refuse another. Set it to None to draft for any model of the same width: what is written
            stays exact, and less of what is drafted is accepted.
    """

    made_for: dict[str, Any] | None = None
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
        return cls(target, vocabulary=vocabulary, **options).to(target.device, target.dtype).belongs_to(model)

    def belongs_to(self, model: nn.Module) -> Self:
        """Note that the drafter is made for `model`, as making and training one do; returns it."""
        self.made_for = identity(model)
        self.check_model(model)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not what a drafter is for.

        Raises:
            TypeError: always; transformers calls what it is given as `custom_generate`.
        """
        name = type(self).__name__
        raise TypeError(
            f"a {name} drafts and does not write: give transformers custom_generate=as_custom_generate(drafter), or call "
            "paperworks.decoding.generate(model, input_ids, drafter=drafter)"
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError if the drafter was made for another model than `model`.

        A model that it was made, loaded or used for is not looked at again: it may be trained on meanwhile.
        """
        if self.made_for is not None and (reason := fits(self.made_for, model)):
            name = type(self).__name__
            raise ValueError(
                f"this {name} was made for another model: {reason}; make and train one by {name}.from_target(model), or, "
                "where the widths are the same, set drafter.made_for = None to draft with it all the same"
            )

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
        config = {"class": type(self).__name__, "made_for": self.made_for, **self.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Save to a repository of the Hugging Face Hub, which is made if need be; returns its address.

        `from_pretrained` reads it again from a folder: that of `huggingface_hub.snapshot_download(repo_id)`.

        Args:
            repo_id: "user/name".
            private: Of a repository that is made: whether others see it; as the user's settings have it if None.
            token: Of the user; that of `hf auth login` by default.
            commit_message: Of the commit.
        """
        from huggingface_hub import HfApi

        name, made_for = type(self).__name__, self.made_for or {}
        api = HfApi(token=token)
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        told = (
            f"---\nlibrary_name: paperworks\ntags: [speculative-decoding]\n---\n\n# {name} for a "
            f"{made_for.get('kind', 'model')}\n\nDraft weights, to be loaded for the model that they were made for:\n\n"
            "```python\nfrom huggingface_hub import snapshot_download\nfrom paperworks.decoding import Drafter, generate\n\n"
            f'drafter = Drafter.from_pretrained(snapshot_download("{repo_id}"), model)\n'
            "generate(model, input_ids, drafter=drafter)\n```\n"
        )
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / "README.md").write_text(told, encoding="utf-8")
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message or f"Add a {name}")
        return address

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> Self:
        """The drafter saved in `folder`, for the target `model`, ready to draft; device and dtype follow the model.

        A model with the same weights in a type of fewer bits, or in one of more to which they were brought, is the same
        model. Drafters that do not say what they were made for are loaded with a warning.

        Raises:
            TypeError: there is no model.
            ValueError: the folder holds no drafter of this class, or one for another model.
        """
        folder = Path(folder)
        if model is None:
            raise TypeError(
                f"a drafter is loaded for the model that it drafts for: {cls.__name__}.from_pretrained({str(folder)!r}, model)"
            )
        try:
            config = json.loads((folder / "config.json").read_text())
            name, made_for = config.pop("class"), config.pop("made_for", None)
            weights = load_file(folder / "model.safetensors")
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} holds no saved drafter (config.json and model.safetensors): {error}") from error
        if not issubclass(Drafter.classes.get(name, object), cls):
            raise ValueError(f"{folder} holds a {name}, not a {cls.__name__}")
        if made_for is None:
            warnings.warn(
                f"{folder} does not say which model its {name} was made for, so that nobody can tell whether it is this one: "
                "if little of what it drafts is accepted, train it anew",
                stacklevel=2,
            )
        elif reason := difference(made_for, model):
            raise ValueError(
                f"the {name} in {folder} was made for another model: {reason}; train one for this model, or take made_for out "
                "of its config.json to load it all the same"
            )
        drafter = Drafter.classes[name].from_target(model, **config)
        drafter.made_for = made_for
        drafter.check_model(model)
        try:
            drafter.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the {name} in {folder} was made for another model: {error}") from error
        return drafter.eval()  # type: ignore[return-value]
