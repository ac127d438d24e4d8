"""Layouts: how examples are arranged in the tensors of a layer.

Most layers have examples in the first dimension. Others have them in the second one (time-first
sequences), folded into the first (``x.view(n * t, -1)``), stacked in it (``torch.cat([a, b])`` of
two views of every example), or not at all (position ids ``[t]`` whose output is broadcast over the
batch). One shape does not show which; ``check`` compares the candidates with autograd. In a batch
of one example, everything belongs to that example.
"""

from torch import Tensor

ROWS, SECOND, FOLDED, STACKED, SHARED = "rows", "second", "folded", "stacked", "shared"


def arrange(tensor: Tensor, layout: str, n: int, leads: bool = False) -> Tensor:
    """The tensor with a first dimension of n times some number, an example's items together.

    ``leads``: whether the first dimension of a shared tensor is a batch dimension of length 1.
    """
    if n == 1:
        return tensor
    if layout == SHARED:
        return shared(tensor, n, leads)
    if layout == SECOND and tensor.dim() > 1 and tensor.shape[1] == n:
        return tensor.transpose(0, 1)
    whole = tensor.shape[0] % n == 0
    if layout == STACKED and whole:
        return tensor.reshape(-1, n, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)
    if (layout == FOLDED and whole) or (layout == ROWS and tensor.shape[0] == n):
        return tensor
    raise ValueError(
        f"a layer got a tensor of shape {list(tensor.shape)} for {n} examples; in the first batch "
        f'its examples were arranged differently (layout "{layout}")'
    )


def shared(tensor: Tensor, n: int, leads: bool) -> Tensor:
    """One copy per example (without memory) of a tensor that belongs to the whole batch."""
    one = tensor if leads and tensor.shape[0] == 1 else tensor.unsqueeze(0)
    return one.expand(n, *one.shape[1:])


def candidates(tensors: list[Tensor], n: int) -> list[str]:
    """The layouts that the shapes allow, likeliest first."""
    allowed = []
    if all(t.dim() > 0 and t.shape[0] == n for t in tensors):
        allowed.append(ROWS)
    if all(t.dim() > 1 and t.shape[1] == n for t in tensors):
        allowed.append(SECOND)
    if all(t.dim() > 0 and t.shape[0] % n == 0 for t in tensors) and ROWS not in allowed:
        allowed += [FOLDED, STACKED]
    # n positions shared by the batch look like n examples
    return [*allowed, SHARED]
