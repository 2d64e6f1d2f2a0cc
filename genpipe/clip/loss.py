"""The symmetric contrastive loss of CLIP (arXiv 2103.00020, section 2.3, figure 3), also across processes.

Legend: B pairs on this process, G = B x number of processes, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def contrastive_loss(
    image_embedding: torch.Tensor,
    text_embedding: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    local_loss: bool = False,
) -> torch.Tensor:
    """Figure 3 of the paper: cross-entropy over scaled cosine similarities, pictures against texts and back, halved.

    `image_embedding` and `text_embedding` (B, D) belong together row by row and are normalised here; `logit_scale` is
    exp(t), a scalar already clipped. Computed in float32 whatever the autocast state. Returns a scalar.

    When torch.distributed is initialised, the pairs of all processes are gathered (every process must bring the same B)
    and gradients flow back to the process that made them. Averaged over processes, as DistributedDataParallel does with
    gradients, both forms equal one process holding all G pairs: by default each process computes the full G x G loss;
    with `local_loss` only its own B rows of either direction, which needs less memory and arithmetic.

    Hard negatives are simply further pairs of the batch.
    """
    with torch.autocast(image_embedding.device.type, enabled=False):
        I_e = F.normalize(image_embedding.float(), dim=-1)  # B, D
        T_e = F.normalize(text_embedding.float(), dim=-1)  # B, D
        all_I, all_T, first = _gathered(I_e), _gathered(T_e), len(I_e) * _rank()  # G, D
        if not local_loss:
            I_e, T_e, first = all_I, all_T, 0
        logits_per_image = logit_scale.float() * I_e @ all_T.T  # G or B, G
        logits_per_text = logit_scale.float() * T_e @ all_I.T
        labels = torch.arange(first, first + len(I_e), device=I_e.device)
        return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order (G, D), differentiable; the rows themselves when there is one process."""
    return _GatherRows.apply(rows) if _distributed() else rows


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward adds up what every process's loss says about this process's rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        pieces = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        rows = len(total) // dist.get_world_size()
        return total[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]
