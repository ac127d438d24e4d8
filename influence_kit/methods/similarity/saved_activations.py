"""The outputs of layers for a data set, on disk, and what they belong to."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.core.distributed import is_mine, sum_over_ranks
from influence_kit.core.memory import MIB
from influence_kit.data.batches import (
    Batch,
    call_arguments,
    example_count,
    is_batch,
    take,
    to_device,
)
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.activations import examples_first, layer_outputs
from influence_kit.methods.row_check import RowCheck
from influence_kit.storage.folders import MANIFEST, hash_of, read_folder, write_folder

CHUNK_BYTES = 64 * MIB
# a relative difference of outputs that another number of threads explains
CLOSE = 1e-4


@dataclass
class SavedActivations:
    """The outputs of one layer: a folder of chunks and an index, which is written last.

    Args:
        folder: where they are.
        description: what they belong to: the layer, the weights, the data.
        first: the layer's output for the first example alone, by which a model that does something
            else with the same weights is recognised.
    """

    folder: Path
    description: Mapping[str, Any]
    first: Tensor
    _waiting: list[Tensor] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)

    def usable(self) -> bool:
        """Whether there is something that belongs to what is described; warns of something else."""
        if not (self.folder / MANIFEST).is_file():
            return False
        try:
            saved = read_folder(self.folder, self.description)["first"].to(self.first)
        except InvalidArgumentError as error:
            reason = str(error)
        else:
            size = CLOSE * float(self.first.abs().max())
            if saved.shape == self.first.shape and torch.allclose(saved, self.first, CLOSE, size):
                return True
            reason = f"{self.folder} is of a layer that gave another output for the first example"
        warnings.warn(f"activations are computed anew, because {reason}", stacklevel=5)
        return False

    def begin(self) -> None:
        """Give up what has been saved here."""
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def add(self, outputs: Tensor) -> None:
        """Take the outputs of the next examples, ``[n, *]``."""
        if self._waiting and self._waiting[0].shape[1:] != outputs.shape[1:]:
            self._write()  # sequences of another length
        self._waiting.append(outputs.cpu())
        if sum(part.nbytes for part in self._waiting) >= CHUNK_BYTES:
            self._write()

    def end(self) -> None:
        """Write what waits, and the index."""
        self._write()
        tensors = {"ends": torch.tensor(self._ends), "first": self.first}
        write_folder(self.folder, tensors, self.description)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The place of the first example of each chunk, and the outputs of its examples."""
        start = 0
        ends = read_folder(self.folder, self.description)["ends"].tolist()
        for number, end in enumerate(ends):
            chunk = read_folder(self.folder / str(number), self._describe(start))["outputs"]
            yield start, chunk.to(self.first.device)
            start = end

    def _write(self) -> None:
        if self._waiting:
            chunk = torch.cat(self._waiting)
            self._waiting.clear()
            number, start = len(self._ends), self._ends[-1] if self._ends else 0
            folder = self.folder / str(number)
            write_folder(folder, {"outputs": chunk}, self._describe(start))
            self._ends.append(start + len(chunk))

    def _describe(self, start: int) -> dict[str, Any]:
        return {**self.description, "first example of the chunk": start}


@dataclass(frozen=True)
class Sources:
    """A module and the examples whose activations are saved.

    Args:
        module: the model.
        loader: batches of inputs, or of ``(inputs, labels)``, of which the first item counts.
    """

    module: nn.Module
    loader: Iterable[Any]

    def rows(
        self, ones: Mapping[str, torch.Size], inputs: Batch, check: RowCheck
    ) -> dict[str, Tensor]:
        """The outputs of layers for inputs without targets, examples in front.

        Args:
            ones: the shape of each layer's output for one example.
            inputs: the inputs.
            check: compares them with those of some examples by themselves.
        """

        def rows(batch: Batch) -> list[Tensor]:
            found, n = self.outputs(list(ones), batch), example_count(batch)
            return [examples_first(layer, found[layer], n, one) for layer, one in ones.items()]

        return dict(zip(ones, check(inputs, rows), strict=True))

    def outputs(
        self, layers: Sequence[str], inputs: Batch, more: tuple[Any, ...] = ()
    ) -> dict[str, Tensor]:
        """The outputs of layers for inputs without targets, which ``more`` arguments follow."""
        inputs = to_device(inputs, self.device)
        if isinstance(inputs, Mapping):
            args, kwargs = call_arguments(self.module, inputs)
        else:
            args, kwargs = tuple(inputs), {}
        return layer_outputs(self.module, layers, (*args, *more), kwargs)

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def saved(self, folder: Path, layers: Sequence[str], reuse: bool) -> list[SavedActivations]:
        """The activations at each layer, in ``folder/LAYER``; computed where they are not there.

        Args:
            folder: where they are.
            layers: names of layers.
            reuse: take what has been saved before, where it belongs to the same.
        """
        batch = next(self._batches(), None)
        if batch is None:
            raise InvalidArgumentError("`influence_src_dataset` holds no examples")
        model, named = type(self.module), [self.module.named_parameters, self.module.named_buffers]
        description = {
            "model": f"{model.__module__}.{model.__qualname__}",
            "hash of the weights": hash_of([dict(get()) for get in named]),
            "hash of the examples": hash_of(self._batches()),
        }
        first = self.outputs(layers, take(batch, slice(0, 1)))
        saved = [
            SavedActivations(folder / layer, {"layer": layer, **description}, first[layer])
            for layer in layers
        ]
        if is_mine(0):
            self._save([one for one in saved if not (reuse and one.usable())])
        sum_over_ranks(torch.zeros(1, device=self.device))  # the others wait for the first rank
        return saved

    def _batches(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield inputs_of(batch)

    def _save(self, missing: Sequence[SavedActivations]) -> None:
        """Compute activations at some layers, in one pass."""
        layers = {saved.description["layer"]: saved for saved in missing}
        for saved in missing:
            saved.begin()
        ones = {layer: saved.first.shape for layer, saved in layers.items()}
        check = RowCheck(self.module, "the outputs of layers")
        for inputs in self._batches() if missing else ():
            for layer, output in self.rows(ones, inputs, check).items():
                layers[layer].add(output)
        for saved in missing:
            saved.end()


def inputs_of(batch: Any) -> Batch:
    """The inputs of a batch ``(inputs, labels)``, or of inputs alone."""
    return as_inputs(batch[0] if isinstance(batch, tuple | list) else batch)


def as_inputs(given: Any) -> Batch:
    """Inputs without targets, as a tuple or a dict."""
    if isinstance(given, Tensor):
        return (given,)
    if is_batch(given):
        inputs: Batch = given
        return inputs
    raise InvalidArgumentError(
        f"inputs must be a tensor, a tuple of tensors or a dict; got a {type(given).__name__}"
    )
