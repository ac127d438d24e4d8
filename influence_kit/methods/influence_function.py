"""The face that influence functions share: the test side through (C + damping)^-1.

Letters: m test and n training examples, P chosen parameters, C checkpoints (in shapes), B blocks.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from influence_kit.checkpoint_loader import CheckpointLoader
from influence_kit.data import Batch, as_loader, call_model, example_count, is_dataset, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.chosen import check_layers, group_by_layer
from influence_kit.methods.inner_product import InnerProductInfluence, check_k, given
from influence_kit.methods.perturbation import (
    MostInfluentialFeatures,
    Perturbation,
    Perturbed,
    check_places,
    chosen_rows,
    joined,
    most_influential,
)
from influence_kit.operators.curvature import DataSet, Memory, Remembered
from influence_kit.operators.curvature import Features as PlacedFeatures
from influence_kit.operators.labels import ModelLabels
from influence_kit.operators.partition import Partition
from influence_kit.saved import LOSSES, hash_of, read_folder, write_folder
from influence_kit.scoring.stream import Stream
from influence_kit.scoring.term import Side, Term, Transform
from influence_kit.scoring.transforms import unit_influence

DampingArgument = float | Literal["auto"] | Mapping[str, float]
# of "auto": the damping as a part of the mean eigenvalue of a block
AUTO_SHARE = 0.1
Facts = dict[str, Tensor]
Features = Callable[[Any], Gradients]
MEANS = "mean_eigenvalues"
# examples whose losses tell one loss from another
FEW = 8


class InfluenceFunction(InnerProductInfluence):
    """score = mean over checkpoints of grad loss(test)^T (C + damping I)^-1 grad loss(train).

    What is measured of the curvature at a checkpoint (``fit``) does not depend on the damping, is
    kept for later calls, and can be saved.

    Args:
        damping: what is added to the eigenvalues of the curvature C of the mean loss: a number, one
            a block (a dict), or "auto": 0.1 times the mean eigenvalue of the block.
        hessian_dataset: the data over which C is a mean; the training set where None.
        relative: RelatIF (arXiv 2003.11630): None, "l" (divide by the root of the training
            example's own score g^T (C + damping)^-1 g) or "theta" (by the norm of
            (C + damping)^-1 g).
        seed: of everything that is drawn at random.
    """

    def __init__(
        self,
        *args: Any,
        damping: DampingArgument = "auto",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if relative not in (None, "theta", "l"):
            raise InvalidArgumentError(f'`relative` must be None, "theta" or "l"; got {relative!r}')
        self.relative = relative
        self.seed = seed
        self._hessian_data = hessian_dataset
        self._hessian_batches: Iterable[Batch] | None = None
        if hessian_dataset is not None and not is_dataset(hessian_dataset):
            self._hessian_batches = as_loader(hessian_dataset, None, "hessian_dataset")
        self.damping = damping

    # What a method says.

    def _blocks_of(self, names: list[str]) -> Mapping[str, list[str]]:
        """The names of parameters by block of the curvature: by layer, unless a method says."""
        return group_by_layer(self.model, names, None)

    def _measure(self, data: DataSet) -> Facts:
        """What is to be known of the curvature at the checkpoint that is in the model."""
        return {}

    @abstractmethod
    def _means(self, facts: Facts, data: DataSet) -> Tensor:
        """The mean eigenvalue of each block ``[B]``."""

    @abstractmethod
    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        """Gradients through (C + damping)^-1, given the damping of each block ``[B]``."""

    def terms(self) -> list[Term]:
        """One term a checkpoint, the test side through the inverse."""
        places = range(len(self.checkpoints))
        return [
            Term(
                Side(c, self.test_at(c).features, solve=self._inverse_at(c)),
                self._train_side(c),
                weight=1 / len(self.checkpoints),
            )
            for c in places
        ]

    # What a user reads, sets and calls.

    @property
    def block_names(self) -> list[str]:
        """The blocks of the curvature, each with a damping of its own."""
        return list(self._partition.blocks)

    @property
    def damping(self) -> DampingArgument:
        """As given; setting it anew fits nothing again."""
        return self._damping

    @damping.setter
    def damping(self, damping: DampingArgument) -> None:
        self._damping = _check_damping(damping, self.block_names)
        self._inverses.clear()

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping of each block, at each checkpoint that is fitted."""
        return [
            dict(zip(self.block_names, self._damping_at(c).tolist(), strict=True))
            for c in sorted(self._facts)
            if self._damping != "auto" or MEANS in self._facts[c]
        ]

    def fit(self, show_progress: bool = False) -> Self:
        """Measure the curvature at every checkpoint, anew; ``influence`` does so by itself once.

        Args:
            show_progress: a bar over the checkpoints.
        """
        self._forget()
        with (
            self._session() as loader,
            self._bar(
                "fit the curvature. Processing checkpoint", len(self.checkpoints), show_progress
            ) as bar,
        ):
            for place in range(len(self.checkpoints)):
                self._fit_at(place, loader)
                bar.update()
        return self

    def save(self, folder: str | Path) -> None:
        """Write what was measured of the curvature to a folder; measures it where it is not yet.

        The damping is not part of it.
        """
        tensors = {}
        with self._session() as loader:
            for place in range(len(self.checkpoints)):
                self._fit_at(place, loader)
                for name, value in self._facts[place].items():
                    tensors[f"{place}/{name}"] = value
            write_folder(folder, tensors, self._description(loader))

    def load(self, folder: str | Path) -> Self:
        """Take what ``save`` has written, in place of ``fit``.

        Raises:
            InvalidArgumentError: where it was saved for another model, data set, loss or setting.
        """
        self._forget()
        with self._session() as loader:
            tensors = read_folder(folder, self._description(loader))
            for place in range(len(self.checkpoints)):
                loader.load(place)
                self._prints[place] = loader.fingerprint(place)
                self._facts[place] = {
                    name.partition("/")[2]: value.to(self._device)
                    for name, value in tensors.items()
                    if name.startswith(f"{place}/")
                }
        return self

    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """The test side through the inverse: what ``influence`` takes in place of ``inputs``.

        Computed once, it serves any number of training sets: ``influence`` of another object of
        this class (same model, parameters and checkpoints) takes it and fits nothing.

        Returns:
            ``[m, C * P]``, parameters in the model's order (``[1, C * P]`` if ``aggregate``); the
            scores are its dot products with the gradients of the training loss at all checkpoints.
        """
        return self._vectors(inputs, aggregate=aggregate)

    def perturbation_influence(
        self,
        inputs: Any,
        train_indices: Any = None,
        k: int | None = None,
        layer: str | None = None,
        show_progress: bool = False,
    ) -> Tensor | MostInfluentialFeatures:
        r"""The gradient of each score in the training input: which features make it what it is.

        .. math::
            \frac{\partial}{\partial x_j} \, \langle M^{-1} \nabla_\theta \ell_{test}(z'_i), \,
            \nabla_\theta \ell(z_j) \rangle, \qquad M = C + \lambda I

        M^-1 and the test gradient held fixed (Koh and Liang 2017, arXiv 1703.04730, section 2.2);
        the mean over checkpoints. Units are those of the score over those of the feature. Positive:
        raising the feature makes the example more helpful; shifting x_j by a small delta and
        training anew changes the test loss by about -<result[i, j], delta> / n.

        The cost is one forward-over-reverse pass a pair and checkpoint, many pairs at a time. Of
        several ranks each computes all of it.

        Args:
            inputs: test examples: one batch, a DataLoader, or what
                ``compute_intermediate_quantities`` returns.
            train_indices: places of training examples, in any order; all of them where None.
            k: how many features to return for each test example; None for the whole tensor.
            layer: the layer whose output x_j is; None for the model's only floating-point input
                (the targets stay as they are).
            show_progress: a bar over the training set.

        Returns:
            ``[m, n, *shape]``: shape of one example's x_j, examples in the order of
            ``train_indices``. With ``k`` ``MostInfluentialFeatures``, in memory for m * k.

        Raises:
            InvalidArgumentError: for places outside the training set; where not just one input is
                floating-point (tokens: name the embedding as ``layer``); for the whole tensor of
                inputs of different shapes.
            UnknownLayerError: for a layer that the model does not have.
            NotImplementedError: with ``relative``, whose norm depends on x_j, too.

        Example:
            >>> import torch
            >>> from influence_kit import ExplicitInfluenceFunction
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Linear(3, 2)
            >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
            >>> train = torch.utils.data.TensorDataset(x, y)
            >>> loss = torch.nn.CrossEntropyLoss()
            >>> exact = ExplicitInfluenceFunction(model, train, [model.state_dict()], loss_fn=loss)
            >>> exact.perturbation_influence((x[:4], y[:4])).shape
            torch.Size([4, 8, 3])
            >>> exact.perturbation_influence((x[:4], y[:4]), k=5).indices.shape
            torch.Size([4, 5, 2])
        """
        check_k(k)
        if self.relative is not None:
            raise NotImplementedError(
                f'with relative="{self.relative}" scores are divided by a norm that depends on the '
                "training input, too; `perturbation_influence` needs relative=None"
            )
        check_layers(self.model, None if layer is None else [layer])
        places = check_places(train_indices, self._train_count())
        perturbed = Perturbed(self.model, layer)
        with self._session() as loader:
            # what cannot be perturbed is refused before the curvature is measured
            perturbed.value(DataSet(self.train_dataloader, self._device).first())
            terms, batches = self._plan(loader, given(inputs))
            stream = Stream(terms, loader, self._sample)
            vectors = [
                stream.test_side(term.test, batches).flat() * term.weight_at(1.0) for term in terms
            ]
            found = Perturbation(self._source, self._train_loss, perturbed, loader, vectors)
            doing = "compute perturbation influence for training batches"
            with self._bar(doing, self.train_dataloader_len, show_progress) as bar:
                rows = chosen_rows(self.train_dataloader, places, bar.update)
                if k is not None:
                    return most_influential(found.blocks(rows), k)
                return joined(found.blocks(rows), places).to(self._dtype)

    # How it is done.

    def _settings(self) -> dict[str, Any]:
        """What ``fit`` depends on beside model, data and loss."""
        return {"seed": self.seed, "blocks": dict(self._partition.blocks)}

    def _description(self, loader: CheckpointLoader) -> dict[str, Any]:
        """What a saved curvature belongs to."""
        prints = []
        for place in range(len(self.checkpoints)):
            loader.load(place)
            prints.append(list(loader.fingerprint(place)))
        data = DataSet(self._hessian_loader, self._device)
        return {
            "method": self.get_name(),
            "settings": self._settings(),
            "dtype": str(self._dtype),
            "weights of the checkpoints": prints,
            "examples": data.count,
            "hash of the examples": hash_of(self._hessian_loader),
            LOSSES: self._first_losses(data),
        }

    def _first_losses(self, data: DataSet) -> list[float]:
        """The losses of a few examples, by which another loss is told."""
        losses: list[float] = []
        for _, batch in data:
            self._source.prepare(batch, self._train_loss)
            for place in range(min(example_count(batch), FEW - len(losses))):
                one = take(batch, slice(place, place + 1))
                with torch.no_grad():
                    losses.append(
                        float(self._train_loss.total(call_model(self.model, one), one, 1))
                    )
            if len(losses) == FEW:
                break
        return losses

    @cached_property
    def _partition(self) -> Partition:
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        return Partition(self._blocks_of(list(shapes)), shapes)

    def _through(self, solve: Callable[[Tensor], Tensor]) -> Transform:
        """A map of vectors ``[k, P]`` as a map of gradients."""

        def transform(gradients: Gradients) -> Gradients:
            return self._partition.gradients(solve(self._partition.flat(gradients)), gradients)

        return transform

    def _forget(self) -> None:
        self._facts: dict[int, Facts] = {}
        self._prints: dict[int, tuple[float, ...]] = {}
        self._inverses: dict[int, Transform] = {}
        self._memory = Memory()

    def _plan(
        self, loader: CheckpointLoader, inputs: Any, ordered: bool = True
    ) -> tuple[list[Term], Iterable[Batch]]:
        ready = isinstance(inputs, Tensor)
        if not ready or self._needs_fit_for_quantities:
            # before the data is shared out: every rank takes part in measuring
            for place in range(len(self.checkpoints)):
                self._fit_at(place, loader)
        if ready:
            # the "batch" that the features of these terms take
            quantities: Any = self._checked_quantities(inputs)
            return self._given_terms(), [quantities]
        return super()._plan(loader, inputs, ordered)

    @property
    def _needs_fit_for_quantities(self) -> bool:
        """Whether a test side that has been through the inverse still wants the inverse."""
        return self.relative is not None

    def _checked_quantities(self, quantities: Tensor) -> Tensor:
        """A test side ``[m, C * P]`` that has been through the inverse."""
        each, count = sum(p.numel() for p in self._parameters.values()), len(self.checkpoints)
        if quantities.dim() != 2 or quantities.shape[1] != each * count:
            raise InvalidArgumentError(
                f"`inputs` is a tensor of shape {list(quantities.shape)}; a test side made by "
                f"`compute_intermediate_quantities` has shape [m, {each * count}] here ({count} "
                f"checkpoints x {each} parameters). Examples are a tuple, list or dict"
            )
        return quantities

    def _given_terms(self) -> list[Term]:
        """The terms for a test side that has been through the inverse."""
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        sizes = [math.prod(shape) for shape in shapes.values()]
        count = len(self.checkpoints)

        def features(place: int) -> Features:
            def take(block: Tensor) -> Gradients:
                own = block.to(self._sample).split([sum(sizes)] * count, dim=1)[place]
                columns = zip(shapes.items(), own.split(sizes, dim=1), strict=True)
                forms = {name: Dense(values, shape) for (name, shape), values in columns}
                return Gradients(len(block), forms, shapes, self._sample)

            return take

        return [Term(Side(c, features(c)), self._train_side(c), weight=1.0) for c in range(count)]

    def _train_side(self, place: int) -> Side:
        if self.relative is None:
            return self.train_at(place)
        return self.train_at(place, partial(unit_influence, self._inverse_at(place), self.relative))

    def _inverse_at(self, place: int) -> Transform:
        """Gradients through the inverse at a checkpoint, to be called when the model has it."""

        def apply(gradients: Gradients) -> Gradients:
            return self._inverses[place](gradients)

        return apply

    def _fit_at(self, place: int, loader: CheckpointLoader) -> None:
        """Have the inverse at a checkpoint, measuring what is not known yet."""
        loader.load(place)
        known = self._prints.get(place)
        if known is not None and known != loader.fingerprint(place):
            raise InvalidArgumentError(
                f"checkpoint {place} holds other weights than when its curvature was measured; "
                "call `fit()` to measure it anew"
            )
        data = DataSet(self._hessian_loader, self._device)
        if place not in self._facts:
            self._facts[place] = self._measure(data)
            self._prints[place] = loader.fingerprint(place)
        if place not in self._inverses:
            if self.damping == "auto" and MEANS not in self._facts[place]:
                self._facts[place][MEANS] = self._means(self._facts[place], data)
            damping = self._damping_at(place)
            self._inverses[place] = self._make_inverse(self._facts[place], damping, data)

    @property
    def _hessian_loader(self) -> Iterable[Batch]:
        if self._hessian_data is None:
            return self.train_dataloader
        if self._hessian_batches is None:
            self._hessian_batches = self._loader_of(self._hessian_data, "hessian_dataset")
        return self._hessian_batches

    def _damping_at(self, place: int) -> Tensor:
        """The damping of each block ``[B]``, float64."""
        if self._damping == "auto":
            values = (AUTO_SHARE * self._facts[place][MEANS]).tolist()
            _check_means(values, self.block_names)
        elif isinstance(self._damping, Mapping):
            values = [self._damping[name] for name in self.block_names]
        else:
            values = [self._damping] * len(self.block_names)
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    def _curvature_features(self, curvature: str) -> PlacedFeatures:
        """The gradients whose outer products are the empirical Fisher, or the Fisher."""
        labels = ModelLabels(self.model, self._train_loss, self.seed)

        def features(places: Tensor, batch: Batch) -> Gradients:
            if curvature == "fisher":
                self._source.prepare(batch, self._train_loss)
                batch = labels(places, batch)
            return self._source(batch, self._train_loss)

        return Remembered(features, self._memory)

    @contextmanager
    def _session(self) -> Iterator[CheckpointLoader]:
        with super()._session() as loader:
            try:
                yield loader
            finally:
                self._memory.clear()

    def _vectors(self, inputs: Any, of_tests: bool = True, aggregate: bool = False) -> Tensor:
        with self._session() as loader:
            terms, batches = self._plan(loader, given(inputs), ordered=not aggregate)
            stream = Stream(terms, loader, self._sample)
            blocks = [
                stream.test_side(term.test, batches, aggregate).flat() * term.weight_at(1.0)
                for term in terms
            ]
        return torch.cat(blocks, dim=1).to(self._dtype)


def _check_damping(damping: DampingArgument, blocks: Sequence[str]) -> DampingArgument:
    if isinstance(damping, str):
        if damping != "auto":
            raise InvalidArgumentError(f'`damping` must be a number or "auto"; got {damping!r}')
        return damping
    if isinstance(damping, Mapping):
        if set(damping) != set(blocks):
            raise InvalidArgumentError(
                f"`damping` names the blocks {list(damping)}; there are {list(blocks)}, and each "
                "needs one"
            )
        for name, value in damping.items():
            _check_number(value, f"`damping` of block '{name}'")
        return dict(damping)
    _check_number(damping, "`damping`")
    return damping


def _check_number(value: object, name: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise InvalidArgumentError(f"{name} must be a number that is not negative; got {value!r}")


def _check_means(values: Sequence[float], blocks: Sequence[str]) -> None:
    for value, name in zip(values, blocks, strict=True):
        if not value > 0:
            raise InvalidArgumentError(
                f'damping="auto" is a share of the mean eigenvalue of the curvature, which is '
                f"{value / AUTO_SHARE:.4g} in block '{name}': the gradients there are zero or the "
                "curvature is negative. Give a number, leave that block out by `layers`, or use "
                'another curvature ("ggn" is never negative)'
            )
