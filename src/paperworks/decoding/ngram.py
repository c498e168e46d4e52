"""Counts of token n-grams: what followed the last one, two, ... tokens in a corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# Ends every table with a key that no n-gram has, counted 0 times, so that what is not found has a place.
_NONE = 2**63 - 1


class NGramModel:
    """How often each token followed the 1 to `max_order - 1` tokens before it, as a share and without smoothing.

    The n-grams form a trie. Level d holds those of d tokens as one sorted table of 64-bit keys, `parent * vocabulary +
    token`, where the parent is the place of the first d - 1 tokens in the table above. One binary search thus takes a
    whole batch down one level.

    Args:
        max_order: Longest n-gram counted: 6 conditions on up to five tokens.

    Raises:
        ValueError: `max_order` is below 2.

    Example:
        >>> import torch
        >>> ngram = NGramModel(max_order=3).fit([[1, 2, 3, 1, 2, 4], [1, 2, 3]])
        >>> ngram.prob([2], 3), ngram.prob([1, 2], 4), ngram.prob([9], 3)
        (0.6666666666666666, 0.3333333333333333, None)
        >>> ngram.probabilities(torch.tensor([[1, 2]]), torch.tensor([[3, 4, 1]])).shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, max_order: int = 6) -> None:
        if max_order < 2:
            raise ValueError(f"max_order must be at least 2, which counts pairs of tokens, got {max_order}")
        self.max_order = max_order
        self.vocab_size = 0
        self._keys: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._followed: list[Tensor] = []

    def fit(self, documents: Iterable[Sequence[int] | Tensor]) -> Self:
        """Count the n-grams of `documents`, in place of those counted before; none reaches over a document's end.

        Args:
            documents: Token ids of each document, as the model's tokenizer gives them.

        Raises:
            TypeError: a document holds something other than whole numbers.
            ValueError: there are no two tokens in a row to count, a negative token id, or a document that is no row of
                ids.
        """
        texts = [_row(document) for document in documents]
        if not any(len(text) > 1 for text in texts):
            raise ValueError("there is nothing to count: give at least one document of two tokens or more")
        tokens = torch.cat(texts)
        if int(tokens.min()) < 0:
            raise ValueError(f"token ids must not be negative, got {int(tokens.min())}: leave padding out")
        self.vocab_size = int(tokens.max()) + 1
        lengths = torch.tensor([len(text) for text in texts])
        ends = lengths.cumsum(0).repeat_interleave(lengths)
        self._keys, self._counts = [], []
        starts = torch.arange(len(tokens))
        node = torch.zeros_like(tokens)
        for level in range(self.max_order):
            # An n-gram of this length starts where the shorter one does, unless the document ends first.
            inside = starts + level < ends[starts]
            starts = starts[inside]
            keys, node, counts = torch.unique(
                node[inside] * self.vocab_size + tokens[starts + level], return_inverse=True, return_counts=True
            )
            self._keys.append(torch.cat([keys, keys.new_tensor([_NONE])]))
            self._counts.append(torch.cat([counts, counts.new_zeros(1)]))
        self._sum_followed()
        return self

    def probabilities(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """P_o(token | last o tokens of the context) for each o up to the contexts' length, at most `max_order - 1`.

        Args:
            contexts: Token ids, newest last, shape (n, length); -1 where a shorter context is padded on its left.
            tokens: Candidates for the next token, shape (n, m).

        Returns:
            Shape (n, o, m), float64: 0 for a token never seen behind a context that was, NaN for a context never seen
            (or shorter than o).

        Raises:
            ValueError: nothing was counted yet, or the shapes do not fit.
        """
        if not self._keys:
            raise ValueError("this n-gram model has counted nothing: call fit with token ids first")
        if contexts.ndim != 2 or tokens.ndim != 2 or len(contexts) != len(tokens):
            raise ValueError(
                "contexts (n, length) and tokens (n, m) must be matrices of as many rows, got shapes "
                f"{tuple(contexts.shape)} and {tuple(tokens.shape)}"
            )
        device, lookup = tokens.device, self._keys[0].device
        contexts, tokens = contexts[:, -(self.max_order - 1) :].to(lookup).long(), tokens.to(lookup).long()
        longest = contexts.shape[1]
        found = torch.empty(len(contexts), longest, tokens.shape[1], dtype=torch.float64, device=lookup)
        # Column s is where the walk that began s tokens into the context stands; after o steps the last column has
        # read the o newest tokens, answers for order o and leaves.
        node = torch.zeros_like(contexts)  # the root: level 0 has no parents to tell apart
        for order in range(1, longest + 1):
            node = self._child(order - 1, node, contexts[:, order - 1 :])
            here, node = node[:, -1:], node[:, :-1]
            # 0 / 0 is NaN: a context that is not there, or that nothing ever followed.
            followed = self._followed[order - 1][here].double()
            found[:, order - 1] = self._counts[order][self._child(order, here, tokens)] / followed
        return found.to(device)

    def prob(self, context: Sequence[int] | Tensor, token: int) -> float | None:
        """P(token | the whole context), or None where the corpus never continued the context.

        Raises:
            TypeError: the context holds something other than whole numbers.
            ValueError: the context is empty or longer than `max_order - 1`, or nothing was counted yet.
        """
        row = _row(context)
        if not 1 <= len(row) < self.max_order:
            raise ValueError(f"a context holds 1 to {self.max_order - 1} tokens, got {len(row)}")
        value = float(self.probabilities(row[None], torch.tensor([[token]]))[0, -1, 0])
        return None if math.isnan(value) else value

    def to(self, device: torch.device | str) -> Self:
        """Move the tables; look-ups run where they lie."""
        self._keys, self._counts, self._followed = (
            [table.to(device) for table in tables] for tables in (self._keys, self._counts, self._followed)
        )
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {"keys": self._keys, "counts": self._counts}
        save_file(
            {f"{name}.{level}": table for name, levels in tables.items() for level, table in enumerate(levels)},
            folder / "model.safetensors",
        )
        config = {"class": type(self).__name__, "max_order": self.max_order, "vocab_size": self.vocab_size}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: the folder holds no saved n-gram model.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            tables = load_file(folder / "model.safetensors")
            model = cls(config["max_order"])
            model.vocab_size = config["vocab_size"]
            levels = range(model.max_order if tables else 0)
            model._keys = [tables[f"keys.{level}"] for level in levels]
            model._counts = [tables[f"counts.{level}"] for level in levels]
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no saved n-gram model (config.json and model.safetensors): {error}"
            ) from error
        model._sum_followed()
        return model

    def _child(self, level: int, parent: Tensor, token: Tensor) -> Tensor:
        """Places in the table of `level` of `parent` followed by `token`; -1, its last, where there is none."""
        keys = self._keys[level]
        known = (parent >= 0) & (token >= 0) & (token < self.vocab_size)
        wanted = (parent * self.vocab_size + token).where(known, -1)
        place = torch.searchsorted(keys, wanted)
        return place.where(keys[place] == wanted, -1)

    def _sum_followed(self) -> None:
        """How often each n-gram was followed by anything: less than its count where it ends documents."""
        self._followed = [
            torch.zeros(len(keys), dtype=torch.long).index_add_(0, longer[:-1] // self.vocab_size, counts[:-1])
            for keys, longer, counts in zip(self._keys, self._keys[1:], self._counts[1:], strict=False)
        ]


def _row(tokens: Sequence[int] | Tensor) -> Tensor:
    """Token ids as int64, (length,), on the CPU."""
    ids = torch.as_tensor(tokens)
    if ids.ndim != 1:
        raise ValueError(
            f"token ids come in one row, got shape {tuple(ids.shape)}: give the rows of a matrix one by one"
        )
    if ids.is_floating_point() and len(ids):
        raise TypeError(f"token ids are whole numbers, got {ids.dtype}")
    return ids.long().cpu()
