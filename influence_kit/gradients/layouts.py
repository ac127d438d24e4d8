"""Where the examples stand in the tensors that a layer sees.

Most layers see examples in the first dimension. Others see them second (time-first sequences),
folded into it (``x.view(n * t, -1)``), stacked in it (``torch.cat([a, b])`` of two views of every
example), or not at all (position ids ``[t]`` whose output is broadcast over the batch). Which it is
cannot be read off one shape; ``check`` tries them against autograd. All that a layer sees in a
batch of one example belongs to it.
"""

from torch import Tensor

ROWS, SECOND, FOLDED, STACKED, SHARED = "rows", "second", "folded", "stacked", "shared"


def arrange(tensor: Tensor, layout: str, n: int, leads: bool = False) -> Tensor:
    """The tensor with a first dimension of n times some number, an example's items together.

    ``leads``: of what the batch shares, whether its first dimension is one of length 1 for it.
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
        f"a layer saw a tensor of shape {list(tensor.shape)} for {n} examples; in the first batch "
        f'its examples stood otherwise (layout "{layout}")'
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
    # n positions that the batch shares look like n examples
    return [*allowed, SHARED]
