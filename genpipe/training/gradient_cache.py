"""Gradient caching: the loss of many batches compared with one another, in the memory of one (2101.06983, 3.2).

A contrastive loss looks at all pairs at once, so accumulating over batches gives another loss, with fewer negatives.
But what it looks at is small: two embeddings a pair. So the embeddings of all batches are made without a graph, the
loss of all of them gives each embedding's gradient, and a second pass, batch after batch, takes that to the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Logs = dict[str, Tensor]


def cached_losses(
    features: Callable[[Part], tuple[Tensor, ...]],
    parts: Sequence[Part],
    loss: Callable[[list[tuple[Tensor, ...]]], tuple[Tensor, Logs]],
) -> Iterator[tuple[Tensor, Logs]]:
    """A scalar for each of `parts`; their gradients have as their mean the gradient of the loss of all parts together.

    features: part -> what the loss looks at, with a graph to the weights; it is called twice for each part and must
    draw the same random numbers both times. loss: the features of all parts -> scalar and figures. Each scalar has the
    value of that loss, and is to be back-propagated before the next is asked for, so that one graph is in memory.
    """
    with torch.no_grad():
        cached = [features(part) for part in parts]
    leaves = [tuple(feature.detach().requires_grad_() for feature in each) for each in cached]
    whole, logs = loss(leaves)
    gradients = iter(torch.autograd.grad(whole, [leaf for each in leaves for leaf in each], materialize_grads=True))
    for part in parts:
        pull = torch.stack([(feature * next(gradients)).sum() for feature in features(part)]).sum()
        yield whole.detach() + len(parts) * (pull - pull.detach()), logs
