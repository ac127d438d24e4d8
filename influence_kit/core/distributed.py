"""Ranks: each takes every ``world_size``-th batch of the training set; the results are gathered.

Without a ``torch.distributed`` process group, every function here returns its argument.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def is_alone() -> bool:
    """Whether this is the only rank."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def rank_count() -> int:
    """How many ranks share the training set."""
    return 1 if is_alone() else dist.get_world_size()


def is_mine(batch_number: int) -> bool:
    """Whether this rank computes the given batch of the training set."""
    return is_alone() or batch_number % dist.get_world_size() == dist.get_rank()


def gather_columns(tensor: Tensor) -> Tensor:
    """The tensors ``[..., n_rank]`` of all ranks, concatenated in the order of ranks."""
    if is_alone():
        return tensor
    device = tensor.device
    size = torch.tensor([tensor.shape[-1]], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    widths = [int(s) for s in sizes]
    # all_gather needs equal shapes: pad to the widest rank
    padded = tensor.new_zeros((*tensor.shape[:-1], max(widths)))
    padded[..., : tensor.shape[-1]] = tensor
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded)
    return torch.cat([part[..., :w] for part, w in zip(parts, widths, strict=True)], dim=-1)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in place; every rank must call it."""
    if not is_alone():
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(tensor: Tensor) -> Tensor:
    """The first rank's tensor, in place: for values that ranks compute with different rounding."""
    if not is_alone():
        dist.broadcast(tensor, src=0)
    return tensor


def is_first_rank() -> bool:
    """Whether this is the rank that does what only one rank must do (writing files, say)."""
    return is_alone() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every rank has reached this call."""
    if not is_alone():
        dist.barrier()


def texts_of_ranks(text: str, device: torch.device) -> list[str]:
    """The text of each rank, which must not hold a line break; every rank must call it."""
    if is_alone():
        return [text]
    codes = torch.tensor(list(f"{text}\n".encode()), dtype=torch.uint8, device=device)
    return bytes(gather_columns(codes).tolist()).decode().splitlines()
