"""See what a network has learnt.

A method of this room is a torchmetrics `Metric` (update, compute, reset; its sums add up over processes), or an analysis
function that returns a dataclass with `plot()`. Both work on any `nn.Module`: `layer_features` streams what a named layer gives.

What each keeps to: order and splitting of batches do not change a result; rotating features changes nothing where the theory
says so; one class, one sample, constant features or NaN is one clear sentence.
"""

from paperworks.representation.features import layer_features

__all__ = ["layer_features"]
