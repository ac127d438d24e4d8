"""TracIn of the last fully-connected layer alone: Pruthi et al. 2020, arXiv 2002.08484."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.core.locks import alone_with
from influence_kit.core.objects import check_flags, check_model
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.gradients.parameter_selection import choose_parameters
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.tracin.tracin import TracInCPBase


@documented
class TracInCPFast(TracInCPBase):
    r"""score = sum over checkpoints of learning rate * (d_test . d_train) * (a_test . a_train + 1).

    d: gradient of the loss at the layer's output; a: its input; the 1 is the layer's bias. This is
    ``TracInCP(layers=[final_fc_layer])``, for any operations after the layer and any number of
    positions (tokens) per example, at the cost of a forward pass (arXiv 2002.08484).

    Captum's class of this name leaves the bias out and assumes that the layer is the model's last
    operation; ``count_bias=False`` gives its numbers.

    Args:
        final_fc_layer: the layer, or its name. The other arguments are those of ``TracInCP``.
        vectorize: has no effect; in Captum's signature.
        count_bias: whether the gradient of the layer's bias counts.

    Raises:
        InvalidArgumentError: without a loss, or for a layer that the model does not have.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> states = [model.state_dict()]
        >>> fast = TracInCPFast(model, "2", train, states, loss_fn=nn.CrossEntropyLoss())
        >>> fast.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        final_fc_layer: str | nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        vectorize: bool = False,
        *,
        count_bias: bool = True,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
    ) -> None:
        if loss_fn is None:
            raise InvalidArgumentError(
                "loss function must not be none: the gradient at the last layer needs one"
            )
        check_flags({"vectorize": vectorize, "count_bias": count_bias})
        self.vectorize = vectorize
        self._count_bias = count_bias
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            [_name_of(model, final_fc_layer)],
            loss_fn,
            batch_size,
            test_loss_fn,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
        )
        self._select = partial(_parameters_of, count_bias=count_bias)
        self._look_at(self.layers)

    @property
    def final_fc_layer(self) -> nn.Module:
        """The layer; can be set to another layer or its name."""
        assert self.layers is not None
        return self.model.get_submodule(self.layers[0])

    @final_fc_layer.setter
    def final_fc_layer(self, layer: str | nn.Module) -> None:
        with alone_with(self.model):
            self._look_whole([_name_of(self.model, layer)])
        self.forget()


def _name_of(model: nn.Module, layer: str | nn.Module) -> str:
    for name, module in check_model(model).named_modules():
        if module is layer or (isinstance(layer, str) and name == layer):
            return str(name)
    there = [name for name, _ in model.named_modules() if name]
    raise InvalidArgumentError(
        f'Invalid final_fc_layer str: "{layer}" provided! The model has the layers {there}'
    )


def _parameters_of(
    model: nn.Module, layers: Sequence[str] | None, count_bias: bool
) -> dict[str, nn.Parameter]:
    """The parameters of the last layer, which must be linear, with or without its bias."""
    assert layers is not None
    parameters, layer = choose_parameters(model, layers), model.get_submodule(layers[0])
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or len(parameters) > 2:
        raise InvalidArgumentError(
            f"`final_fc_layer` must be a linear layer; '{list(layers)}' is {layer}"
        )
    bias = None if count_bias else getattr(layer, "bias", None)
    return {name: p for name, p in parameters.items() if bias is None or p is not bias}
