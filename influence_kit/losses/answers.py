"""The log-probability of a sequence, or of an answer given a prompt, as an output to explain.

Shapes: m test examples, t positions, v tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.core.arguments import check_count, check_flag, check_sequence, shown
from influence_kit.data.class_labels import IGNORED_LABEL, check_labels, labels_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.targets import MOST, Target, token_logits


class SequenceLogProbability(Target):
    r"""The log-probability of the labelled tokens: sum over s of log p(label_s), ``[m]``.

    .. math::
        \log p(\text{answer} \mid \text{prompt}) = \sum_s \log p(y_s \mid y_{<s})

    for labels that are -100 (any negative number) at the prompt and at padding, as
    ``prompt_and_answer`` makes them. In nats. ``influence(..., per_token="test_terms")`` gives the
    scores of each token's own log-probability.

    Args:
        shift: by how many positions labels lag behind logits: 1 for a causal language model whose
            labels are in the positions of its inputs; 0 if the logits at s are those of label s.
        mean: the mean over the labelled tokens in place of the sum.

    Raises:
        InvalidArgumentError: for another type; in a call, if there are no labels ``[m, t]`` (in a
            dict batch ``labels``, else the targets) that fit the logits.
        LabelError: for a label outside the vocabulary.

    Example:
        >>> import torch
        >>> answer = SequenceLogProbability()
        >>> answer(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]])).exp()
        tensor([0.0625])
    """

    def __init__(self, shift: int = 1, mean: bool = False) -> None:
        self.shift = check_count(shift, "shift", least=0)
        self.mean = check_flag(mean, "mean")

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The value of each example, ``[m]``."""
        return self.terms(outputs, targets).sum(1)

    def terms(self, outputs: Any, targets: Any) -> Tensor:
        """The part of each token, ``[m, t]``, in the columns of the labels."""
        logits = token_logits(outputs)
        labels = labels_of(targets) if isinstance(targets, Mapping) else targets
        is_ids = isinstance(labels, Tensor) and not labels.is_floating_point()
        if not is_ids or labels.shape != logits.shape[:2] or self.shift >= max(1, logits.shape[1]):
            got = list(labels.shape) if isinstance(labels, Tensor) else shown(labels)
            raise InvalidArgumentError(
                f"the labels must be ids [m, t] for logits {list(logits.shape)} and shift="
                f"{self.shift}, negative where a token does not count; got {got}"
            )
        check_labels(labels, logits.shape[2])
        wanted = labels[:, self.shift :]
        counted = wanted >= 0
        rows = F.log_softmax(logits[:, : logits.shape[1] - self.shift], dim=-1)
        values = rows.gather(2, wanted.clamp(min=0).long()[..., None])[..., 0] * counted
        if self.mean:
            values = values / counted.sum(1, keepdim=True).clamp(min=1)
        return F.pad(values, (self.shift, 0))


def prompt_and_answer(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int = 0
) -> dict[str, Tensor]:
    """A dict batch of prompts followed by their answers, of which only the answers have labels.

    Args:
        prompts: the ids of each prompt, lists or tensors.
        answers: the ids of each answer: a generated one, or any other.
        pad: the id at padding, which is on the right, without attention and labels.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[m, t]``: t of the longest pair.

    Raises:
        InvalidArgumentError: for no pairs, different numbers of prompts and answers, an empty
            prompt or answer, or ids that are not ints of at least 0.

    Example:
        >>> batch = prompt_and_answer([[5, 6], [7]], [[1], [2, 3, 4]])
        >>> batch["input_ids"].tolist()
        [[5, 6, 1, 0], [7, 2, 3, 4]]
        >>> batch["labels"].tolist()
        [[-100, -100, 1, -100], [-100, 2, 3, 4]]
    """
    first = [_ids(ids, "prompts") for ids in check_sequence(prompts, "prompts", "lists of ids")]
    wanted = "lists of ids, one per prompt"
    then = [_ids(ids, "answers") for ids in check_sequence(answers, "answers", wanted, len(first))]
    pad = check_count(pad, "pad", least=0, most=MOST - 1)
    if not first:
        raise InvalidArgumentError("`prompts` is empty; there must be at least one")
    t = max(len(a) + len(b) for a, b in zip(first, then, strict=True))
    ids = torch.full((len(first), t), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(zip(first, then, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _ids(ids: Any, name: str) -> list[int]:
    found = ids.tolist() if isinstance(ids, Tensor) else ids
    is_list = isinstance(found, Sequence) and not isinstance(found, str) and len(found) > 0
    if not is_list or not all(type(one) is int and 0 <= one < MOST for one in found):
        raise InvalidArgumentError(
            f"`{name}` must hold lists of one or more ids, ints of at least 0; got {shown(ids)}"
        )
    return list(found)
