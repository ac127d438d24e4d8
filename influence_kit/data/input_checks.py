"""Checks of data and inputs: what is not usable is refused, with what to pass instead."""

from collections.abc import Iterable, Iterator, Mapping, Set
from numbers import Number
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate

from influence_kit.core.arguments import refuse_deep, shown
from influence_kit.data.batches import call_arguments, is_batch, is_dataset
from influence_kit.errors import InvalidArgumentError

EXAMPLES = (tuple, list, Mapping)
LOADER = "DataLoader(data, batch_size=...)"


def refuse_no_data(data: Any, name: str) -> None:
    """Refuse data without examples that a method can read: a table, a text, bare tensors."""
    refuse_deep(data, name)
    what = _kind_of_no_data(data, has_targets=name != "influence_src_dataset")
    if what is not None:
        raise InvalidArgumentError(
            f"`{name}` is {what}; it must be a Dataset or sequence of examples, or a DataLoader "
            "of batches: `TensorDataset(inputs, targets)` makes a Dataset from tensors"
        )
    if not is_dataset(data) and not isinstance(data, Iterable):
        raise InvalidArgumentError(
            f"`{name}` must be a Dataset, a sequence of examples, or a DataLoader; got a "
            f"{type(data).__name__}"
        )


def _kind_of_no_data(data: Any, has_targets: bool) -> str | None:
    if isinstance(data, str | bytes):
        return f"a {type(data).__name__}"
    if hasattr(data, "iloc"):
        return f"a {type(data).__name__}, whose columns cannot be assigned to inputs and targets"
    if isinstance(data, Set):
        return f"a {type(data).__name__}, which has no order"
    if getattr(data, "ndim", 1) == 0:
        return f"a single value, {shown(data)}"
    if isinstance(data, Mapping) and 0 not in data:
        return f"a dict of {_keys(data)}"
    if getattr(getattr(data, "dtype", None), "kind", None) == "O":
        return f"a {type(data).__name__} of Python objects"
    if isinstance(data, tuple | list) and data and data[0] is None:
        return f"a {type(data).__name__} that begins with None"
    if not has_targets:
        return None
    if isinstance(data, Tensor) or hasattr(data, "__array_interface__"):
        return f"a {type(data).__name__}, whose rows have no targets"
    if isinstance(data, tuple | list) and data and all(isinstance(item, Tensor) for item in data):
        return f"a {type(data).__name__} of {len(data)} tensors"
    if isinstance(data, tuple | list) and data and not isinstance(data[0], EXAMPLES):
        return f"a {type(data).__name__} that begins with {shown(data[0])}, which is not an example"
    return None


def as_examples(inputs: Any) -> bool:
    """Whether test ``inputs`` are examples in a Dataset, or in a list that cannot be a batch."""
    if isinstance(inputs, list):
        pairs = [item for item in inputs if isinstance(item, tuple | list) and len(item) > 1]
        # the targets of a batch are not a tuple that ends in one number
        return bool(pairs) and len(pairs) == len(inputs) and all(_is_number(p[-1]) for p in pairs)
    return is_dataset(inputs) and not is_batch(inputs) and not isinstance(inputs, Tensor)


