"""Similarity of activations, with Captum's interface: outputs of a layer, by example.

Shapes: m test examples, n training (source) examples, b source examples of a chunk, k requested
examples.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.influence import DataInfluence
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.core.arguments import check_count, check_function, check_number, check_text
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.core.objects import check_flags, check_model, check_path, is_one_of
from influence_kit.core.summary import summary
from influence_kit.data.batches import Batch, example_count
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.data.loaders import as_loader
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.check import refuse_mixing_layers
from influence_kit.methods.activations import examples_first
from influence_kit.methods.layer_names import Layers, check_layers
from influence_kit.methods.read_only import Made, read_only
from influence_kit.methods.row_check import RowCheck
from influence_kit.methods.similarity.distances import (
    cosine_similarity,
    euclidean_distance,
    zero_pairs,
)
from influence_kit.methods.similarity.saved_activations import (
    SavedActivations,
    Sources,
    as_inputs,
    inputs_of,
)
from influence_kit.preservation.restore import borrowed
from influence_kit.scoring.reducers import TopK

SimilarityMetric = Callable[[Tensor, Tensor], Tensor]
ZERO_VECTORS = (
    "Layer {0} has zero-vector activations for some inputs. This may cause undefined behavior for "
    "cosine similarity. The indices for the offending inputs will be included under the key "
    "'zero_acts-{0}' in the output dictionary. Indices are returned as a tensor with [inputs_idx, "
    "src_dataset_idx] pairs, whose value is `replace_nan`."
)


@read_only
class SimilarityInfluence(DataInfluence, metaclass=Made):
    """score = similarity_metric(output of a layer for test, output of the layer for train).

    The examples of ``influence_src_dataset`` whose activations are nearest to those of a test
    example, for each layer separately; gradients and labels are not used. Arguments and results are
    those of Captum's class of this name.

    The activations of the source examples are saved in ``activation_dir/model_id/src/LAYER`` and
    used again by later calls, also of other processes. Activations that were saved for other
    weights, another model or other data are detected (each call reads the data once, and runs the
    model on one example) and computed again, with a warning. The module runs in evaluation mode;
    its mode and the random state are restored.

    Args:
        module: the model.
        layers: the name of a layer, a pattern of names, a module of ``module``, or a list of these
            (see ``InnerProductInfluence``). The last output of a layer that runs several times.
        influence_src_dataset: a ``Dataset`` or sequence of examples, or a ``DataLoader`` that does
            not shuffle. An example is the input, or ``(input, label)``, of which only the first
            item is used. Several inputs are a tuple, ``((x1, x2), label)``, or a dict.
        activation_dir: the folder of activations.
        model_id: a folder in it, one for each model.
        similarity_metric: ``metric(test [m, *], train [b, *])`` returns ``[m, b]``.
        similarity_direction: "max" if the highest values are the most similar, "min" if the lowest
            are (a distance).
        batch_size: source examples per batch. The results do not depend on it.
        replace_nan: with ``cosine_similarity``, the value of pairs with a zero vector: by default
            -2 for "max" and 2 for "min", so that they come last.
        eval_mode: put the module into evaluation mode while activations are computed.
        **kwargs: not used; any other keyword is an error.

    Raises:
        InvalidArgumentError: (a ``ValueError``) for invalid arguments.
        UnknownLayerError: for layers that the module does not have.
        TypeError: for unknown keywords.

    Example:
        >>> import tempfile
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
        >>> source = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     similarity = SimilarityInfluence(module, "0", source, folder)
        ...     similarity.influence(torch.tensor([[3.0, 0.1]]), top_k=2)["0"][0]
        tensor([[0, 2]])
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Layers,
        influence_src_dataset: Dataset[Any] | DataLoader[Any],
        activation_dir: str | Path,
        model_id: str = "",
        similarity_metric: SimilarityMetric = cosine_similarity,
        similarity_direction: str = "max",
        batch_size: int = 1,
        *,
        replace_nan: float | None = None,
        eval_mode: bool = True,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs, "replace_nan, eval_mode")
        check_model(module, "module")
        check_flags({"eval_mode": eval_mode})
        check_path(activation_dir, "activation_dir")
        check_text(model_id, "model_id")
        check_function(similarity_metric, "similarity_metric", "metric(test, train)")
        batch_size = check_count(batch_size, "batch_size")
        if not is_one_of(similarity_direction, ("max", "min")):
            raise InvalidArgumentError(
                f"{similarity_direction} is not a valid value. Must be either 'max' or 'min'"
            )
        self.module = module
        self.layers = check_layers(module, [layers] if layers is None else layers) or []
        self.influence_src_dataset = influence_src_dataset
        self.influence_src_dataloader = as_loader(
            influence_src_dataset, batch_size, "influence_src_dataset"
        )
        self._sources = CheckedBatches(
            self.influence_src_dataloader,
            "influence_src_dataset",
            reason=lambda: "activations are saved",
            rows=lambda batch: example_count(inputs_of(batch)),
        )
        self.activation_dir, self.model_id = activation_dir, model_id
        self.batch_size = batch_size
        self.similarity_direction = similarity_direction
        self.similarity_metric = similarity_metric
        self._is_cosine = similarity_metric is cosine_similarity
        if self._is_cosine:
            default = -2 if similarity_direction == "max" else 2
            chosen = default if replace_nan is None else check_number(replace_nan, "replace_nan")
            self.replace_nan = chosen
            self.similarity_metric = partial(cosine_similarity, replace_nan=self.replace_nan)
        elif replace_nan is not None:
            raise InvalidArgumentError(
                "`replace_nan` is an argument of `cosine_similarity`, which is not the metric here"
            )
        self._is_ours = self._is_cosine or similarity_metric is euclidean_distance
        self._eval_mode = eval_mode

    def __repr__(self) -> str:
        return summary(self)

    def influence(
        self,
        inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any],
        top_k: int = 1,
        additional_forward_args: Any = None,
        load_src_from_disk: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The ``top_k`` most similar source examples for each test example.

        Args:
            inputs: the arguments of the module: a tensor, a tuple of tensors, or a dict; no labels.
            top_k: the number of source examples; ``k = min(top_k, n)``.
            additional_forward_args: a further argument of the module, or a tuple of them, that
                follows ``inputs``. Those of the source examples come from their data set.
            load_src_from_disk: use saved activations; False computes them again.
            **kwargs: not used; any other keyword is an error.

        Returns:
            ``{layer: (indices [m, k], values [m, k])}``, the most similar first, of equal ones the
            first indices. If ``cosine_similarity`` meets zero vectors, with a RuntimeWarning, also
            ``zero_acts-LAYER``: the indices ``[pairs, 2]`` of such pairs of test and source
            examples.

        Raises:
            NonFiniteError: for a similarity that is NaN.
        """
        _refuse_unknown(kwargs, "top_k, additional_forward_args, load_src_from_disk")
        top_k = check_count(top_k, "top_k", least=0)
        check_flags({"load_src_from_disk": load_src_from_disk})
        more = additional_forward_args
        more = () if more is None else more if isinstance(more, tuple) else (more,)
        tests, folder = as_inputs(inputs), Path(self.activation_dir) / self.model_id / "src"
        sources = Sources(self.module, self._sources)
        self._sources.forget()  # data that has changed since the last call is detected and used
        found: dict[str, Any] = {}

        def probe() -> dict[str, Tensor]:
            return sources.outputs(self.layers, tests, more)

        with borrowed(self.module, self._eval_mode, probe), torch.no_grad():
            refuse_mixing_layers(self.module)
            saved = sources.saved(folder, self.layers, load_src_from_disk)
            rows = self._rows_of_tests(sources, tests, more, saved)
            for layer, known in zip(self.layers, saved, strict=True):
                found[layer], pairs = self._most_similar(layer, rows[layer], known, top_k)
                if len(pairs):
                    warnings.warn(ZERO_VECTORS.format(layer), RuntimeWarning, stacklevel=2)
                    found[f"zero_acts-{layer}"] = pairs
        return found

    # Implementation.

    def _rows_of_tests(
        self,
        sources: Sources,
        tests: Batch,
        more: tuple[Any, ...],
        saved: Sequence[SavedActivations],
    ) -> dict[str, Tensor]:
        """The outputs of each layer for the test examples, examples in the first dimension."""
        ones = {layer: known.first.shape for layer, known in zip(self.layers, saved, strict=True)}
        if not more:
            return sources.rows(ones, tests, RowCheck(self.module, "the outputs of layers"))
        # further arguments may not be one per example, so that no smaller batch is compared
        outputs, m = sources.outputs(self.layers, tests, more), example_count(tests)
        return {layer: examples_first(layer, outputs[layer], m, ones[layer]) for layer in ones}

    def _most_similar(
        self, layer: str, test: Tensor, saved: SavedActivations, top_k: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The indices and values of the most similar, and the pairs with zero vectors."""
        best = TopK(top_k, proponents=self.similarity_direction == "max")
        pairs = [torch.zeros(0, 2, dtype=torch.int64, device=test.device)]
        for start, chunk in saved.chunks():
            for part in chunk.split(self._rows(test, chunk)):
                similarity = self.similarity_metric(test, part)
                _check(similarity, (len(test), len(part)), layer, start)
                best.update(torch.arange(start, start + len(part)), similarity)
                if self._is_cosine:
                    pairs.append(zero_pairs(test, part).nonzero() + pairs[0].new_tensor([0, start]))
                start += len(part)
        indices, values = best.local_result()
        # by test example, for any chunks of source examples
        of_tests = torch.cat(pairs)
        return (indices, values), of_tests[of_tests[:, 0].argsort(stable=True)]

    def _rows(self, test: Tensor, chunk: Tensor) -> int:
        """The number of source examples per chunk; a user's metric needs unknown memory."""
        if not self._is_ours:
            return getattr(self.influence_src_dataloader, "batch_size", None) or self.batch_size
        width = len(test) + chunk[0].numel()
        return rows_within(workspace_bytes(test.device), width * chunk.element_size())


def _refuse_unknown(keywords: Mapping[str, Any], there: str) -> None:
    if keywords:
        raise TypeError(f"unexpected keyword arguments {sorted(keywords)}; there are {there}")


def _check(similarity: Any, shape: tuple[int, int], layer: str, start: int) -> None:
    """Refuse an invalid result of a metric."""
    found = tuple(similarity.shape) if isinstance(similarity, Tensor) else type(similarity)
    if found != shape:
        raise InvalidArgumentError(
            "Output of custom similarity does not meet required dimensions. Your output has shape "
            f"{found}.\nPlease ensure the output shape matches (inputs_batch_size, "
            f"src_dataset_batch_size), which should be {shape}."
        )
    bad = torch.isnan(similarity).nonzero()
    if len(bad):
        test, source = bad[0].tolist()
        raise NonFiniteError(
            f"the similarity of test example {test} and source example {start + source} at layer "
            f"'{layer}' is NaN"
        )
