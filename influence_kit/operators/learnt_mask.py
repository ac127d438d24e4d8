"""Which entries of gradients keep their inner products best: the mask that GraSS learns."""

import torch
from torch import Tensor

STEPS, RATE = 100, 0.1


def learnt_mask(gradients: Tensor, k: int, sparsity: float = 1e-3) -> Tensor:
    """The places of the k entries, ascending ``[k]``, that a relaxed mask weighs most.

    The mask sigmoid(s) in (0, 1)^p is fitted by gradient steps (Adam) to maximise the mean
    correlation, over the examples as queries, of their inner products with the others before and
    after masking, less ``sparsity`` times its mean (arXiv 2505.18976, section 3).

    Args:
        gradients: of some training examples, ``[n, p]``.
        k: how many entries to choose.
        sparsity: the weight of the mask's mean.
    """
    values = gradients.detach()
    values = values / values.square().mean().sqrt().clamp(min=torch.finfo(values.dtype).tiny)
    others = ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    target = _standard(values @ values.T, others)
    logits = torch.zeros(values.shape[1], dtype=values.dtype, device=values.device)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    for _ in range(STEPS):
        with torch.enable_grad():
            mask = logits.sigmoid()
            masked = values * mask
            correlation = (target * _standard(masked @ masked.T, others)).sum(1).mean()
            (sparsity * mask.mean() - correlation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits.detach().topk(k).indices.sort().values


def _standard(products: Tensor, others: Tensor) -> Tensor:
    """Each row without its own entry, of mean 0 and norm 1 ``[n, n - 1]``."""
    rows = products[others].view(len(products), -1)
    rows = rows - rows.mean(1, keepdim=True)
    norms: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)
