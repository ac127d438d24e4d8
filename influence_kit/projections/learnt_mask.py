"""The mask that GraSS learns: the entries of gradients that preserve inner products best.

Shapes: n examples, p entries of a gradient, k entries that are kept.
"""

import torch
from torch import Tensor

STEPS, RATE = 100, 0.1


def learnt_mask(gradients: Tensor, k: int) -> Tensor:
    """Indices of k entries, ascending ``[k]``, that preserve inner products best of those tried.

    The objective is the correlation of inner products before and after masking, between each
    example as query and the others, averaged over queries (arXiv 2505.18976, section 3). Each entry
    has a score; the mask selects the k highest, and the scores take gradient steps (Adam) as if the
    mask were their sigmoid (arXiv 1308.3432). The best mask of all steps is returned.

    Args:
        gradients: the gradients of some training examples, ``[n, p]``.
        k: how many entries to choose.
    """
    values = gradients.detach()
    values = values / values.abs().max().clamp(min=torch.finfo(values.dtype).tiny)
    others = ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    target = _standard(values @ values.T, others)
    # not from equal scores: a mask of equal weights preserves all inner products, so that only
    # rounding would decide
    scores = _own_covariances(values, target, others).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=RATE)
    most, best = -torch.inf, torch.arange(k, device=values.device)
    for _ in range(STEPS):
        chosen = scores.detach().topk(k).indices
        with torch.enable_grad():
            soft = scores.sigmoid()
            mask = torch.zeros_like(soft).index_fill(0, chosen, 1.0) + soft - soft.detach()
            kept = _standard((values * mask) @ values.T, others)
            correlation = (target * kept).sum(1).mean()
            (-correlation).backward()
        reached = float(correlation.detach())
        if reached > most:
            most, best = reached, chosen
        optimizer.step()
        optimizer.zero_grad()
    return best.sort().values


def _own_covariances(values: Tensor, target: Tensor, others: Tensor) -> Tensor:
    """How each entry's products covary with the inner products, scaled to standard deviation 1."""
    pairs = torch.zeros_like(others, dtype=values.dtype).masked_scatter(others, target)
    own = ((pairs @ values) * values).sum(0)
    return own / own.std(correction=0).clamp(min=torch.finfo(own.dtype).tiny)


def _standard(products: Tensor, others: Tensor) -> Tensor:
    """Each row without its diagonal entry, with mean 0 and norm 1, ``[n, n - 1]``."""
    rows = products[others].view(len(products), -1)
    rows = rows - rows.mean(1, keepdim=True)
    norms: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)
