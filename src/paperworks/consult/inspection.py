"""What a user's own classifier or VAE has learnt: every diagnosis that applies, and what the theory says to change."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

# NC1 below which classes are points beside the distances between them.
_COLLAPSED = 0.1
# Of the longest row of a classifier: a shorter one says nothing.
_LOST = 0.01


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Of the figure.
        value: The figure.
        says: What it means, and what would change it; empty where the figure speaks for itself.
    """

    name: str
    value: float
    says: str = ""


@dataclass(frozen=True)
class Inspection:
    """All findings about one model.

    Attributes:
        kind: classifier or VAE.
        layer: The layer that was looked at; "encode" for a VAE.
        samples: How many samples it was shown.
        findings: In the order in which to read them.
        figures: matplotlib figures by name.
    """

    kind: str
    layer: str
    samples: int
    findings: tuple[Finding, ...]
    figures: dict[str, Any] = field(repr=False, default_factory=dict)


def load_network(model: str, *, weights: Path | None = None) -> nn.Module:
    """A user's network.

    Args:
        model: `FILE.py:NAME` or `package.module:NAME`, where NAME is an `nn.Module` or a function without arguments that
            makes one; or the folder or id of a transformers image classifier.
        weights: A safetensors file with its state, where it is not made with its weights.

    Raises:
        UsageError: There is no such file or name, it is no network, or the weights do not fit.
    """
    from torch import nn

    place, colon, name = model.rpartition(":")
    if not colon:
        if weights is not None:
            raise UsageError(f"{model} comes with its own weights: give FILE.py:NAME with --weights, or leave them out")
        return _transformers(model)
    module = _module(place)
    if not hasattr(module, name):
        raise UsageError(f"{place} has no {name!r}: give the name of a network, or of a function that makes one")
    found = getattr(module, name)
    if not isinstance(found, nn.Module) and not callable(found):
        raise UsageError(
            f"{model} is of type {type(found).__name__}: give a torch.nn.Module, or a function that makes one"
        )
    try:
        network = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise UsageError(
            f"{model} cannot be called without arguments ({_first_line(error)}): give a function that makes the network"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{model} gives a {type(network).__name__}, and a torch.nn.Module is wanted")
    if weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        try:
            load_model(network, str(weights))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"the weights in {weights} do not fit {model}: {_first_line(error)}") from error
    return network


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _module(place: str) -> Any:
    path = Path(place)
    if path.suffix != ".py":
        try:
            return importlib.import_module(place)
        except Exception as error:
            raise UsageError(
                f"{place} cannot be imported ({_first_line(error)}): give FILE.py:NAME or package.module:NAME"
            ) from error
    if not path.is_file():
        raise UsageError(f"there is no file {place}: give FILE.py:NAME, package.module:NAME or a transformers folder")
    # By a name of its own, as a file random.py is not to stand in for Python's.
    spec = importlib.util.spec_from_file_location(f"inspected_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # What lies beside the file it may import, as when it is run.
    folder = str(path.resolve().parent)
    sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UsageError(
            f"{place} fails when it is loaded, with {type(error).__name__} ({_first_line(error)}): see that "
            f"`python {path.name}` runs"
        ) from error
    finally:
        sys.path.remove(folder)
    return module


def _transformers(model: str) -> nn.Module:
    from torch import nn

    from paperworks.hub.models import load_image_classifier

    try:
        found = load_image_classifier(model)
    except UsageError as error:
        raise UsageError(f"{str(error).rstrip('.')}; your own network is FILE.py:NAME") from error

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = found

        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = self.model(pixel_values=pixels).logits
            return logits

    return Logits()


def batches(data: str, batch_size: int = 256) -> list[tuple[Tensor, Tensor]]:
    """A data set's inputs as the hub has them, in float32, and labels, batch by batch.

    Images are (batch, 1, height, width) with values from 0 to 1. Labels are indices of classes; a target that is no class
    stays the number it is, for a VAE is shown such rows too.

    Args:
        data: A name or path, as `paperworks.hub.load_dataset` takes it.
        batch_size: Samples of a batch.

    Raises:
        UsageError: The data is neither a table nor images.
    """
    import torch

    from paperworks.hub import ImageData, TableData, load_dataset

    found = load_dataset(data)
    if isinstance(found, ImageData):
        X, y = torch.tensor(found.images)[:, None].float() / 255, torch.tensor(found.labels)
    elif isinstance(found, TableData):
        with suppress(UsageError):
            found = found.labelled()
        X, y = torch.tensor(found.X).float(), torch.tensor(found.y)
    else:
        raise UsageError(f"{data} is neither a table nor images: a network is shown inputs with labels")
    cuts = list(range(batch_size, len(X), batch_size))
    return list(zip(X.tensor_split(cuts), y.tensor_split(cuts), strict=True))


def inspect(model: nn.Module, loader: Iterable[Any], *, layer: str | None = None) -> Inspection:
    """Run every diagnosis that applies to a classifier or VAE.

    A model whose `encode` gives means and log-variances is taken for a VAE, unless a layer is named; any other for a
    classifier, whose last linear layer is looked at.

    Args:
        model: The network.
        loader: Batches (inputs, labels), which can be gone through more than once.
        layer: Name of the classifier's linear layer, as `named_modules()` gives it.

    Raises:
        UsageError: No diagnosis applies, or the model does not take such inputs.
    """
    from torch import nn

    if isinstance(loader, Iterator):
        raise UsageError(
            f"the loader is a {type(loader).__name__}, which is used up when it is gone through once: give a list of batches "
            "or a DataLoader"
        )
    if layer is None and callable(getattr(model, "encode", None)):
        return _vae(model, loader)
    if layer is None:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UsageError(
                "no diagnosis applies: the model has no linear layer to take for a classifier, and no `encode` that gives "
                "means and log-variances"
            )
        layer = linear[-1]
    return _classifier(model, loader, layer)


def _classifier(model: nn.Module, loader: Iterable[Any], layer: str) -> Inspection:
    import torch

    from paperworks.representation import NeuralCollapse

    try:
        metric = NeuralCollapse.from_model(model, loader, layer)
        found = {name: float(value) for name, value in metric.compute().items()}
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"layer {layer!r} cannot be looked at: {_first_line(error)}") from error
    counts, weight = metric.counts, metric.weight
    assert weight is not None
    rows = torch.linalg.norm(weight, dim=1)
    lost = (rows < _LOST * rows.max()).nonzero()[:, 0].tolist()
    balance = float(counts.max() / counts.min())
    tight = found["nc1"] < _COLLAPSED
    return Inspection(
        "classifier", layer, int(counts.sum()),
        (
            Finding("nc1", found["nc1"], "classes have collapsed to points" if tight else (
                "classes are not points yet: train on past the last error; more weight decay of the body moves this more "
                "than more decay of the classifier"
            )),
            Finding("nc2_etf", found["nc2_etf"], _geometry(found["nc2_etf"], "a simplex, as equal classes and a bias make it")),
            Finding("nc2_of", found["nc2_of"], _geometry(found["nc2_of"], "orthogonal, as squared error without a bias makes it")),
            Finding("nc3", found["nc3"], "classifier and class means point the same way" if found["nc3"] < 0.3 else (
                "classifier and class means point different ways, as long as training is far from its end"
            )),
            Finding("nc4", found["nc4"], "of samples are given another class than the nearest mean's"),
            Finding("largest class / smallest", balance, "" if balance < 1.5 else (
                "classes are imbalanced: larger ones end with longer rows and shorter features; weigh or balance them"
            )),
            Finding("classes lost", len(lost), "" if not lost else (
                f"class {', '.join(map(str, lost[:5]))} has no row left, as one has with n <= N^2 lam_w lam_h samples: lower "
                "the weight decay, or show more of it"
            )),
        ),
        {"neural-collapse": metric.plot()},
    )  # fmt: skip


