"""NBP: video and images a whole block of tokens at a time, by semi-autoregressive modelling (arXiv 2502.07737)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from paperworks.decoding.sampling import Sampling, draw


class NextBlockPrediction(nn.Module):
    """A decoder over grids of discrete tokens that predicts block b + 1, whole, from the blocks up to b.

    Inside a block attention goes both ways, between blocks only backwards. The output at slot i of block b is the law
    of the token at slot i of block b + 1, so that a grid of N tokens in blocks of B takes N / B passes:

        p(x) = prod_b prod_i p(x_{b+1, i} | x_{<=b})

    A begin block of learned vectors, one a slot, stands before the first. With `block=(1, 1, 1)` this is ordinary
    next-token prediction, the paper's baseline, with the same weights but for the begin block.

    Args:
        vocab_size: Codes that a token may take.
        grid: (frames, rows, columns) of a clip; an image has one frame.
        block: (frames, rows, columns) of a block, each dividing the grid's: `(1, 1, columns)` is a row,
            `(1, rows, columns)` a frame.
        classes: Classes to condition on; 0 for none.
        hidden_size: Width d of the decoder.
        layers: Its layers.
        heads: Its attention heads.

    Raises:
        ValueError: a size below 1, or a block that does not divide the grid.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = NextBlockPrediction(vocab_size=5, grid=(2, 3, 4), block=(1, 1, 4), hidden_size=16, heads=2).eval()
        >>> clips = model.generate(3, generator=torch.Generator().manual_seed(0))
        >>> clips.shape, model.log_prob(clips).shape, model.blocks
        (torch.Size([3, 2, 3, 4]), torch.Size([3]), 6)
    """

    coordinates: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        classes: int = 0,
        hidden_size: int = 128,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if vocab_size < 2 or min(*grid, *block, hidden_size, layers, heads) < 1 or classes < 0:
            raise ValueError("vocab_size must be at least 2, classes not negative, and all other sizes at least 1")
        if any(whole % part for whole, part in zip(grid, block, strict=True)):
            raise ValueError(f"a grid of {grid} tokens cannot be cut into blocks of {block}: each side must divide")
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size, "grid": list(grid), "block": list(block), "classes": classes,
            "hidden_size": hidden_size, "layers": layers, "heads": heads,
        }  # fmt: skip
        self.grid, self.block = tuple(grid), tuple(block)
        self.slots = math.prod(block)
        self.blocks = math.prod(grid) // self.slots
        self.backbone = LlamaModel(
            LlamaConfig(
                vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=-(-8 * hidden_size // 3 // 16) * 16,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                max_position_embeddings=self.slots * (self.blocks + 1), attn_implementation="sdpa", pad_token_id=None,
            )
        )  # fmt: skip
        self.begin = nn.Parameter(torch.randn(self.slots, hidden_size) * 0.02)
        self.label = nn.Embedding(classes, hidden_size) if classes else None
        self.places = nn.ModuleList(nn.Embedding(side, hidden_size) for side in grid)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        for embedding in (*self.places, *([self.label] if self.label else [])):
            nn.init.normal_(embedding.weight, std=0.02)
        coordinates = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(1, *grid, 3)
        self.register_buffer("coordinates", self._in_blocks(coordinates)[0].flatten(0, 1), persistent=False)

    def forward(self, tokens: Tensor, label: Tensor | None = None, cache: DynamicCache | None = None) -> Tensor:
        """Logits of every block after the one that is read.

        Args:
            tokens: Blocks in order, (batch, blocks, slots), none of them at the beginning of a clip.
            label: Class of each clip, (batch,).
            cache: Keys and values of the blocks before `tokens`; where it is None or empty, the begin block is read too.

        Returns:
            (batch, blocks read, slots, vocab): those behind the begin block, if read, and behind each of `tokens`.
        """
        past = cache.get_seq_length() if cache is not None else 0
        first = max(0, past - self.slots)
        places = self.coordinates[first : first + tokens.shape[1] * self.slots]
        states = self.backbone.embed_tokens(tokens.flatten(1))
        states = states + sum(table(places[:, axis]) for axis, table in enumerate(self.places))
        if not past:
            start = self.begin.expand(len(tokens), -1, -1)
            if self.label is not None:
                start = start + self.label(label)[:, None]
            states = torch.cat([start, states], dim=1)
        new = states.shape[1] // self.slots
        read = (torch.arange(past // self.slots + new, device=states.device)).repeat_interleave(self.slots)
        seen = read[None] <= read[past:, None]
        zero = torch.zeros((), dtype=states.dtype, device=states.device)
        output = self.backbone(
            inputs_embeds=states,
            attention_mask=torch.where(seen, zero, torch.finfo(states.dtype).min)[None, None],
            position_ids=torch.arange(past, past + states.shape[1], device=states.device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        logits: Tensor = self.head(output)
        return logits.unflatten(1, (new, self.slots))

    def log_prob(self, tokens: Tensor, label: Tensor | None = None, *, given_frames: int = 0) -> Tensor:
        """Log-probability of each clip in nats, (batch,), of its frames from `given_frames` on, given those before.

        Args:
            tokens: Codes, (batch, frames, rows, columns).
            label: Class of each clip, (batch,), for a class-conditional model.
            given_frames: Leading frames that are known.

        Raises:
            ValueError: tokens, label or given_frames that do not fit the model.
        """
        blocks, given = self._checked(tokens, label, given_frames)
        log_law = self(blocks[:, :-1], label).log_softmax(-1)
        return log_law.gather(-1, blocks[..., None])[:, given:].sum((1, 2, 3))

    def loss(self, tokens: Tensor, label: Tensor | None = None, *, given_frames: int = 0) -> Tensor:
        """Mean cross-entropy in nats a token; the arguments are those of `log_prob`."""
        blocks, given = self._checked(tokens, label, given_frames)
        logits = self(blocks[:, :-1], label)[:, given:]
        return F.cross_entropy(logits.flatten(0, 2), blocks[:, given:].flatten())

    @torch.no_grad()
    def generate(
        self,
        count: int,
        *,
        label: Tensor | None = None,
        given: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample clips block by block, each pass reading one block and giving the next.

        Args:
            count: How many clips.
            label: Class of each, (count,), for a class-conditional model.
            given: Leading frames that are known, (count, frames, rows, columns).
            temperature: 0 takes the most likely code of each slot.
            top_k: Sample among the k most likely codes.
            top_p: Sample among the most likely codes that make up this probability.
            generator: Randomness.

        Returns:
            Codes, (count, frames, rows, columns), given frames included.

        Raises:
            ValueError: arguments that do not fit the model.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if given is None:
            given = torch.zeros(count, 0, *self.grid[1:], dtype=torch.long, device=self.begin.device)
        if given.ndim != 4 or len(given) != count:
            raise ValueError(f"given must be frames of {count} clips (count, frames, rows, columns), got "
                             f"{tuple(given.shape)}")  # fmt: skip
        sampling = Sampling(temperature, top_k, top_p)
        # The rest of the grid is filled in below; until then any code will do.
        whole = F.pad(given, (0, 0, 0, 0, 0, self.grid[0] - given.shape[1]))
        blocks, first = self._checked(whole, label, given.shape[1])
        cache = DynamicCache(config=self.backbone.config)
        read = blocks[:, :first]
        for block in range(first, self.blocks):
            law = sampling.probabilities(self(read, label, cache)[:, -1])
            blocks[:, block] = draw(law, generator)
            read = blocks[:, block : block + 1]
        return self._in_grid(blocks)

    def with_block(self, block: tuple[int, int, int]) -> Self:
        """A model of another block shape that begins with these weights, as a next-token model may start this one.

        Begin vectors are those of this model, repeated as often as needed.
        """
        other = type(self)(**{**self.config, "block": block}).to(self.begin)
        weights = self.state_dict()
        weights["begin"] = self.begin[torch.arange(other.slots, device=self.begin.device) % self.slots]
        other.load_state_dict(weights)
        return other

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps({"class": type(self).__name__, **self.config}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder`.

        Raises:
            ValueError: the folder holds no such model.
        """
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            if config.pop("class") != cls.__name__:
                raise ValueError("another class")
            model = cls(**config)
            weights = load_file(Path(folder) / "model.safetensors")
            model.to(weights["begin"].dtype).load_state_dict(weights)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{folder} holds no saved {cls.__name__} (config.json, model.safetensors): {error}"
            ) from error
        return model.eval()

    def _checked(self, tokens: Tensor, label: Tensor | None, given_frames: int) -> tuple[Tensor, int]:
        """The blocks of `tokens` and how many of them are given."""
        if tokens.ndim != 4 or tuple(tokens.shape[1:]) != self.grid or tokens.dtype != torch.long:
            raise ValueError(
                f"expected int64 codes of shape (batch, {', '.join(map(str, self.grid))}), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        if not len(tokens):
            raise ValueError("there are no clips: give at least one")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config["vocab_size"]:
            raise ValueError(f"codes must be within 0..{self.config['vocab_size'] - 1}")
        if (label is None) != (self.label is None) or (label is not None and label.shape != tokens.shape[:1]):
            wanted = f"a label for each of {len(tokens)} clips" if self.label is not None else "no label"
            raise ValueError(f"this model takes {wanted}, got {None if label is None else tuple(label.shape)}")
        if label is not None and not 0 <= int(label.min()) <= int(label.max()) < self.config["classes"]:
            raise ValueError(f"labels must be within 0..{self.config['classes'] - 1}")
        if not 0 <= given_frames < self.grid[0] or given_frames % self.block[0]:
            raise ValueError(
                f"given frames must be fewer than {self.grid[0]} and fill blocks of {self.block[0]}, got {given_frames}"
            )
        return self._in_blocks(tokens), given_frames * self.blocks // self.grid[0]

    def _in_blocks(self, grid: Tensor) -> Tensor:
        """(batch, frames, rows, columns, ...) as (batch, blocks, slots, ...): row by row in a frame, then frame by frame."""
        counts = [whole // part for whole, part in zip(self.grid, self.block, strict=True)]
        split = grid.reshape(
            len(grid), *(n for pair in zip(counts, self.block, strict=True) for n in pair), *grid.shape[4:]
        )
        rest = range(7, split.ndim)
        return split.permute(0, 1, 3, 5, 2, 4, 6, *rest).reshape(len(grid), self.blocks, self.slots, *grid.shape[4:])

    def _in_grid(self, blocks: Tensor) -> Tensor:
        """The inverse of `_in_blocks`."""
        counts = [whole // part for whole, part in zip(self.grid, self.block, strict=True)]
        return (
            blocks.reshape(len(blocks), *counts, *self.block)
            .permute(0, 1, 4, 2, 5, 3, 6)
            .reshape(len(blocks), *self.grid)
        )
