"""Dropout ensembles: thinned networks of one trained model, as checkpoints.

Deng et al. 2024, "Efficient Ensembles Improve Training Data Attribution", arXiv 2405.17293.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from influence_kit.checkpoints.discovery import load_checkpoint
from influence_kit.core.arguments import check_count, shown
from influence_kit.core.objects import check_model
from influence_kit.errors import InvalidArgumentError
from influence_kit.preservation.dropout_masks import MASKS
from influence_kit.preservation.restore import borrowed

# members, each a dict in the list that is returned
MOST = 10**6
Rates = float | Mapping[str, float] | None


def dropout_ensemble(
    model: nn.Module,
    n: int,
    seed: int = 0,
    checkpoint: Any = None,
    *,
    p: Rates = None,
    axes: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Checkpoints of n thinned networks: the same weights, a fixed mask at every dropout layer.

    Scores over them are scores of an ensemble, without training one (arXiv 2405.17293). A mask has
    one entry per feature, 0 or 1 / (1 - rate), and is the same for every example, training or test,
    and for every batch size and device. Features are the last dimension of tensors with two or
    three dimensions (``[n, d]``, ``[n, t, d]``), and dimension 1 of tensors with more
    (``[n, c, h, w]``, and attention ``[n, heads, t, t]``) and of ``Dropout1d``, ``Dropout2d`` and
    ``Dropout3d``.

    The masks are set on the layers of the model when a method loads the checkpoint, and removed
    with it. Dropout that is not a layer (``F.dropout``, the ``dropout`` of
    ``nn.MultiheadAttention`` and of recurrent layers) stays off. The checkpoints are dicts of plain
    values and of tensors, which share memory: ``torch.save`` can save them.

    Args:
        model: the model, with dropout layers; it is not changed.
        n: the number of checkpoints.
        seed: the seed of the masks; member i is the same for every n.
        checkpoint: the weights and their learning rate: anything that ``load_checkpoint`` takes.
            None for the model's own weights, with learning rate 1.
        p: one rate for all dropout layers, or rates per layer; None for each layer's own.
        axes: the dimension of the features per layer, if it differs from the default above.

    Returns:
        A list to pass as ``checkpoints``. Your own load function may call
        ``load_checkpoint(model, member)``.

    Raises:
        InvalidArgumentError: for a model without dropout layers or only with rates of 0, and for
            ``AlphaDropout``, which does more than multiply by a mask.

    Example:
        >>> import torch
        >>> from influence_kit import GradDot
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
        ... )
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> members = dropout_ensemble(model, 5)
        >>> dot = GradDot(model, train, members, loss_fn=torch.nn.CrossEntropyLoss())
        >>> dot.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
    """
    check_model(model)
    n, seed = check_count(n, "n", most=MOST), check_count(seed, "seed", least=0)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _DropoutNd)}
    rates = _rates(model, layers, p)
    chosen = _axes(axes)
    _check_names("axes", chosen, layers)
    with borrowed(model) as inside:
        inside.in_training()
        rate = 1.0 if checkpoint is None else load_checkpoint(model, checkpoint)
        weights = copy.deepcopy(model.state_dict())
    masks = {"seed": seed, "rates": rates, "axes": chosen}
    return [
        {"state_dict": weights, "learning_rate": rate, MASKS: {**masks, "member": member}}
        for member in range(n)
    ]


def _axes(axes: Any) -> dict[str, int]:
    if axes is not None and not isinstance(axes, Mapping):
        raise InvalidArgumentError(
            f"`axes` must be a dict {{name of a layer: dimension}}, or None; got {shown(axes)}"
        )
    given = dict(axes or {})
    for name, axis in given.items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise InvalidArgumentError(f"`axes[{name!r}]` must be an int; got {shown(axis)}")
    return given


def _rates(model: nn.Module, layers: Mapping[str, _DropoutNd], p: Rates) -> dict[str, float]:
    """The rate of each layer that drops something."""
    if not layers:
        raise InvalidArgumentError(
            f"the {type(model).__name__} has no dropout layers (nn.Dropout, nn.Dropout1d, ...), so "
            "there are no thinned networks to make an ensemble of; pass checkpoints of several runs"
        )
    rates: dict[str, Any] = {name: layer.p for name, layer in layers.items()}
    if isinstance(p, Mapping):
        _check_names("p", p, layers)
        rates.update(p)
    elif p is not None:
        rates = dict.fromkeys(layers, p)
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise InvalidArgumentError(
                f"the rate of dropout layer '{name}' is {shown(rate)}; it must be at least 0 "
                "and below 1 (`p` sets it)"
            )
        if rate > 0 and isinstance(layers[name], nn.AlphaDropout | nn.FeatureAlphaDropout):
            raise InvalidArgumentError(
                f"the dropout layer '{name}' is an {type(layers[name]).__name__}, which does more "
                f"than multiply by a mask; leave it out with p={{'{name}': 0}}"
            )
    dropping = {name: float(rate) for name, rate in rates.items() if rate > 0}
    if not dropping:
        raise InvalidArgumentError(
            f"the dropout layers {list(layers)} have rate 0, so all members of an ensemble would "
            "be the same; set other rates with `p`"
        )
    return dropping


def _check_names(argument: str, names: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> None:
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise InvalidArgumentError(
            f"`{argument}` has the keys {unknown}, which are not dropout layers of the model; it "
            f"has {list(layers)}"
        )
