"""NeuralCollapse: how far features and classifier are from their terminal geometry (arXiv 2301.00437)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from paperworks.representation.features import layer_features, layers_features, named_layer
from paperworks.representation.unconstrained_features import FrameGeometry

# Of the largest singular value: the scatter of K class means has rank K - 1, and the rest is rounding.
_RANK = 1e-6


class NeuralCollapse(Metric):
    """NC1 to NC4 of features and a linear classifier, streamed over batches in constant memory.

    Three sums a class are kept: its size, its sum, and all outer products, in float64; so order and splitting of batches
    change nothing, and processes add theirs up. All matrices are scaled to unit Frobenius norm before they are compared,
    so every figure but NC1 lies within [0, 2], and 0 is collapse.

    - `nc1`: tr(Sigma_W pinv(Sigma_B)) / K, variation within classes against that between their means.
    - `nc1_trace_ratio`: tr Sigma_W / tr Sigma_B, which needs no pseudo-inverse.
    - `nc2_etf`, `nc2_of`: how far the classifier's rows (the centred means, where there is none) are from a simplex
      equiangular tight frame, as cross-entropy or a bias makes them, and from an orthogonal frame.
    - `nc2_means_etf`, `nc2_means_of`: the same of the class means.
    - `nc3`: how far the classifier is from the class means, centred or not, whichever are nearer; `nc3_etf`, `nc3_of`: how far the class means' logits
      are from the frames.
    - `nc4`: share of samples for which the classifier says another class than the nearest class mean. It needs the
      final means, and so a second pass: `from_model` makes it, or call `agree` on each batch again.

    Figures that need a classifier are NaN without one, and `nc4` before a second pass.

    Args:
        num_classes: Classes, K, at least 2.
        weight: The classifier's matrix (K, d); or the matrices of several linear layers, first applied first.
        bias: The classifier's bias (K,).
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: Shapes that do not fit together.

    Example:
        >>> means = torch.eye(3) - 1 / 3
        >>> metric = NeuralCollapse(3, weight=means)
        >>> metric.update(means.repeat(4, 1), torch.arange(3).repeat(4))
        >>> {name: round(metric.compute()[name].item(), 6) for name in ("nc1", "nc2_etf", "nc3")}
        {'nc1': 0.0, 'nc2_etf': 0.0, 'nc3': 0.0}
    """

    higher_is_better = False
    full_state_update = False
    counts: Tensor
    sums: Tensor
    outer: Tensor
    apart: Tensor
    again: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        weight: Tensor | Sequence[Tensor] | None = None,
        bias: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(
                f"collapse is told between classes, so there are at least 2, got num_classes={num_classes}"
            )
        self.num_classes = num_classes
        matrix = None if weight is None else _product(weight)
        if matrix is not None and (matrix.ndim != 2 or len(matrix) != num_classes):
            raise ValueError(
                f"a classifier of {num_classes} classes is ({num_classes}, d), got a weight of {tuple(matrix.shape)}"
            )
        if bias is not None and (matrix is None or bias.shape != (num_classes,)):
            raise ValueError(f"bias belongs to a weight and is ({num_classes},), got {tuple(bias.shape)}")
        self.register_buffer("weight", matrix, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().double(), persistent=False)
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        # Their width is known with the first batch.
        self.add_state("sums", torch.zeros(num_classes, 0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("apart", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("again", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def from_model(cls, model: nn.Module, loader: Iterable[Any], layer: str) -> Self:
        """The metric after two passes of a loader through a model whose classifier is the linear layer `layer`.

        Args:
            model: Takes a batch's first element.
            loader: Batches (inputs, labels), which can be gone through twice.
            layer: Name of the classifier, an `nn.Linear`; its input is what is measured.

        Raises:
            ValueError: No such layer, or batches without labels.
            TypeError: The layer is not linear.
        """
        head = named_layer(model, layer)
        if not isinstance(head, nn.Linear):
            raise TypeError(
                f"layer {layer!r} is a {type(head).__name__}: name the linear layer that scores the classes"
            )
        metric = cls(head.out_features, weight=head.weight, bias=head.bias)
        for second in (False, True):
            for features, labels in layer_features(model, loader, layer, side="input"):
                if labels is None:
                    raise ValueError("collapse is told between classes: give batches of (inputs, labels)")
                metric = metric.to(features.device)
                metric.agree(features) if second else metric.update(features, labels)
        return metric

    @classmethod
    def by_layer(
        cls, model: nn.Module, loader: Iterable[Any], layers: Sequence[str], num_classes: int
    ) -> dict[str, Self]:
        """A metric of what comes out of each layer, by its name, in one pass: where in a network collapse sets in.

        Args:
            model: Takes a batch's first element.
            loader: Batches (inputs, labels).
            layers: Names of the layers, as `model.named_modules()` gives them.
            num_classes: Classes.

        Raises:
            ValueError: No such layer, or batches without labels.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
            >>> batch = torch.randn(10, 4), torch.arange(2).repeat(5)
            >>> list(NeuralCollapse.by_layer(model, [batch], ["0", "1"], 2)["1"].compute())[:2]
            ['nc1', 'nc1_trace_ratio']
        """
        metrics = {layer: cls(num_classes) for layer in layers}
        for outputs, labels in layers_features(model, loader, layers):
            if labels is None:
                raise ValueError("collapse is told between classes: give batches of (inputs, labels)")
            for metric, features in zip(metrics.values(), outputs, strict=True):
                metric.to(features.device).update(features, labels)
        return metrics

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            features: (batch, d), the input of the classifier.
            labels: Classes as whole numbers, (batch,).

        Raises:
            ValueError: Shapes that do not fit, labels out of range, or values that are not finite.
        """
        x = self._checked(features)
        if labels.shape != x.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels are {len(x)} whole numbers, one for each row, got {labels.dtype} of {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels lie within 0..{self.num_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
            )
        if not self.sums.shape[1]:
            self.sums, self.outer = x.new_zeros(self.num_classes, x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        self.counts += torch.bincount(labels, minlength=self.num_classes)
        self.sums = self.sums.index_add(0, labels, x)
        self.outer = self.outer + x.T @ x

    def agree(self, features: Tensor) -> None:
        """Take in a batch again, for `nc4`, once all batches have been taken in.

        Raises:
            ValueError: There is no classifier, or `update` has not seen every class.
        """
        if self.weight is None:
            raise ValueError("nc4 compares a classifier with the class means: give `weight`")
        x, means = self._checked(features), self.class_means
        said = (x @ self.weight.T + (0 if self.bias is None else self.bias)).argmax(1)
        # The nearest mean by squared distance, without what is the same for all means.
        near = (x @ means.T - means.square().sum(1) / 2).argmax(1)
        self.apart += (said != near).sum()
        self.again += len(x)

    def compute(self) -> dict[str, Tensor]:
        """The figures by name, each a number in float64.

        Raises:
            ValueError: A class without samples, a single sample each, or class means that are all the same.
        """
        means = self.class_means
        if int(self.counts.sum()) == self.num_classes:
            raise ValueError("each class has a single sample: variation within classes takes at least two of one")
        within, between = self._scatter(means)
        if not float(between.trace()) > 1e-24 * float(self.outer.trace()):
            raise ValueError("all class means are the same: these features tell no class from another")
        nan = means.new_full((), torch.nan)
        centred = means - means.mean(0)
        identity = torch.eye(self.num_classes, dtype=means.dtype, device=means.device)
        simplex = identity - 1 / self.num_classes
        w = self.weight
        rows, even = (means, centred) if w is None else (w, w - w.mean(0))
        found = {
            "nc1": (within @ torch.linalg.pinv(between, rtol=_RANK, hermitian=True)).trace() / self.num_classes,
            "nc1_trace_ratio": within.trace() / between.trace(),
            "nc2_means_etf": _apart(centred @ centred.T, simplex),
            "nc2_means_of": _apart(means @ means.T, identity),
            "nc2_etf": _apart(even @ even.T, simplex),
            "nc2_of": _apart(rows @ rows.T, identity),
            "nc3": nan if w is None else torch.minimum(_apart(w, centred), _apart(w, means)),
            "nc3_etf": nan if w is None else _apart(w @ centred.T, simplex),
            "nc3_of": nan if w is None else _apart(w @ means.T, identity),
            "nc4": self.apart / self.again if self.again else nan,
        }
        return found

    def against(self, geometry: FrameGeometry) -> dict[str, Tensor]:
        """How far classifier (`nc2_gof`), means (`nc2_means_gof`) and logits (`nc3_gof`) are from a frame of imbalanced classes.

        Raises:
            ValueError: There is no classifier, or the frame is of other classes.
        """
        if self.weight is None or len(geometry.counts) != self.num_classes:
            raise ValueError(
                f"a frame of {len(geometry.counts)} classes is compared with a classifier of as many: give `weight`, and "
                f"the counts of {self.num_classes} classes"
            )
        means, w = self.class_means, self.weight
        wanted = (
            torch.diag(values.to(w)) for values in (geometry.weight_squared, geometry.feature_squared, geometry.logit)
        )
        found = (w @ w.T, means @ means.T, w @ means.T)
        names = ("nc2_gof", "nc2_means_gof", "nc3_gof")
        return {name: _apart(one, other) for name, one, other in zip(names, found, wanted, strict=True)}

    @property
    def class_means(self) -> Tensor:
        """Mean features of each class, (K, d), in float64.

        Raises:
            ValueError: A class has no samples.
        """
        missing = (self.counts == 0).nonzero()[:, 0].tolist()
        if missing:
            raise ValueError(
                f"no sample of class {', '.join(map(str, missing[:5]))} was seen: each class of {self.num_classes} needs some"
            )
        return self.sums / self.counts[:, None]

    def _scatter(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """Sigma_W about the class means, and Sigma_B of the means about the mean of all samples, each (d, d)."""
        total = self.counts.sum()
        within = (self.outer - (means * self.counts[:, None]).T @ means) / total
        apart = means - self.sums.sum(0) / total
        return within, apart.T @ apart / self.num_classes

    def _checked(self, features: Tensor) -> Tensor:
        if features.ndim != 2:
            raise ValueError(f"features are (batch, d), got {tuple(features.shape)}")
        wanted = self.sums.shape[1] or (0 if self.weight is None else self.weight.shape[1])
        if wanted and features.shape[1] != wanted:
            raise ValueError(f"features have {wanted} numbers each, as before, got {features.shape[1]}")
        if not bool(features.isfinite().all()):
            raise ValueError("features hold NaN or infinity: look for what overflows before you measure collapse")
        return features.detach().double()

    def plot(self, *_: Any, **__: Any) -> Any:
        """Cosines between the class means, centred, and the figures beside them, as a matplotlib figure."""
        from matplotlib.figure import Figure

        found = {name: float(value) for name, value in self.compute().items() if not bool(value.isnan())}
        means = self.class_means
        unit = nn.functional.normalize(means - means.mean(0), dim=1)
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        image = left.imshow((unit @ unit.T).cpu(), vmin=-1, vmax=1, cmap="RdBu_r")
        left.set_title(f"cosines of class means; simplex: {-1 / (self.num_classes - 1):.2f}", fontsize=10)
        figure.colorbar(image, ax=left, shrink=0.8)
        right.barh(list(found)[::-1], [max(value, 1e-12) for value in found.values()][::-1], color="#1f6f8b")
        right.set_xscale("log")
        right.set_xlabel("0 is collapse")
        right.spines[["top", "right"]].set_visible(False)
        return figure


def _product(weight: Tensor | Sequence[Tensor]) -> Tensor:
    """The one matrix that linear layers, first applied first, amount to."""
    layers = [weight] if isinstance(weight, Tensor) else list(weight)
    product = layers[0].detach().double()
    for layer in layers[1:]:
        if layer.ndim != 2 or layer.shape[1] != len(product):
            raise ValueError(f"a layer of {tuple(layer.shape)} does not follow one with {len(product)} outputs")
        product = layer.detach().double() @ product
    return product


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Frobenius distance of two matrices, each scaled to norm 1; NaN where one is zero."""
    return torch.linalg.matrix_norm(found / torch.linalg.matrix_norm(found) - wanted / torch.linalg.matrix_norm(wanted))
