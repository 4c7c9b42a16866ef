"""The number of salient objects of an image: a head on the branches' backbone [ours]."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_COUNT = 4  # the largest number that is predicted stands for itself and all above, which are rare in every data set


class CountHead(nn.Module):
    """Probabilities of 1 to MAX_COUNT salient objects: linear in the standardised averages of f4 and f5 [ours].

    It is fitted to the count labels after all other training (``fit``), with the backbone frozen.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        """channels: C_4 + C_5."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.linear = nn.Linear(channels, MAX_COUNT).requires_grad_(False)

    @staticmethod
    def pool(features: Sequence[Tensor]) -> Tensor:
        """f1..f5 of [N,C_l,h_l,w_l] -> the averages of f4 and f5 [N,C_4 + C_5]."""
        return torch.cat([feature.mean((2, 3)) for feature in features[3:]], 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """f1..f5 -> the probabilities of 1..MAX_COUNT objects [N,MAX_COUNT]."""
        return self.linear((self.pool(features).float() - self.mean) * self.scale).softmax(1)

    def fit(self, pooled: Tensor, counts: Tensor, decay: float = 0.2) -> None:
        """Multinomial logistic regression with equal weight for every number, since most images show one object; the
        prior of the numbers is added to the bias afterwards.

        pooled: [M,C_4 + C_5] of ``pool``; counts: [M], 1 or more; decay: weight of the squared parameters, for
        standardised features (.2 from five-fold cross-validation on the training images).
        """
        self.mean.copy_(pooled.mean(0))
        self.scale.copy_(1 / (pooled.std(0, correction=0) + 1e-3))
        x, y = (pooled - self.mean) * self.scale, counts.long().clamp(max=MAX_COUNT) - 1
        times = torch.bincount(y, minlength=MAX_COUNT).clamp(min=1)

        def loss() -> Tensor:
            squares = torch.stack([parameter.square().sum() for parameter in self.linear.parameters()]).sum()
            return F.cross_entropy(self.linear(x), y, weight=1 / times) + decay / 2 * squares

        fit_convex(self.linear, loss)
        self.linear.bias.add_((times / times.sum()).log())


@torch.enable_grad()
def fit_convex(layer: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Minimise the convex ``loss()`` over the parameters of ``layer``, in place, from zero (L-BFGS); then freeze it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter).requires_grad_(True)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value  # type: ignore[return-value]  # L-BFGS takes a tensor, too

    optimizer.step(closure)
    layer.requires_grad_(False)


def expected_count(count_probs: Tensor) -> Tensor:
    """The expected number of objects, rounded: it errs less than the most probable number.

    count_probs: the probabilities of 1..M objects [..,M], all 0 where the number is not predicted. Returns [..], a
    float tensor of integers in 1..M, or 0 where it is not predicted.
    """
    numbers = torch.arange(1, count_probs.shape[-1] + 1, device=count_probs.device)
    return (count_probs * numbers).sum(-1).round()


def one_hot_count(count: int) -> Tensor:
    """The probabilities of 1..count objects [count] when the number is given as ``count``, 0 or more."""
    return (torch.arange(1, count + 1) == count).float()
