"""Cosines of test gradients with Adam's directions: Xia et al. 2024, arXiv 2402.04333."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.checkpoints.discovery import LoadFunction, load_checkpoint
from influence_kit.core.arguments import shown
from influence_kit.core.objects import is_one_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import Verify
from influence_kit.losses.loss import LossFunction
from influence_kit.losses.margins import OutputFunction
from influence_kit.methods.arguments import documented
from influence_kit.methods.example_batches import BatchSize
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.methods.layer_names import Layers
from influence_kit.scoring.term import Term
from influence_kit.scoring.transforms import unit_norm

Similarity = Literal["cosine", "dot"]


@documented
class LESS(InnerProductInfluence):
    r"""score = sum over checkpoints of learning rate * cos(grad loss(test), Gamma(train)).

    .. math::
        \sum_c \eta_c \, \cos \bigl( \nabla \ell_{test}(z'; \theta_c), \; \Gamma(z; \theta_c)
        \bigr), \qquad
        \Gamma = \frac{m / (1 - \beta_1^{t + 1})}{\sqrt{v / (1 - \beta_2^{t + 1})} + \epsilon}

    with m = beta_1 m_t + (1 - beta_1) g and v = beta_2 v_t + (1 - beta_2) g^2, entry by entry: g is
    the gradient of the training example, and Gamma the direction of Adam's next step if its batch
    were that example alone (arXiv 2402.04333). The moments m_t and v_t, the number of steps t, the
    betas and eps are those of the ``torch.optim.Adam`` or ``AdamW`` that the checkpoint holds
    beside the weights: a dict or file {"state_dict": ..., "optimizer": optimizer.state_dict()}, a
    file of Lightning, or a folder of Hugging Face's Trainer or of accelerate.

    Rows are test examples; positive is a proponent: the step lowers the test loss. A score is
    between plus and minus the sum of the learning rates; with "dot" it is in units of the test
    loss, the decrease by one such step per checkpoint to first order. Test gradients are plain. The
    gradients are not projected: these are the scores that the paper estimates from projections. The
    paper scores a validation group by the mean of its rows, and a training example by its highest
    group.

    Directions have no zeros where gradients have, so that embeddings and factored gradients are
    written out: a batch takes P floats per example.

    Args:
        similarity: "cosine", or "dot" for the inner product.
        parameter_names: the names of the optimizer's parameters in its order. None takes the
            model's order (all its parameters, or those that require a gradient) within each
            parameter group, where the shapes allow only one such order.

    The other arguments are those of ``InnerProductInfluence``.

    Raises:
        InvalidArgumentError: in a call, if a checkpoint holds no optimizer's state, one without
            steps, that of another optimizer (SGD), or one whose parameters are not the model's.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
        >>> loss, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters())
        >>> loss(model(x), y).backward()
        >>> optimizer.step()
        >>> saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> less = LESS(model, train, [saved], loss_fn=loss)
        >>> less.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: LoadFunction = load_checkpoint,
        layers: Layers | None = None,
        loss_fn: LossFunction | None = None,
        batch_size: BatchSize = "auto",
        test_loss_fn: LossFunction | None = None,
        sample_wise_grads_per_batch: bool | None = None,
        *,
        similarity: Similarity = "cosine",
        parameter_names: Sequence[str] | None = None,
        test_output_fn: OutputFunction | None = None,
        eval_mode: bool = True,
        batch_axes: Any = None,
        verify: Verify = "repeated",
        store: str | Path | None = None,
        store_dtype: torch.dtype | None = None,
    ) -> None:
        if not is_one_of(similarity, ("cosine", "dot")):
            raise InvalidArgumentError(
                f'`similarity` must be "cosine" or "dot"; got {shown(similarity)}'
            )
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            layers,
            loss_fn,
            batch_size,
            test_loss_fn,
            sample_wise_grads_per_batch,
            optimizer="adam",
            parameter_names=parameter_names,
            test_output_fn=test_output_fn,
            eval_mode=eval_mode,
            batch_axes=batch_axes,
            verify=verify,
            store=store,
            store_dtype=store_dtype,
        )
        self.similarity = similarity

    def terms(self) -> list[Term]:
        """One term per checkpoint; ``train_at`` turns training gradients into directions."""
        last = (unit_norm,) if self.similarity == "cosine" else ()
        return [
            Term(self.test_at(c, *last), self.train_at(c, *last))
            for c in range(len(self.checkpoints))
        ]