def _geometry(distance: float, name: str) -> str:
    return f"the classifier's rows are {name}" if distance < 0.2 else f"0 would be {name}"


def _vae(model: nn.Module, loader: Iterable[Any]) -> Inspection:
    from paperworks.representation import PosteriorCollapse, VariableActivity

    try:
        report = PosteriorCollapse.from_encoder(model.encode, loader).compute()  # type: ignore[arg-type]
        activity = VariableActivity.from_encoder(model.encode, loader).compute()  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise UsageError(
            f"`encode` cannot be looked at ({_first_line(error)}): it takes a batch, and gives means and "
            "log-variances, each (batch, d)"
        ) from error
    dims = len(report.kl)
    return Inspection(
        "VAE", "encode", report.samples,
        (
            Finding("collapsed variables", int(report.collapsed().sum()), report.advise()),
            Finding("latent variables", dims),
            Finding("active units", report.active_units, "of samples and variables have a divergence of 0.01 nats or more"),
            *_kinds(activity, dims),
        ),
        {"posterior-collapse": report.plot(), "variable-activity": activity.plot()},
    )  # fmt: skip


def _kinds(activity: Any, dims: int) -> Iterator[Finding]:
    told = {
        "active": "carry data in mean and sample alike",
        "mixed": "carry data for some inputs only: their means look more correlated than their samples",
        "passive": "are noise: leave them out when you read the mean representation, or lower beta to use them",
    }
    for kind, says in told.items():
        count = len(activity.indices(kind))
        yield Finding(f"{kind} variables", count, f"{count} of {dims} {says}" if count else "")
