"""NeuralCollapse: how far features and classifier are from their terminal geometry (arXiv 2301.00437)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from paperworks.representation.features import (
    as_classes,
    as_matrix,
    as_numbers,
    layer_features,
    layers_features,
    named_layer,
)
from paperworks.representation.metric import StreamedMetric
from paperworks.representation.unconstrained_features import FrameGeometry

_FIGURES = (
    "nc1", "nc1_trace_ratio", "nc2_means_etf", "nc2_means_of", "nc2_etf", "nc2_of", "nc3", "nc3_etf", "nc3_of", "nc4",
)  # fmt: skip

# Beside the features' size: class means no farther apart are the same but for float64's rounding of their sums.
_SAME = 1e-12


class NeuralCollapse(StreamedMetric):
    """NC1 to NC4 of features and a linear classifier, streamed over batches in constant memory.

    Kept are each class's size and mean, and the scatter about the means, in float64; each batch is merged into them by
    Chan's rule. So order and splitting of batches change nothing, processes merge theirs, and features far from zero lose no
    digits. All matrices are scaled to unit Frobenius norm before they are compared, so every figure but NC1 lies within
    [0, 2], and 0 is collapse.

    - `nc1`: tr(Sigma_W pinv(Sigma_B)) / K, variation within classes against that between their means. A direction in which
      neither means nor samples differ by more than the features' dtype rounds tells nothing, and is left out.
    - `nc1_trace_ratio`: tr Sigma_W / tr Sigma_B, which needs no pseudo-inverse.
    - `nc2_etf`, `nc2_of`: how far the classifier's rows (the centred means, where there is none) are from a simplex
      equiangular tight frame, as cross-entropy or a bias makes them, and from an orthogonal frame.
    - `nc2_means_etf`, `nc2_means_of`: the same of the class means.
    - `nc3`: how far the classifier is from the class means, centred or not, whichever are nearer; `nc3_etf`, `nc3_of`: how far the class means' logits
      are from the frames.
    - `nc4`: share of samples for which the classifier says another class than the nearest class mean. It needs the
      final means, and so a second pass: `from_model` makes it, or call `agree` on each batch again.

    Figures that need a classifier are NaN without one, `nc4` before a second pass, and all of them where `metric(batch)` is
    given a batch in which a class is missing.

    Args:
        num_classes: Classes, K, at least 2.
        weight: The classifier's matrix (K, d); or the matrices of several linear layers, first applied first.
        bias: The classifier's bias (K,).
        **options: Of `torchmetrics.Metric`.

    Raises:
        ValueError: Shapes that do not fit together, or weights that are not finite.
        TypeError: The weights are no real numbers.

    Example:
        >>> means = torch.eye(3) - 1 / 3
        >>> metric = NeuralCollapse(3, weight=means)
        >>> metric.update(means.repeat(4, 1), torch.arange(3).repeat(4))
        >>> {name: round(metric.compute()[name].item(), 6) for name in ("nc1", "nc2_etf", "nc3")}
        {'nc1': 0.0, 'nc2_etf': 0.0, 'nc3': 0.0}
    """

    num_classes: int
    counts: Tensor
    means: Tensor
    scatter: Tensor
    rounding: Tensor
    apart: Tensor
    again: Tensor
    classifier: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        weight: Tensor | Sequence[Tensor] | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(num_classes, Integral) or num_classes < 2:
            raise ValueError(
                f"collapse is told between classes, so there are at least 2, got num_classes={num_classes}"
            )
        self.num_classes = int(num_classes)
        classifier = _classifier(self.num_classes, weight, bias)
        # Means and scatter are as wide as the features: known with the classifier, or the first batch.
        width = max(0, classifier.shape[1] - 1)
        shapes = {"counts": (self.num_classes,), "means": (self.num_classes, width), "scatter": (width, width)}
        for name, shape in {**shapes, "rounding": (), "apart": (), "again": ()}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64))
        # A state as well, although it never changes: a MetricCollection lets metrics of equal states share them.
        self.add_state("classifier", classifier)
        self._final: Tensor | None = None

    @classmethod
    def from_model(cls, model: nn.Module, loader: Iterable[Any], layer: str) -> Self:
        """The metric after two passes of a loader through a model whose classifier is the linear layer `layer`.

        Args:
            model: Takes a batch's first element.
            loader: Batches (inputs, labels), which can be gone through twice.
            layer: Name of the classifier, an `nn.Linear`; its input is what is measured.

        Raises:
            ValueError: No such layer, or batches without labels.
            TypeError: The layer is not linear, or the loader can be gone through once only.
        """
        if isinstance(loader, Iterator):
            raise TypeError(
                f"the loader is a {type(loader).__name__}, which is used up by the first of two passes: give a list of batches "
                "or a DataLoader"
            )
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
        if int(metric.counts.sum()) != int(metric.again):
            raise ValueError(
                f"the loader gave {int(metric.counts.sum())} samples, and {int(metric.again)} when gone through again: give "
                "one that gives the same each time"
            )
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
            >>> _ = torch.manual_seed(0)
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
        """Take in a batch; what `agree` has counted is then of other means, and forgotten.

        Args:
            features: (batch, d), the input of the classifier.
            labels: Classes as whole numbers, (batch,).

        Raises:
            ValueError: Shapes that do not fit, labels out of range, or values that are not finite.
            TypeError: Features that are no real numbers.
        """
        x, rounding = self._checked(features)
        y = as_classes(labels, len(x)).to(x.device)
        if not len(x):
            return
        if int(y.max()) >= self.num_classes:
            raise ValueError(f"labels lie within 0..{self.num_classes - 1}, got {int(y.min())}..{int(y.max())}")
        counts, centre = torch.bincount(y, minlength=self.num_classes).double(), x.mean(0)
        x = x - centre
        offset = x.new_zeros(self.num_classes, x.shape[1]).index_add(0, y, x) / counts.clamp(min=1)[:, None]
        residual = x - offset[y]
        self._take_in(counts, torch.where(counts[:, None] > 0, centre + offset, 0), residual.T @ residual)
        self.rounding = self.rounding.clamp(min=rounding)
        self.apart, self.again, self._final = torch.zeros_like(self.apart), torch.zeros_like(self.again), None

    def agree(self, features: Tensor) -> None:
        """Take in a batch again, for `nc4`, once all batches have been taken in.

        Where processes share the work, each calls it, if only with an empty batch: the first call before `compute` merges
        their means.

        Raises:
            ValueError: There is no classifier, or `update` has not seen every class.
        """
        if self.weight is None or self.bias is None:
            raise ValueError("nc4 compares a classifier with the class means: give `weight`")
        x, _ = self._checked(features)
        if self._final is None:
            with self._together():
                self._final = self.class_means
        means = self._final.to(x.device)
        centre = means.mean(0)
        said = (x @ self.weight.T + self.bias).argmax(1)
        # The nearest mean by squared distance, without what is the same for all means.
        near = ((x - centre) @ (means - centre).T - (means - centre).square().sum(1) / 2).argmax(1)
        self.apart, self.again = self.apart + (said != near).sum(), self.again + len(x)

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._final = None

    def compute(self) -> dict[str, Tensor]:
        """The figures by name, each a number in float64.

        Raises:
            ValueError: A class without samples, a single sample each, or class means that are all the same.
        """
        self._final = None
        try:
            return self._figures()
        except ValueError as error:
            self._untold(str(error))
            return dict.fromkeys(_FIGURES, self.counts.new_tensor(math.nan))

    def _figures(self) -> dict[str, Tensor]:
        means, total, w = self.class_means, self.counts.sum(), self.weight
        if int(total) == self.num_classes:
            raise ValueError("each class has a single sample: variation within classes takes at least two of one")
        within, apart = self.scatter / total, means - self.counts @ means / total
        nan = means.new_tensor(math.nan)
        centred = means - means.mean(0)
        identity = torch.eye(self.num_classes, dtype=means.dtype, device=means.device)
        simplex = identity - 1 / self.num_classes
        rows, even = (means, centred) if w is None else (w, w - w.mean(0))
        return {
            "nc1": self._nc1(within, apart),
            "nc1_trace_ratio": within.trace() / apart.square().sum() * self.num_classes,
            "nc2_means_etf": _apart(centred @ centred.T, simplex),
            "nc2_means_of": _apart(means @ means.T, identity),
            "nc2_etf": _apart(even @ even.T, simplex),
            "nc2_of": _apart(rows @ rows.T, identity),
            "nc3": nan if w is None else torch.minimum(_apart(w, centred), _apart(w, means)),
            "nc3_etf": nan if w is None else _apart(w @ centred.T, simplex),
            "nc3_of": nan if w is None else _apart(w @ means.T, identity),
            "nc4": self.apart / self.again if self.again else nan,
        }

    def _nc1(self, within: Tensor, apart: Tensor) -> Tensor:
        """tr(Sigma_W pinv(Sigma_B)) / K, of Sigma_W (d, d) and the class means about the mean of all samples (K, d)."""
        _, values, directions = torch.linalg.svd(apart / math.sqrt(self.num_classes), full_matrices=False)
        # Weighted by their counts the K rows add up to zero, so that the last of K singular values is rounding.
        values, directions = values[: self.num_classes - 1], directions[: self.num_classes - 1]
        along = (directions @ within * directions).sum(1)
        size = (within.trace() + self.class_means.square().sum() / self.num_classes).sqrt()
        # Rounding every number of the features moves the means by at most a third of this in any direction.
        least = self.rounding * size
        told = (values > _SAME * size) & ((values > least) | (along > least**2))
        if not bool(told.any()):
            raise ValueError("all class means are the same: these features tell no class from another")
        return (along[told] / values[told] ** 2).sum() / self.num_classes

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
        w = self.weight
        with self._together():
            means = self.class_means
        wanted = (
            torch.diag(values.to(w)) for values in (geometry.weight_squared, geometry.feature_squared, geometry.logit)
        )
        found = (w @ w.T, means @ means.T, w @ means.T)
        names = ("nc2_gof", "nc2_means_gof", "nc3_gof")
        return {name: _apart(one, other) for name, one, other in zip(names, found, wanted, strict=True)}

    @property
    def weight(self) -> Tensor | None:
        """The classifier's matrix (K, d) in float64, None where there is none."""
        return self.classifier[:, :-1] if self.classifier.shape[1] else None

    @property
    def bias(self) -> Tensor | None:
        """The classifier's bias (K,), zeros where it has none; None where there is no classifier."""
        return self.classifier[:, -1] if self.classifier.shape[1] else None

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
        return self.means

    def _take_in(self, counts: Tensor, means: Tensor, scatter: Tensor) -> None:
        """Merge other samples in, by Chan's rule: the scatter of both, and of each class's two means about their mean."""
        if not means.shape[1]:
            return
        if not self.means.shape[1]:
            self.counts, self.means, self.scatter = counts, means, scatter
            return
        if means.shape != self.means.shape:
            raise ValueError(f"features have {self.means.shape[1]} numbers each, as before, got {means.shape[1]}")
        share = counts / (self.counts + counts).clamp(min=1)
        step = means - self.means
        self.scatter = self.scatter + scatter + (step * (self.counts * share)[:, None]).T @ step
        self.means = self.means + share[:, None] * step
        self.counts = self.counts + counts

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self._take_in(*(incoming_state[name] for name in ("counts", "means", "scatter")))
        self.rounding = torch.maximum(self.rounding, incoming_state["rounding"])
        self.apart, self.again = self.apart + incoming_state["apart"], self.again + incoming_state["again"]
        self._final = None

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors, process_group: Any = None
    ) -> None:
        # Means can be merged only together with counts, and a process that saw nothing has none; torchmetrics would stack
        # each state of all processes by itself.
        names = [name for name in self._defaults if name != "classifier"]
        gathered = [dist_sync_fn(getattr(self, name), group=process_group or self.process_group) for name in names]
        first, *others = (dict(zip(names, states, strict=True)) for states in zip(*gathered, strict=True))
        final = self._final
        for name, state in first.items():
            setattr(self, name, state)
        for state in others:
            self._reduce_states(state)
        self._final = final

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What all processes have seen, where there are several, while it lasts."""
        merging = self._to_sync and not self._is_synced
        self.sync(dist_sync_fn=self.dist_sync_fn, should_sync=merging)
        try:
            yield
        finally:
            if merging and self._is_synced:
                self.unsync()

    def _checked(self, features: Tensor) -> tuple[Tensor, float]:
        """Features in float64, and by how much their dtype rounds."""
        x, dtype = as_matrix(features, "features"), as_numbers(features, "features").dtype
        wanted = self.means.shape[1]
        if wanted and x.shape[1] != wanted:
            raise ValueError(f"features have {wanted} numbers each, as before, got {x.shape[1]}")
        return x, torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps

    def plot(self, *_: Any, **__: Any) -> Any:
        """Cosines between the class means, centred, and the figures beside them, as a matplotlib figure."""
        from matplotlib.figure import Figure

        found = {name: float(value) for name, value in self.compute().items() if not bool(value.isnan())}
        with self._together():
            means = self.class_means
        unit = nn.functional.normalize(means - means.mean(0), dim=1)
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        image = left.imshow((unit @ unit.T).cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        left.set_title(f"cosines of class means; simplex: {-1 / (self.num_classes - 1):.2f}", fontsize=10)
        figure.colorbar(image, ax=left, shrink=0.8)
        right.barh(list(found)[::-1], [max(value, 1e-12) for value in found.values()][::-1], color="#1f6f8b")
        right.set_xscale("log")
        right.set_xlabel("0 is collapse")
        right.spines[["top", "right"]].set_visible(False)
        return figure


def _classifier(num_classes: int, weight: Tensor | Sequence[Tensor] | None, bias: Tensor | None) -> Tensor:
    """Weight and bias side by side, (K, d + 1) in float64; (K, 0) where there is none."""
    if weight is None:
        if bias is not None:
            raise ValueError("a bias belongs to a classifier: give its `weight`")
        return torch.zeros(num_classes, 0, dtype=torch.float64)
    layers = [as_matrix(layer, "weight") for layer in (weight if isinstance(weight, list | tuple) else [weight])]
    if not layers:
        raise ValueError("weight has no layers: give the classifier's matrix, or those of several linear layers")
    product = layers[0]
    for layer in layers[1:]:
        if layer.shape[1] != len(product):
            raise ValueError(f"a layer of {tuple(layer.shape)} does not follow one with {len(product)} outputs")
        product = layer @ product
    if len(product) != num_classes:
        raise ValueError(
            f"a classifier of {num_classes} classes is ({num_classes}, d), got a weight of {tuple(product.shape)}"
        )
    added = product.new_zeros(num_classes) if bias is None else as_numbers(bias, "bias").to(product)
    if added.shape != (num_classes,) or not bool(added.isfinite().all()):
        raise ValueError(f"bias is ({num_classes},) finite numbers, got {tuple(added.shape)}")
    return torch.cat([product, added[:, None]], 1)


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Frobenius distance of two matrices, each scaled to norm 1; NaN where one is zero."""
    return torch.linalg.matrix_norm(found / torch.linalg.matrix_norm(found) - wanted / torch.linalg.matrix_norm(wanted))
