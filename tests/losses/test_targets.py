"""Outputs of language models: values by hand, scores by autograd, refusals."""

from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from cases import Examples
from contract import assert_close
from token_models import VOCABULARY, T, adapted, terms, tokens, total
from torch import Tensor, nn

import influence_kit as ik
from influence_kit.errors import InvalidArgumentError, LabelError

TRAIN = tokens(7, 1)
GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(3, T, VOCABULARY, generator=GENERATOR, dtype=torch.float64)
IDS = torch.tensor([4, 0, 8])
ROWS = torch.arange(3)


def held(logits: Tensor) -> list[Any]:
    """Logits, as models return them."""
    return [logits, SimpleNamespace(logits=logits), {"logits": logits}]


@pytest.mark.parametrize("outputs", held(LOGITS))
def test_values(outputs: Any) -> None:
    log_p = LOGITS.log_softmax(2)
    assert torch.equal(ik.TokenLogit(4)(outputs, None), LOGITS[:, -1, 4])
    assert torch.equal(ik.TokenLogit(position=1)(outputs, IDS), LOGITS[ROWS, 1, IDS])
    assert_close(ik.TokenLogProbability(2, 0)(outputs, None), log_p[:, 0, 2])
    assert_close(ik.TokenLogProbability(position=-2)(outputs, IDS), log_p[ROWS, -2, IDS])
    found = ik.TokenDifference(5, 1)(outputs, None)
    assert_close(found, log_p[:, -1, 5] - log_p[:, -1, 1])
    assert_close(
        ik.TokenDifference(None, 1, 2)(outputs, IDS), LOGITS[ROWS, 2, IDS] - LOGITS[:, 2, 1]
    )


def test_keys_of_a_dict() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
    batch = {"attention_mask": mask, "right": IDS, "wrong": IDS.flip(0), "where": IDS % T}
    last = torch.tensor([3, 1, 4])
    assert torch.equal(ik.TokenLogit("right", "last")(LOGITS, batch), LOGITS[ROWS, last, IDS])
    found = ik.TokenDifference("right", "wrong", "where")(LOGITS, batch)
    at = LOGITS[ROWS, IDS % T]
    assert_close(found[[0, 2]], (at[ROWS, IDS] - at[ROWS, IDS.flip(0)])[[0, 2]])


@pytest.mark.parametrize("outputs", held(LOGITS))
def test_sequences(outputs: Any) -> None:
    labels = torch.tensor([[-100, -100, 3, 2, -100], [1, 2, 3, 4, 5], [-100, 7, -1, -100, 0]])
    log_p = LOGITS.log_softmax(2)

    def by_hand(shift: int) -> list[Tensor]:
        return [
            sum(
                (log_p[i, s - shift, labels[i, s]] for s in range(shift, T) if labels[i, s] >= 0),
                torch.zeros(()),
            )
            for i in range(3)
        ]

    for shift in (0, 1):
        counts = (labels[:, shift:] >= 0).sum(1)
        for targets in (labels, {"labels": labels}):
            found = ik.SequenceLogProbability(shift)(outputs, targets)
            assert_close(found, torch.stack(by_hand(shift)))
            mean = ik.SequenceLogProbability(shift, mean=True)(outputs, targets)
            assert_close(mean, torch.stack(by_hand(shift)) / counts)
    parts = ik.SequenceLogProbability().terms(outputs, labels)
    assert torch.equal(parts != 0, (labels >= 0) & (torch.arange(T) > 0))


