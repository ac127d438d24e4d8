"""Replaces errors that torch raises in a user's model by ones with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from influence_kit.data.batches import Batch
from influence_kit.data.marked_batch import leaves
from influence_kit.errors import InvalidArgumentError


@contextmanager
def clear_errors(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside, torch's errors about out-of-range ids and about checkpointing are explained."""
    try:
        yield
    except IndexError as error:
        cause = _beyond(model, batch) if "out of range in self" in str(error) else None
        if cause is None:
            raise
        raise InvalidArgumentError(cause) from error
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error) and "Checkpointing is not" not in str(error):
            raise
        raise InvalidArgumentError(
            "the model uses reentrant activation checkpointing, which only gives gradients of "
            "weights: turn it off for the attribution (model.gradient_checkpointing_disable()), or "
            "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        ) from error


def _beyond(model: nn.Module, batch: Batch) -> str | None:
    """An id of a batch that is out of range for an embedding of the model, in words; or None."""
    tables = [
        (name, module.num_embeddings)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    integers = [
        leaf
        for leaf in leaves(batch)
        if isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_floating_point()
    ]
    for ids in sorted(integers, key=lambda leaf: -leaf.dim()):
        least, most = int(ids.min()), int(ids.max())
        small = [(name, rows) for name, rows in tables if most >= rows]
        if small or (least < 0 and least != -100):
            name, rows = min(small or tables, key=lambda found: found[1])
            return (
                f"the batch holds the id {most if small else least}, but the embedding '{name}' "
                f"has rows 0 to {rows - 1}: use the model's own tokenizer"
            )
    return None
