"""The outputs of layers for a data set, on disk, with a description of model, layer and data."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from influence_kit.storage.atomic import make_folder
from influence_kit.storage.folders import (
    MANIFEST,
    claim,
    differences,
    hash_of,
    read_listed,
    removed_if_broken_off,
    replace_contents,
    write_listed,
)
from influence_kit.storage.locks import alone_in
from influence_kit.storage.manifest import Manifest

KIND = "activations"
REMEDY = "`load_src_from_disk=False` computes it again"
CHUNK_BYTES = 64 * MIB
# a relative difference of outputs that another number of threads explains
CLOSE = 1e-4


@dataclass
class SavedActivations:
    """The outputs of one layer: a folder of chunks and a manifest, which is written last.

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
    # of the new contents, in order, and of those that are there
    _files: dict[str, dict[str, Any]] = field(default_factory=dict)
    _listed: list[str] = field(default_factory=list)

    @property
    def is_there(self) -> bool:
        """Whether anything is saved."""
        return (self.folder / MANIFEST).exists()

    def trouble(self) -> str | None:
        """Why the saved activations cannot be used; None if they can."""
        try:
            manifest, names = self._contents()
            saved = self._read(manifest, names[0])["first"].to(self.first)
        except InvalidArgumentError as error:
            return str(error)
        size = CLOSE * float(self.first.abs().max())
        if saved.shape == self.first.shape and torch.allclose(saved, self.first, CLOSE, size):
            return None
        return f"{self.folder} is of a layer that gave another output for the first example"

    @contextmanager
    def being_written(self) -> Iterator[None]:
        """Inside, new contents are written; the old ones stay until the end."""
        make_folder(self.folder)
        self._listed = claim(self.folder, KIND)
        with removed_if_broken_off(self.folder, KIND):
            self._write("first", {"first": self.first})
            yield

    def add(self, outputs: Tensor) -> None:
        """Take the outputs of the next examples, ``[n, *]``."""
        if self._waiting and self._waiting[0].shape[1:] != outputs.shape[1:]:
            self._flush()  # sequences of another length
        self._waiting.append(outputs.cpu())
        if sum(part.nbytes for part in self._waiting) >= CHUNK_BYTES:
            self._flush()

    def end(self) -> None:
        """Write the remaining outputs and the manifest; old contents are removed."""
        self._flush()
        manifest = Manifest(KIND, self.description, files=self._files)
        replace_contents(self.folder, manifest, self._listed)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The index of the first example of each chunk, and the outputs of its examples."""
        start, (manifest, names) = 0, self._contents()
        for name in names[1:]:
            chunk = self._read(manifest, name)["outputs"]
            yield start, chunk.to(self.first.device)
            start += len(chunk)

    def _contents(self) -> tuple[Manifest, list[str]]:
        """The manifest, and the files: of the first example's output, and of all in chunks."""
        found = Manifest.read(self.folder, KIND, REMEDY)
        other = differences(found.description, self.description)
        if other:
            raise InvalidArgumentError(f"{self.folder} is of something else: {'; '.join(other)}")
        names = list(found.files or ())
        if [name.partition("-")[0] for name in names[:2]] != ["first", "outputs"]:
            raise InvalidArgumentError(f"{self.folder} lists no outputs; {REMEDY}")
        return found, names

    def _read(self, manifest: Manifest, name: str) -> dict[str, Tensor]:
        try:
            return read_listed(self.folder, manifest, name, REMEDY)
        except FileNotFoundError as error:
            raise InvalidArgumentError(f"{error}; {REMEDY}") from error

    def _flush(self) -> None:
        if self._waiting:
            chunk = torch.cat(self._waiting)
            self._waiting.clear()
            self._write(f"outputs-{len(self._files):06d}", {"outputs": chunk})

    def _write(self, stem: str, tensors: Mapping[str, Tensor]) -> None:
        name, entry = write_listed(self.folder, KIND, stem, tensors, self._listed)
        self._files[name] = entry


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
            reuse: use activations saved earlier, if they belong to the same model, layer and data.
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
        if is_mine(0) and not (reuse and all(one.trouble() is None for one in saved)):
            with alone_in(folder):  # another process may have saved some meanwhile
                self._save(_missing(saved, reuse))
        sum_over_ranks(torch.zeros(1, device=self.device))  # the others wait for the first rank
        return saved

    def _batches(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield inputs_of(batch)

    def _save(self, missing: Sequence[SavedActivations]) -> None:
        """Compute activations at some layers, in one pass."""
        layers = {saved.description["layer"]: saved for saved in missing}
        ones = {layer: saved.first.shape for layer, saved in layers.items()}
        check = RowCheck(self.module, "the outputs of layers")
        with ExitStack() as stack:
            for saved in missing:
                stack.enter_context(saved.being_written())
            for inputs in self._batches() if missing else ():
                for layer, output in self.rows(ones, inputs, check).items():
                    layers[layer].add(output)
            for saved in missing:
                saved.end()


def _missing(saved: Sequence[SavedActivations], reuse: bool) -> list[SavedActivations]:
    """Those that are not saved yet; with a warning for each that is saved and of no use."""
    missing = []
    for one in saved:
        trouble = one.trouble() if reuse and one.is_there else ""
        if trouble:
            warnings.warn(f"activations are computed again, because {trouble}", stacklevel=6)
        if trouble is not None:
            missing.append(one)
    return missing


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