TARGETS = {
    "logit": (ik.TokenLogit(4), lambda z: z[:, -1, 4]),
    "log-probability": (ik.TokenLogProbability(4, 2), lambda z: z.log_softmax(2)[:, 2, 4]),
    "difference": (ik.TokenDifference(4, 3, 0), lambda z: z[:, 0, 4] - z[:, 0, 3]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_scores(name: str) -> None:
    """Positive where training raises the output: <grad output, -grad loss> of a step downhill."""
    function, oracle = TARGETS[name]
    model, test = adapted(), tokens(3, 2)
    method = ik.GradDot(
        model, Examples(TRAIN), [model.state_dict()], loss_fn=terms, test_output_fn=function
    )
    h = oracles.gradients(model, test, lambda outputs, _: oracle(outputs))
    g = oracles.gradients(model, TRAIN, total)
    assert_close(method.influence(test), -h @ g.T)
    assert method.explains_output
    rate = 1e-6
    example = oracles.one(TRAIN, 2)
    before = function(model(test[0]), test[1])
    method_scores = method.influence(test)[:, 2]
    for parameter, gradient in zip(
        model.parameters(),
        torch.autograd.grad(total(model(example[0]), example[1]).sum(), list(model.parameters())),
        strict=True,
    ):
        parameter.data -= rate * gradient
    risen = (function(model(test[0]), test[1]) - before) / rate
    assert torch.allclose(risen, method_scores, rtol=1e-4, atol=1e-6)


def test_scores_of_an_answer() -> None:
    """Log p(answer | prompt), whole and by token; the model is called with dict batches."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = adapted()

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(input_ids)}

    def loss(outputs: Any, batch: Any) -> Tensor:
        return terms(outputs["logits"][:, :-1], batch["labels"][:, 1:])

    prompts, answers = [[1, 2], [3], [4, 5, 6]], [[7, 8], [0, 1, 2], [3]]
    test, train = ik.prompt_and_answer(prompts, answers), ik.prompt_and_answer(answers, prompts)
    model = Causal()
    method = ik.GradDot(
        model,
        Examples(train),
        [model.state_dict()],
        loss_fn=loss,
        test_output_fn=ik.SequenceLogProbability(),
    )
    g = oracles.gradients(model, _inputs(train), lambda o, y: loss(o, {"labels": y}).sum(1))
    h = torch.stack(
        [
            oracles.gradients(
                model, _inputs(test), lambda o, y, s=s: _log_probability(o["logits"], y, s)
            )
            for s in range(4)
        ],
        dim=1,
    )
    assert_close(method.influence(test), -torch.einsum("isp,jp->ij", h, g))
    found = method.influence(test, per_token="test_terms")
    assert_close(found, -torch.einsum("isp,jp->ijs", h, g))


def _inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["labels"]


def _log_probability(logits: Tensor, labels: Tensor, s: int) -> Tensor:
    if s == 0 or int(labels[0, s]) < 0:
        return 0 * logits.sum().reshape(1)
    return logits.log_softmax(2)[:, s - 1, int(labels[0, s])]


def test_prompts_and_answers() -> None:
    found = ik.prompt_and_answer([torch.tensor([5, 6]), [7]], ([1], (2, 3, 4)), pad=9)
    assert found["input_ids"].tolist() == [[5, 6, 1, 9], [7, 2, 3, 4]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert found["labels"].tolist() == [[-100, -100, 1, -100], [-100, 2, 3, 4]]


def test_repr() -> None:
    assert repr(ik.TokenDifference(4, 3)) == "TokenDifference(position=-1, token=4, other=3)"
    assert repr(ik.SequenceLogProbability()) == "SequenceLogProbability(shift=1, mean=False)"


def test_an_output_that_rises_is_not_a_loss() -> None:
    model = adapted()
    for function, _ in TARGETS.values():
        with pytest.raises(InvalidArgumentError, match="which is better when higher"):
            ik.GradDot(
                model,
                Examples(TRAIN),
                [model.state_dict()],
                loss_fn=terms,
                test_loss_fn=function,
            )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ik.TokenLogit(-1), "`token` must be the id of a token.*None"),
        (lambda: ik.TokenLogit(True), "`token` must be the id of a token"),
        (lambda: ik.TokenLogit(""), "`token` must be the id of a token"),
        (lambda: ik.TokenDifference(1, None), "`other` must be the id of a token"),  # type: ignore[arg-type]
        (lambda: ik.TokenLogProbability(1, 1.5), "`position` must be an int"),  # type: ignore[arg-type]
        (lambda: ik.TokenLogProbability(1, True), "`position` must be an int"),
        (lambda: ik.SequenceLogProbability(-1), "`shift` must be an int of at least 0"),
        (lambda: ik.SequenceLogProbability(mean=1), "`mean` must be True or False"),  # type: ignore[arg-type]
        (lambda: ik.TokenLogit(9)(LOGITS, None), "`token` is 9, and the vocabulary has 9 tokens"),
        (lambda: ik.TokenLogit()(LOGITS, IDS - 1), "`token` is -1, and the vocabulary"),
        (lambda: ik.TokenLogit(1, 5)(LOGITS, None), "`position` is 5, and .* logits of 5 pos"),
        (lambda: ik.TokenLogit(1, -6)(LOGITS, None), "`position` is -6, and .* of 5 positions"),
        (
            lambda: ik.TokenLogit()(LOGITS, None),
            "`token`=None must give one id per ex",
        ),
        (lambda: ik.TokenLogit()(LOGITS, IDS[:2]), r"`token`=None must give .*; got \[2\]"),
        (lambda: ik.TokenLogit()(LOGITS, IDS.double()), "`token`=None must give one id"),
        (lambda: ik.TokenLogit("a")(LOGITS, {"b": IDS}), r"no tensor 'a'.*it is \['b'\]"),
        (lambda: ik.TokenLogit("a")(LOGITS, IDS), "no tensor 'a'.*it is a Tensor"),
        (lambda: ik.TokenLogit(1, "last")(LOGITS, {}), "no tensor 'attention_mask'"),
        (lambda: ik.TokenLogit(1, "a")(LOGITS, {"a": IDS[:2]}), r"'a' holds \[2\] positions for 3"),
        (lambda: ik.TokenLogit(1)(LOGITS[0], None), r"need logits \[m, t, v\]; the model"),
        (lambda: ik.TokenLogit(1)(LOGITS.long(), None), r"need logits \[m, t, v\]; the model"),
        (lambda: ik.TokenLogit(1)(SimpleNamespace(loss=1), None), "without `logits`"),
        (lambda: ik.SequenceLogProbability()(LOGITS, IDS), r"must be ids \[m, t\] for logits"),
        (lambda: ik.SequenceLogProbability()(LOGITS, None), r"must be ids \[m, t\] for .*None"),
        (lambda: ik.SequenceLogProbability()(LOGITS, LOGITS[..., 0]), r"must be ids \[m, t\]"),
        (lambda: ik.SequenceLogProbability(5)(LOGITS, TRAIN[1][:3]), "and shift=5"),
        (lambda: ik.SequenceLogProbability()(LOGITS, {"ids": IDS}), "is a known key of labels"),
        (lambda: ik.prompt_and_answer([], []), "`prompts` is empty"),
        (lambda: ik.prompt_and_answer([[1]], []), "`answers`"),
        (lambda: ik.prompt_and_answer([[1]], [[]]), "`answers` must hold lists of one or more ids"),
        (lambda: ik.prompt_and_answer(["text"], [[1]]), "`prompts` must hold lists of one or more"),  # type: ignore[list-item]
        (lambda: ik.prompt_and_answer([[-1]], [[1]]), "`prompts` must hold lists of one or more"),
        (lambda: ik.prompt_and_answer("text", [[1]]), "`prompts` must be a list"),  # type: ignore[arg-type]
        (lambda: ik.prompt_and_answer([[1]], [[1]], pad=-1), "`pad` must be an int"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()


def test_labels_outside_the_vocabulary() -> None:
    with pytest.raises(LabelError, match="there are 9 classes"):
        ik.SequenceLogProbability()(LOGITS, torch.full((3, T), 9))