def refuse_inputs(inputs: Any) -> None:
    """Refuse test inputs that are neither a batch, nor a loader, nor a Dataset."""
    refuse_deep(inputs, "inputs")
    if isinstance(inputs, Tensor):
        advice = "pass it with its targets, `(inputs, targets)`; without targets, `(inputs, None)`"
    elif isinstance(inputs, list) and inputs and all(isinstance(i, Mapping) for i in inputs):
        if len({tuple(item) for item in inputs}) > 1:
            return
        raise InvalidArgumentError(
            f"`inputs` is a list of {len(inputs)} dicts with the same keys {_keys(inputs[0])}; a "
            "batch is one dict of tensors with one row per example. If they are examples, pass "
            f"`{LOADER.replace('data', 'inputs')}` (with the `collate_fn` of training); if they "
            "are batches, pass a DataLoader that gives them"
        )
    elif hasattr(inputs, "iloc"):
        advice = "convert its columns to tensors, `(inputs, targets)`"
    elif hasattr(inputs, "__array_interface__"):
        advice = "convert it to a tensor, `(torch.as_tensor(inputs), targets)`"
    elif isinstance(inputs, str | bytes):
        advice = "tokenize it, and pass what the model takes"
    elif isinstance(inputs, Set):
        advice = "which has no order; pass a list of examples"
    elif reads_once(inputs):
        advice = (
            "which can be read only once, but methods read it several times: pass a DataLoader, a "
            "Dataset, or an object whose `__iter__` starts again"
        )
    elif not isinstance(inputs, Iterable) and not is_dataset(inputs):
        advice = "pass one of these"
    else:
        return
    raise InvalidArgumentError(
        "`inputs` must be a batch (tuple, list or dict of tensors), a Dataset or a DataLoader; got "
        f"a {type(inputs).__name__}: {advice}"
    )


def refuse_uncollatable(model: nn.Module, example: Any, name: str) -> None:
    """Refuse an example that torch's default collation cannot put into a batch of tensors.

    Args:
        model: the model; items that its ``forward`` does not take may be anything.
        example: an example of a Dataset.
        name: the name of the Dataset's argument.
    """
    if not isinstance(example, tuple | list | Mapping) or not example:
        raise InvalidArgumentError(
            f"an example of `{name}` must be a tuple or list `(*model_inputs, targets)`, or a "
            f"dict; got a {type(example).__name__}. Without targets, use `(inputs, 0)`"
        )
    remedy = (
        "pass a DataLoader with a `collate_fn` that makes one tensor of them (for sequences: one "
        "that pads), or a Dataset of tensors"
    )
    args, kwargs = call_arguments(model, example)
    for key, part in (*enumerate(args), *kwargs.items()):
        if isinstance(part, list) and part and all(_is_number(entry) for entry in part):
            raise InvalidArgumentError(
                f"item {key!r} of an example of `{name}` is a list of {len(part)} numbers, which "
                f"torch's default collation turns into {len(part)} tensors; {remedy}"
            )
    try:
        default_collate([example])
    except TypeError as error:
        raise InvalidArgumentError(
            f"torch's default collation cannot make a batch of the examples of `{name}` ({error}); "
            f"{remedy}"
        ) from error


def reads_once(data: Any) -> bool:
    """Whether the data is a generator, ``zip`` or another iterator that cannot start again.

    A user's own class whose ``__iter__`` returns the object itself may be able to start again.
    """
    if not isinstance(data, Iterator):
        return False
    begin = type(data).__iter__
    return begin is Iterator.__iter__ or not isinstance(begin, FunctionType)


def dimensions(item: Any) -> dict[tuple[Any, ...], int]:
    """The number of dimensions of each tensor or number of a batch, by its path of keys."""
    if isinstance(item, Mapping):
        parts: Iterable[tuple[Any, Any]] = item.items()
    elif isinstance(item, tuple | list):
        parts = enumerate(item)
    elif isinstance(item, Tensor):
        return {(): item.dim()}
    else:
        return {(): 0} if _is_number(item) else {}
    return {(key, *rest): n for key, part in parts for rest, n in dimensions(part).items()}


def refuse_one_example(inputs: Any, of_training: Mapping[tuple[Any, ...], int]) -> None:
    """Refuse test inputs whose tensors all have one dimension fewer than a training batch's."""
    found = dimensions(inputs)
    if found and found == {position: n - 1 for position, n in of_training.items()}:
        raise InvalidArgumentError(
            "`inputs` is one example, not a batch: each of its tensors has one dimension fewer "
            "than in a batch of the training set. Add a first dimension of length 1, "
            "`torch.utils.data.default_collate([inputs])`"
        )


def _is_number(item: Any) -> bool:
    return isinstance(item, Number) or (isinstance(item, Tensor) and item.dim() == 0)


def _keys(data: Mapping[Any, Any]) -> str:
    return str(list(data)[:5]).replace("]", ", ...]" if len(data) > 5 else "]")
