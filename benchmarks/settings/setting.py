"""A setting: data, model, recipe, what is measured, and what others published for it.

Shapes: n training and m test examples.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.settings.data import Data, Sizes
from benchmarks.settings.recipes import Loss, MiniBatches, Recipe
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import BatchedSGD
from influence_kit.evaluation.recipe import seeded

Metric = Literal["LDS", "LOO", "AUC"]
Loader = Callable[[Path | None, Sizes], Data]
BATCH = 128  # examples at a time where models are measured


class Published(NamedTuple):
    """A figure as others published it, to compare with; nothing is judged by it."""

    method: str
    metric: Metric
    value: float
    source: str


class Trained(NamedTuple):
    """A model in evaluation mode, and checkpoints of its training.

    Attributes:
        model: at the end of training.
        checkpoints: ``{"state_dict", "learning_rate", "epoch"}`` in order, the last at the end; of
            Adam and AdamW with the optimizer's state ("optimizer").
    """

    model: nn.Module
    checkpoints: list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One setting of the benchmark; all that it holds can be pickled.

    Attributes:
        name: its name on the command line.
        title: what it is, in a line.
        loader: makes the data from a folder (None where it needs none) and sizes.
        sizes: the default sizes of the training and the test set.
        network: makes a model for the data, with weights from torch's global random numbers.
        loss_fn: the loss of each example ``[n]``, from outputs and targets; its mean is trained.
        measurement: what is measured of each test example ``[m]``, from outputs and targets; higher
            is better.
        recipe: how a model is trained.
        metrics: those that make sense here.
        needs: the files that the folder has to hold; empty where nothing is needed.
        published: figures to compare with.
        at_once: train models on subsets many at once, by ``torch.func.vmap``; for small models
            that are trained by plain SGD.
        layers: patterns of the names of the layers to attribute to, where the whole model is too
            large; None for the whole model.
    """

    name: str
    title: str
    loader: Loader
    sizes: Sizes
    network: Callable[[Data], nn.Module]
    loss_fn: Loss
    measurement: Loss
    recipe: Recipe
    metrics: tuple[Metric, ...]
    needs: str = ""
    published: tuple[Published, ...] = ()
    at_once: bool = False
    layers: tuple[str, ...] | None = None

    def load(self, folder: str | Path | None = None, sizes: Sizes | None = None) -> Data:
        """The data, from the data set's own files in a folder that the user names.

        Args:
            folder: where the files are; None where ``needs`` is empty.
            sizes: other sizes than those of the setting.

        Raises:
            FileNotFoundError: where a file is missing.
            InvalidArgumentError: where a file is something else, or holds too few examples.
        """
        return self.loader(None if folder is None else Path(folder), sizes or self.sizes)

    def new_model(self, data: Data, seed: int = 0) -> nn.Module:
        """A model that is not trained yet, with the weights of a seed."""
        with seeded(seed):
            return self.network(data)

    def train(
        self,
        data: Data,
        indices: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> nn.Module:
        """A model trained on a subset of the training set, in evaluation mode.

        Args:
            data: as ``load`` gave it.
            indices: the indices of the examples to train on; None for all.
            seed: of the weights, the order of the batches and dropout.
            device: where to train; the model comes back on it.
        """
        return self.train_with_checkpoints(data, 0, indices, seed, device).model

    def trainer(self, data: Data, device: str = "cpu") -> Callable[[Any, int], nn.Module]:
        """``train_fn(subset_indices, seed) -> model``, as ``influence_kit.evaluation`` takes it.

        The models are those of ``train``; where ``at_once`` is set, up to rounding.
        """
        if self.at_once:
            return self._batched_trainer(data, device)
        return partial(self.train, data, device=device)

    def _batched_trainer(self, data: Data, device: str) -> BatchedSGD:
        recipe = self.recipe
        if not isinstance(recipe, MiniBatches) or not recipe.is_plain_sgd:
            raise InvalidArgumentError(
                f"{self.name} is trained by {recipe}; models are trained at once by SGD with a "
                "constant learning rate: leave `at_once` out"
            )
        inputs, targets = (tensor.to(device) for tensor in data.train.tensors)
        return BatchedSGD(
            partial(_made_on, self.network, data, device),
            inputs,
            targets,
            partial(_mean_loss, self.loss_fn),
            recipe.epochs,
            recipe.learning_rate,
            recipe.batch_size,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def train_with_checkpoints(
        self,
        data: Data,
        count: int,
        indices: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Trained:
        """A model as ``train`` makes it, and checkpoints of its training, evenly spaced.

        Args:
            data: as ``load`` gave it.
            count: how many checkpoints, at most one per epoch.
            indices: the indices of the examples to train on; None for all.
            seed: of the weights, the order of the batches and dropout.
            device: where to train.
        """
        count = min(count, self.recipe.epochs)
        kept_epochs = {self.recipe.epochs * (c + 1) // count for c in range(count)}
        model, checkpoints = self.new_model(data, seed).to(device), []

        def keep(epoch: int, rate: float, optimizer: torch.optim.Optimizer | None) -> None:
            if epoch in kept_epochs:
                state = {name: value.cpu().clone() for name, value in model.state_dict().items()}
                kept = {"state_dict": state, "learning_rate": rate, "epoch": epoch}
                if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
                    kept["optimizer"] = deepcopy(optimizer.state_dict())
                checkpoints.append(kept)

        rows = slice(None) if indices is None else torch.as_tensor(indices)
        inputs, targets = (tensor[rows].to(device) for tensor in data.train.tensors)
        self.recipe(model, (inputs, targets), self.loss_fn, seed, keep)
        return Trained(model, checkpoints)

    @torch.no_grad()
    def measure(self, model: nn.Module, test: TensorDataset) -> Tensor:
        """What is measured of each test example, ``[m]`` on the CPU; higher is better."""
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        found = []
        for rows in torch.arange(len(test)).split(BATCH):
            inputs, targets = (tensor[rows].to(device) for tensor in test.tensors)
            found.append(self.measurement(model(inputs), targets).cpu())
        model.train(was_training)
        return torch.cat(found)

    def layer_names(self, model: nn.Module) -> list[str] | None:
        """The layers to attribute to, for a method's ``layers``; None for the whole model.

        Raises:
            InvalidArgumentError: where the model has no layer of a pattern.
        """
        if self.layers is None:
            return None
        names = [name for name, _ in model.named_modules()]
        chosen = [n for n in names if any(fnmatchcase(n, pattern) for pattern in self.layers)]
        unused = [p for p in self.layers if not any(fnmatchcase(n, p) for n in chosen)]
        if unused:
            raise InvalidArgumentError(f"the model of {self.name} has no layers {unused}")
        return chosen


def _made_on(network: Callable[[Data], nn.Module], data: Data, device: str) -> nn.Module:
    return network(data).to(device)


def _mean_loss(loss_fn: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    return loss_fn(outputs, targets).mean()
