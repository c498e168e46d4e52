"""What recipes that generate images share: digits, codes for their patches, a training loop and a judge of samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from paperworks import __version__
from paperworks.errors import UsageError
from paperworks.lab.cache import cached_folder
from paperworks.lab.run import Run

_BY_NAME = ("mnist-10k", "digits")


def pixels(data: str, size: int) -> tuple[Tensor, Tensor]:
    """Images with classes, resized to `size` x `size` pixels, in a fixed order; handwritten digits fill them.

    Args:
        data: "mnist-10k"; "digits", scikit-learn's 1797 of 8 x 8 pixels; "auto", the first where it is at hand; or images of
            the user's own, a folder with one subfolder a class or an .npz file.
        size: Side of the images in pixels.

    Returns:
        Ink within 0 and 1, (n, size, size), and classes, (n,).

    Raises:
        UsageError: The data holds no images.
    """
    import numpy as np

    from paperworks.hub import ImageData, datasets, load_dataset

    if data == "auto":
        data = "mnist-10k" if any(entry.name == "mnist-10k" and entry.available for entry in datasets()) else "digits"
    loaded: Any = load_dataset(data)
    if data == "mnist-10k":
        # MNIST's digits have a margin of four pixels.
        loaded = replace(loaded, images=loaded.images[:, 2:-2, 2:-2])
    elif data == "digits":
        ink = (loaded.X * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
        loaded = ImageData(data, ink, loaded.y, loaded.classes)
    elif not isinstance(loaded, ImageData):
        raise UsageError(
            f"{data} holds no images: give a folder with one subfolder a class, or an .npz file with X (samples x height x "
            "width) and y"
        )
    elif len(loaded.labels) < 20:
        raise UsageError(f"{data} holds {len(loaded.labels)} images: give 20 or more, of which a tenth is held out")
    else:
        # A user's own may lie in the order of their classes, and the last are held out.
        mixed = np.random.default_rng(0).permutation(len(loaded.labels))
        loaded = replace(loaded, images=loaded.images[mixed], labels=loaded.labels[mixed])
    return torch.from_numpy(loaded.resized(size).images).float() / 255, torch.from_numpy(loaded.labels)


def identity(data: str, images: Tensor) -> str | int:
    """What tells images apart in the cache of what was trained on them: a user's own by their content."""
    if data == "auto":
        return len(images)
    return data if data in _BY_NAME else hashlib.sha256(images.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Codebook:
    """Codes for square patches of grey images, found by k-means: the tokenizer of an image model.

    Args:
        vectors: Pixels of each code's patch within 0 and 1, (codes, patch * patch).

    Example:
        >>> images = torch.rand(20, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> codebook = Codebook.fit(images, codes=8, patch=2)
        >>> codes = codebook.encode(images)
        >>> codes.shape, codebook.decode(codes).shape
        (torch.Size([20, 2, 2]), torch.Size([20, 4, 4]))
    """

    vectors: Tensor

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return math.isqrt(self.vectors.shape[1])

    @classmethod
    def fit(cls, images: Tensor, *, codes: int, patch: int, seed: int = 0) -> Self:
        """Cluster the patches of `images` (..., height, width) around `codes` centres.

        Raises:
            UsageError: The images have fewer distinct patches, or their sides are no multiple of `patch`.
        """
        from sklearn.cluster import KMeans

        patches = _patches(images, patch).flatten(0, -2)
        distinct = patches.unique(dim=0)
        if len(distinct) < codes:
            raise UsageError(f"the images have {len(distinct)} distinct patches of {patch} x {patch} pixels: ask for "
                             f"fewer codes than {codes}")  # fmt: skip
        chosen = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[: 64 * codes]
        means = KMeans(codes, n_init=1, max_iter=50, random_state=seed).fit(distinct[chosen].numpy())
        return cls(torch.from_numpy(means.cluster_centers_).float())

    def embedding(self, size: int, seed: int = 0) -> Tensor:
        """Random Fourier features of the codes' patches, (codes, size): what looks alike begins alike in a model."""
        generator = torch.Generator().manual_seed(seed)
        frequencies = 3 * torch.randn(self.vectors.shape[1], size, generator=generator)
        phases = 2 * math.pi * torch.rand(size, generator=generator)
        return 0.03 * torch.cos(self.vectors @ frequencies + phases)

    def encode(self, images: Tensor) -> Tensor:
        """The nearest code of every patch: (..., height, width) to (..., rows, columns)."""
        patches = _patches(images, self.patch)
        nearest = [torch.cdist(part, self.vectors).argmin(-1) for part in patches.flatten(0, -2).split(65536)]
        return torch.cat(nearest).view(patches.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """The image that codes stand for: (..., rows, columns) to (..., height, width)."""
        patches = self.vectors[codes].unflatten(-1, (self.patch, self.patch))
        return patches.transpose(-3, -2).flatten(-4, -3).flatten(-2)


@dataclass(frozen=True)
class ImageModel:
    """A causal LM that writes an image as its class and then its codes, row by row, and what belongs to it.

    Token ids: the classes, one for no class at all, then the codes.

    Args:
        model: A `LlamaForCausalLM`.
        codebook: Codes for patches.
        judge: Tells the digit of a decoded image.
        codes: Codes of the real images, (n, rows, columns).
        labels: Their classes, (n,).
        held_out: So many of the last were not trained on.
    """

    model: Any
    codebook: Codebook
    judge: Judge
    codes: Tensor
    labels: Tensor
    held_out: int

    @property
    def null(self) -> int:
        """The token that stands for no class."""
        return int(self.judge.classes[0])

    @property
    def first_code(self) -> int:
        """The token of code 0."""
        return self.null + 1

    @property
    def sequences(self) -> Tensor:
        """Token ids of the real images, (n, 1 + rows * columns)."""
        return torch.cat([self.labels[:, None], self.codes.flatten(1) + self.first_code], dim=1)

    def images(self, tokens: Tensor) -> Tensor:
        """The images that rows of code tokens, (n, rows * columns), stand for, (n, height, width)."""
        return self.codebook.decode((tokens - self.first_code).view(-1, *self.codes.shape[1:]))


def image_model(
    run: Run,
    *,
    data: str,
    size: int,
    patch: int,
    codes: int,
    hidden_size: int,
    layers: int,
    epochs: float,
    seed: int,
    batch_size: int = 32,
    held_out: int = 1000,
) -> ImageModel:
    """The image model with these sizes, trained now or on an earlier run.

    Args:
        run: Shows progress.
        data: As for `pixels`.
        size: Side of the images in pixels.
        patch: Side of a patch in pixels.
        codes: Codes for patches.
        hidden_size: Width of the model.
        layers: Its layers.
        epochs: Passes over the images that are not held out.
        seed: Of codes, weights and order.
        batch_size: Images of a training step.
        held_out: Images kept from training, at most a tenth of all.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    pictures, labels = pixels(data, size)
    held_out = min(held_out, len(pictures) // 10)
    null, length = int(labels.max()) + 1, (size // patch) ** 2
    config = LlamaConfig(
        vocab_size=null + 1 + codes, hidden_size=hidden_size, intermediate_size=-(-8 * hidden_size // 3 // 16) * 16,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1 + length,
        tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip

    def build(folder: Path) -> None:
        torch.manual_seed(seed)
        codebook = Codebook.fit(pictures[:-held_out], codes=codes, patch=patch, seed=seed)
        known = codebook.encode(pictures[:-held_out])
        model = LlamaForCausalLM(config)
        model.get_input_embeddings().weight.data[null + 1 :] = codebook.embedding(hidden_size, seed)
        ids = torch.cat([labels[:-held_out, None], known.flatten(1) + null + 1], dim=1)

        def loss(rows: Tensor) -> Tensor:
            read = rows[:, :-1].clone()
            read[torch.rand(len(rows)) < 0.1, 0] = null
            return F.cross_entropy(model(input_ids=read).logits.flatten(0, 1), rows[:, 1:].flatten())

        steps = max(1, round(epochs * len(ids) / batch_size))
        with run.progress(steps, "training the image model") as bar:
            fit(model, loss, [ids], steps=steps, batch_size=batch_size, seed=seed, advance=bar.advance)
        judge = Judge((1, size, size), [null])
        shown = [codebook.decode(known)[:, None], labels[:-held_out, None]]
        steps = max(1, round(min(2.0, epochs) * len(known) / 64))
        with run.progress(steps, "training the judge") as bar:
            fit(judge, judge.loss, shown, steps=steps, batch_size=64, seed=seed, advance=bar.advance)
        save_model(model, str(folder / "model.safetensors"))
        save_file({"vectors": codebook.vectors}, folder / "codebook.safetensors")
        save_file(judge.state_dict(), folder / "judge.safetensors")

    key = {
        "data": identity(data, pictures), "size": size, "patch": patch, "codes": codes,
        "hidden_size": hidden_size, "layers": layers, "epochs": epochs, "batch_size": batch_size, "seed": seed,
        "version": __version__,
    }  # fmt: skip
    folder = cached_folder("image-models", key, build)
    codebook = Codebook(load_file(folder / "codebook.safetensors")["vectors"])
    judge = Judge((1, size, size), [null]).eval()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    model = LlamaForCausalLM(config).eval()
    load_model(model, folder / "model.safetensors")
    return ImageModel(model, codebook, judge, codebook.encode(pictures), labels, held_out)


def _patches(images: Tensor, patch: int) -> Tensor:
    """(..., height, width) as (..., rows, columns, patch * patch)."""
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise UsageError(f"images of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}")
    cut = images.unflatten(-1, (width // patch, patch)).unflatten(-3, (height // patch, patch))
    return cut.transpose(-3, -2).flatten(-2)


def fit(
    module: nn.Module,
    loss: Callable[..., Tensor],
    data: Sequence[Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 4e-3,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train `module` in place by AdamW with warm-up and cosine decay on batches of `data`, all of one length.

    Args:
        module: What is trained; in evaluation mode afterwards.
        loss: Of a batch, one tensor for each of `data`.
        data: Examples, (n, ...).
        steps: Batches.
        batch_size: Examples of each.
        learning_rate: Peak.
        seed: Order of the examples.
        advance: Called after each step.

    Returns:
        The loss of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(module.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    module.train()
    losses: list[float] = []
    while len(losses) < steps:
        order = torch.randperm(len(data[0]), generator=generator)
        for rows in order.split(batch_size)[: steps - len(losses)]:
            value = loss(*(part[rows] for part in data))
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(value.item())
            advance()
    module.eval()
    return losses


class Judge(nn.Module):
    """A small convolutional classifier of images or clips, whose features tell how far samples are from real ones.

    Args:
        shape: (channels, height, width); the frames of a clip are channels.
        classes: Classes of each thing it tells, such as the digit and the direction in which it moves.
        features: Width of the layer whose activations are the features.
    """

    def __init__(self, shape: tuple[int, int, int], classes: Sequence[int], features: int = 48) -> None:
        super().__init__()
        channels, height, width = shape
        self.classes = list(classes)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), features), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.Linear(features, sum(classes))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies of all that is told: images (n, *shape), labels (n, things)."""
        parts = self.heads(self.body(images)).split(self.classes, dim=-1)
        return torch.stack([F.cross_entropy(p, y) for p, y in zip(parts, labels.unbind(-1), strict=True)]).sum()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of images (n, *shape), (n, features)."""
        return torch.cat([self.body(part) for part in images.split(1024)])

    @torch.no_grad()
    def tell(self, images: Tensor) -> Tensor:
        """The most likely class of each thing, (n, things)."""
        parts = self.heads(self.features(images)).split(self.classes, dim=-1)
        return torch.stack([part.argmax(-1) for part in parts], dim=-1)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance between normal distributions fitted to two sets of features, (n, d) and (m, d).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), as in the Fréchet Inception distance (arXiv 1706.08500).

    Example:
        >>> points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(points, points + 2.0), 4)
        12.0
    """
    one, other = one.double(), other.double()
    first, second = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    return float(distance)
