"""The precision of sums, complex numbers as pairs of real ones, and the bytes of a tensor."""

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which numbers of a dtype are summed: float32 for half precision.

    Example:
        >>> [exact_dtype(dtype) for dtype in (torch.float16, torch.float64, torch.complex64)]
        [torch.float32, torch.float64, torch.float32]
    """
    # the real part of a complex number has half its bits
    real = torch.finfo(dtype).dtype if dtype.is_complex else str(dtype).removeprefix("torch.")
    found: torch.dtype = getattr(torch, real)
    return torch.float32 if found in HALF else found


def exact(tensor: Tensor) -> Tensor:
    """Half precision as float32, for products and sums; other dtypes unchanged."""
    return tensor.float() if tensor.dtype in HALF else tensor


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, ``[*shape, 2]``; a real one unchanged.

    Inner products of such pairs are Re(conj(g) . g').
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def has_complex(layer: nn.Module) -> bool:
    """Whether a layer has complex parameters of its own."""
    return any(parameter.is_complex() for parameter in layer.parameters(recurse=False))


def real_shape(tensor: Tensor) -> torch.Size:
    """The shape of ``real(tensor)``."""
    return torch.Size([*tensor.shape, 2]) if tensor.is_complex() else tensor.shape


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor on the CPU, one after the other, ``[bytes]``."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    # a single entry of a column counts as contiguous and keeps the column's stride
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def restored(pairs: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of ``real``: complex if the second tensor is, else unchanged."""
    return torch.view_as_complex(pairs.contiguous()) if tensor.is_complex() else pairs
