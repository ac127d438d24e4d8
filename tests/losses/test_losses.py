"""A loss of any reduction is the sum of the losses of single examples; others are refused."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from influence_kit import TracInCP
from influence_kit.data.batches import call_model, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.declared_reduction import declared_reduction
from influence_kit.losses.loss import Loss

N, CLASSES, TOKENS = 4, 3, 5
CLOSENESS = 1e-9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(), dtype=torch.float64)


OUTPUTS = logits(N, CLASSES)
TARGETS = torch.tensor([0, 2, 1, 1])
TOKEN_OUTPUTS = logits(N, TOKENS, CLASSES)
# examples with 5, 3, 4 and 1 tokens
TOKEN_TARGETS = torch.randint(CLASSES, (N, TOKENS), generator=generator())
for row, length in enumerate((5, 3, 4, 1)):
    TOKEN_TARGETS[row, length:] = -100
FULL_TARGETS = TOKEN_TARGETS.clamp(min=0)


class Identity(nn.Module):
    def forward(self, x):
        return x


def settled(loss_fn, outputs, targets, reduction=None) -> Loss:
    """A loss that has seen a first batch."""
    loss = Loss(loss_fn, reduction, "loss_fn")
    settle(loss, Identity(), (outputs, targets))
    return loss


def settle(loss: Loss, model: nn.Module, batch) -> None:
    ones = [take(batch, slice(i, i + 1)) for i in range(example_count(batch))]
    alone = [(call_model(model, one), one) for one in ones]
    loss.settle((call_model(model, batch), batch), alone, CLOSENESS)


def gradient(loss: Loss, outputs, targets) -> torch.Tensor:
    """The gradient of the total loss at the outputs: row i is that of example i's loss."""
    outputs = outputs.clone().requires_grad_()
    loss.total(outputs, (outputs, targets), len(outputs)).backward()
    return outputs.grad


def token_losses(reduction: str, ignore_index: int = -100):
    def loss_fn(outputs, targets):
        return F.cross_entropy(
            outputs.transpose(1, 2), targets, reduction=reduction, ignore_index=ignore_index
        )

    return loss_fn


# Reductions agree.


@pytest.mark.parametrize("kind", ["a module", "a plain function"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_reduction_has_the_gradients_of_single_examples(reduction, kind):
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    known = declared_reduction(loss_fn, None)
    if kind == "a plain function":
        known, loss_fn = None, partial(F.cross_entropy, reduction=reduction)
    loss = settled(loss_fn, OUTPUTS, TARGETS, known)
    expected = OUTPUTS.softmax(1) - F.one_hot(TARGETS, CLASSES)
    assert loss.settled
    torch.testing.assert_close(gradient(loss, OUTPUTS, TARGETS), expected)
    # and in a batch of any other size
    torch.testing.assert_close(gradient(loss, OUTPUTS[:1], TARGETS[:1]), expected[:1])


@pytest.mark.parametrize(("reduction", "found"), [("none", None), ("sum", "sum"), ("mean", "mean")])
def test_the_reduction_of_a_plain_function_is_found(reduction, found):
    loss = settled(partial(F.cross_entropy, reduction=reduction), OUTPUTS, TARGETS)
    assert (loss.settled, loss.reduction) == (True, found)


def test_a_mean_over_examples_and_features_is_the_mean_of_each_examples_mean():
    targets = logits(N, CLASSES).flip(0)
    loss = settled(nn.MSELoss(), OUTPUTS, targets, "mean")
    expected = 2 * (OUTPUTS - targets) / CLASSES
    torch.testing.assert_close(gradient(loss, OUTPUTS, targets), expected)


def test_a_mean_over_tokens_without_padding_is_the_mean_of_each_examples_mean():
    loss = settled(token_losses("mean"), TOKEN_OUTPUTS, FULL_TARGETS)
    one_hot = F.one_hot(FULL_TARGETS, CLASSES)
    expected = (TOKEN_OUTPUTS.softmax(2) - one_hot) / TOKENS
    assert loss.reduction == "mean"
    torch.testing.assert_close(gradient(loss, TOKEN_OUTPUTS, FULL_TARGETS), expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_losses_of_padded_tokens_are_summed_by_example(reduction):
    loss = settled(token_losses(reduction), TOKEN_OUTPUTS, TOKEN_TARGETS)
    labelled = TOKEN_TARGETS != -100
    one_hot = F.one_hot(FULL_TARGETS, CLASSES)
    expected = (TOKEN_OUTPUTS.softmax(2) - one_hot) * labelled.unsqueeze(2)
    torch.testing.assert_close(gradient(loss, TOKEN_OUTPUTS, TOKEN_TARGETS), expected)


def test_a_scalar_for_one_example_is_its_loss_whatever_was_declared():
    # squeeze() of one example's output has no dimension left
    loss = Loss(lambda outputs, targets: outputs.squeeze() ** 2, "none", "loss_fn")
    outputs = torch.tensor([[3.0]], dtype=torch.float64)
    assert gradient(loss, outputs, torch.zeros(1)).tolist() == [[6.0]]


# What is not a loss of examples.

WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
BY_CLASS = nn.CrossEntropyLoss(weight=WEIGHTS)
MEANS_OF_OTHER_THINGS = {
    "class weights": (BY_CLASS, OUTPUTS, TARGETS),
    "padded tokens": (token_losses("mean"), TOKEN_OUTPUTS, TOKEN_TARGETS),
    "root of the mean": (lambda o, t: F.cross_entropy(o, t).sqrt(), OUTPUTS, TARGETS),
    "pairs": (lambda o, t: (o @ o.T).sum(), OUTPUTS, TARGETS),
}


@pytest.mark.parametrize("name", MEANS_OF_OTHER_THINGS)
def test_a_mean_over_something_else_than_examples_is_refused(name):
    match = (
        r"`loss_fn` is not a sum or mean over examples: 4 examples together have .*, each alone "
        r"\[.*\]. A mean over tokens with padding .* pass a loss with one value per example"
    )
    with pytest.raises(InvalidArgumentError, match=match):
        settled(*MEANS_OF_OTHER_THINGS[name])


@pytest.mark.parametrize("name", ["class weights", "padded tokens"])
def test_a_declared_mean_that_is_none_is_refused(name):
    with pytest.raises(InvalidArgumentError, match="`loss_fn` is not a mean over examples: 4 ex"):
        settled(*MEANS_OF_OTHER_THINGS[name], reduction="mean")


ONE_CLASS, EVEN_TOKENS = torch.full((N,), 2), FULL_TARGETS.index_fill(1, torch.tensor([0]), -100)


@pytest.mark.parametrize(
    ("loss_fn", "outputs", "even", "uneven", "counts"),
    [
        (BY_CLASS, OUTPUTS, ONE_CLASS, TARGETS, r"\[1.0, 5.0, 2.0, 2.0\]"),
        (nn.NLLLoss(weight=WEIGHTS), OUTPUTS, ONE_CLASS, TARGETS, r"\[1.0, 5.0, 2.0, 2.0\]"),
        (
            nn.CrossEntropyLoss(ignore_index=1),
            OUTPUTS,
            ONE_CLASS,
            TARGETS,
            r"\[1.0, 1.0, 0.0, 0.0\]",
        ),
        (
            nn.CrossEntropyLoss(),
            TOKEN_OUTPUTS.transpose(1, 2),
            EVEN_TOKENS,
            TOKEN_TARGETS,
            r"\[5.0, 3.0, 4.0, 1.0\]",
        ),
    ],
    ids=["class weights", "NLLLoss", "ignored examples", "padding"],
)
def test_a_mean_that_turns_uneven_in_a_later_batch_is_refused_there(
    loss_fn, outputs, even, uneven, counts
):
    # a first batch of one class, or without padding, looks like any other mean
    loss = settled(loss_fn, outputs, even, "mean")
    assert loss.settled
    expected = settled(one_by_one(loss_fn), outputs, even)
    torch.testing.assert_close(gradient(loss, outputs, even), gradient(expected, outputs, even))
    match = f"`loss_fn` is not a mean over examples: by their classes and tokens, the 4 .*{counts}"
    with pytest.raises(InvalidArgumentError, match=match):
        loss.total(outputs, (outputs, uneven), N)


def one_by_one(loss_fn):
    """The sum over examples of the loss of each alone."""

    def total(outputs, targets):
        return sum(loss_fn(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets)))

    return total


def test_probabilities_as_targets_have_a_mean_over_examples():
    targets = logits(N, CLASSES).flip(0).softmax(1)
    loss = settled(nn.CrossEntropyLoss(), OUTPUTS, targets, "mean")
    expected = OUTPUTS.softmax(1) - targets
    torch.testing.assert_close(gradient(loss, OUTPUTS, targets), expected)


def test_a_sum_that_was_declared_a_mean_is_refused():
    with pytest.raises(InvalidArgumentError, match="`loss_fn` is not a mean over examples"):
        settled(token_losses("sum"), TOKEN_OUTPUTS, TOKEN_TARGETS, reduction="mean")


@pytest.mark.parametrize("value", [1.0, None, [1.0]], ids=repr)
def test_a_loss_that_is_no_tensor_is_refused(value):
    loss = Loss(lambda outputs, targets: value, None, "test_loss_fn")
    match = f"`test_loss_fn` must return a tensor; got a {type(value).__name__}"
    with pytest.raises(InvalidArgumentError, match=match):
        loss.total(OUTPUTS, (OUTPUTS, TARGETS), N)


@pytest.mark.parametrize(
    ("value", "reduction", "match"),
    [
        (
            torch.zeros(()),
            "none",
            r"Loss function is applying a reduction. .* scalar for 4 examples",
        ),
        (torch.zeros(N), "sum", r"declared to return the sum over the batch and .* shape \[4\]"),
        (torch.zeros(1), "mean", r"declared to return the mean over the batch and .* shape \[1\]"),
        (torch.zeros(2, N), None, r"shape \[2, 4\] for 4 examples; its first dimension must count"),
        (torch.zeros(N * TOKENS), "none", r"shape \[20\] for 4 .*reshape token losses to \[n, tok"),
    ],
    ids=["reduced", "per example", "one item", "second dimension", "folded tokens"],
)
def test_a_loss_of_an_unfit_shape_is_refused(value, reduction, match):
    loss = Loss(lambda outputs, targets: value, reduction, "loss_fn")
    with pytest.raises(InvalidArgumentError, match=match):
        loss.total(OUTPUTS, (OUTPUTS, TARGETS), N)


# What one batch cannot tell.

ZERO_SUM = torch.tensor([[1.0], [-2.0], [1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "outputs",
    [ZERO_SUM[:1], torch.zeros(3, 1, dtype=torch.float64), ZERO_SUM],
    ids=["one example", "losses of zero", "losses that cancel"],
)
def test_sum_and_mean_stay_open_where_a_batch_does_not_tell_them_apart(outputs):
    targets = torch.zeros(len(outputs))
    loss = settled(lambda o, t: o.mean(), outputs, targets)
    assert (loss.settled, loss.reduction) == (False, None)
    settle(loss, Identity(), (ZERO_SUM[:2], targets[:1].repeat(2)))
    assert (loss.settled, loss.reduction) == (True, "mean")


def test_a_batch_with_a_loss_that_is_nan_does_not_tell():
    outputs = OUTPUTS.clone()
    outputs[2, 0] = torch.nan
    loss = settled(F.cross_entropy, outputs, TARGETS)
    assert (loss.settled, loss.reduction) == (False, None)


# Captum's flag.


class Declares:
    def __init__(self, reduction):
        self.reduction = reduction


@pytest.mark.parametrize(
    ("reduction", "flag", "found"),
    [
        ("none", None, "none"),
        ("sum", None, "sum"),
        ("mean", None, "mean"),
        ("batchmean", None, None),
        ("none", False, "none"),
        ("sum", True, "sum"),
        ("mean", True, "mean"),
    ],
)
def test_a_declared_reduction_that_fits_the_flag_is_taken(reduction, flag, found):
    assert declared_reduction(Declares(reduction), flag) == found


@pytest.mark.parametrize("flag", [None, True, False])
def test_without_a_loss_there_is_no_reduction_to_declare(flag):
    assert declared_reduction(None, flag) is None


@pytest.mark.parametrize(
    ("reduction", "flag", "words"),
    [
        ("none", True, '"sum" or "mean"'),
        ("batchmean", True, '"sum" or "mean"'),
        ("sum", False, '"none"'),
        ("mean", False, '"none"'),
    ],
)
@pytest.mark.parametrize("name", ["loss_fn", "test_loss_fn"])
@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_a_declared_reduction_that_does_not_fit_the_flag_is_refused(
    reduction, flag, words, name, error
):
    match = (
        f"reduction for `{name}` must be {words} when `sample_wise_grads_per_batch` is {flag}; "
        f'got "{reduction}". Leave `sample_wise_grads_per_batch` out'
    )
    with pytest.raises(error, match=match):
        declared_reduction(Declares(reduction), flag, name)


@pytest.mark.parametrize(
    ("flag", "taken", "meaning"),
    [(True, "sum", "the sum over the batch"), (False, "none", "one loss per example")],
)
def test_the_flag_decides_about_a_plain_function_with_a_warning(flag, taken, meaning):
    match = f"has no attribute `reduction`; since .* is {flag}, it is assumed to return {meaning}"
    with pytest.warns(UserWarning, match=match):
        assert declared_reduction(F.cross_entropy, flag) == taken


def test_without_the_flag_a_plain_function_is_taken_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert declared_reduction(F.cross_entropy, None) is None


# The model's own loss.


class Own(nn.Module):
    """A model that returns a loss of its own beside the logits, which are its inputs."""

    def __init__(self, formula, kind=SimpleNamespace):
        super().__init__()
        self.formula, self.kind = formula, kind

    def forward(self, x, labels):
        return self.kind(loss=self.formula(x, labels), logits=x)


class Output(dict):
    """As transformers' ``ModelOutput``: a mapping whose items are attributes, too."""

    __getattr__ = dict.__getitem__


def shifted(x, labels):
    """The loss of a causal language model: position t predicts label t + 1."""
    return F.cross_entropy(x[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def own_gradients(model, x, labels) -> torch.Tensor:
    """The gradients of the loss of each example alone."""
    x = x.clone().requires_grad_()
    alone = [model(x[i : i + 1], labels[i : i + 1]) for i in range(len(x))]
    sum(one["loss"] if isinstance(one, dict) else one.loss for one in alone).backward()
    return x.grad


SHIFTED_TARGETS = TOKEN_TARGETS[:3]  # the last example has no second token to predict
OWN = {
    "classes": (F.cross_entropy, OUTPUTS, TARGETS, "none"),
    "tokens": (
        lambda x, labels: F.cross_entropy(x.flatten(0, 1), labels.flatten()),
        TOKEN_OUTPUTS,
        TOKEN_TARGETS,
        "none",
    ),
    "next tokens": (shifted, TOKEN_OUTPUTS[:3], SHIFTED_TARGETS, "none"),
    "regression": (lambda x, y: F.mse_loss(x[:, 0], y), OUTPUTS, OUTPUTS[:, 1], "mean"),
    "several labels": (
        F.binary_cross_entropy_with_logits,
        OUTPUTS,
        (OUTPUTS > 0).double().flip(0),
        "mean",
    ),
    "smoothed": (lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), OUTPUTS, TARGETS, "mean"),
    "a sum": (lambda x, y: F.cross_entropy(x, y, reduction="sum"), OUTPUTS, TARGETS, "sum"),
    "per example": (
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
        OUTPUTS,
        TARGETS,
        None,
    ),
}


@pytest.mark.parametrize("kind", [SimpleNamespace, Output, dict])
@pytest.mark.parametrize("name", OWN)
def test_the_models_own_loss_has_the_gradients_of_single_examples(name, kind):
    formula, x, labels, reduction = OWN[name]
    model = Own(formula, kind)
    loss = Loss(None, None, "loss_fn")
    settle(loss, model, {"x": x, "labels": labels})
    assert (loss.settled, loss.reduction) == (True, reduction)
    mine = x.clone().requires_grad_()
    batch = {"x": mine, "labels": labels}
    loss.total(model(**batch), batch, len(x)).backward()
    torch.testing.assert_close(mine.grad, own_gradients(model, x, labels))


def token_sums(x, labels):
    """The mean over examples of the sums over their tokens."""
    return F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="sum") / len(x)


def token_means(x, labels):
    """The mean over examples of the means over their tokens."""
    losses = F.cross_entropy(x.transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


ONE_TOKEN = TOKEN_TARGETS.clone()
ONE_TOKEN[:, 1:] = -100


@pytest.mark.parametrize("formula", [OWN["tokens"][0], token_means, token_sums])
@pytest.mark.parametrize("n", [N, 1])
def test_a_later_batch_shows_what_a_models_own_loss_does_with_several_tokens(formula, n):
    model = Own(formula)
    loss = Loss(None, None, "loss_fn")
    settle(loss, model, {"x": TOKEN_OUTPUTS, "labels": ONE_TOKEN})
    # the last example, alone or among others, and one of the first batch again
    for x, labels in [(TOKEN_OUTPUTS[-n:], TOKEN_TARGETS[:n]), (TOKEN_OUTPUTS[:2], ONE_TOKEN[:2])]:
        mine = x.clone().requires_grad_()
        batch = {"x": mine, "labels": labels}
        loss.checked_total(model(**batch), batch, len(x)).backward()
        torch.testing.assert_close(mine.grad, own_gradients(model, x, labels))


def test_a_models_own_loss_that_later_follows_no_formula_is_refused():
    def squared_count(x, labels):
        return token_sums(x, labels) / (labels != -100).sum() * len(x) ** 2

    model = Own(squared_count)
    loss = Loss(None, None, "loss_fn")
    settle(loss, model, {"x": TOKEN_OUTPUTS[:1], "labels": ONE_TOKEN[:1]})
    batch = {"x": TOKEN_OUTPUTS, "labels": TOKEN_TARGETS}
    match = "batch 3: the model's own loss is .* but the mean over its labelled positions, which"
    with pytest.raises(InvalidArgumentError, match=match):
        loss.checked_total(model(**batch), batch, N, "batch 3")


def test_labels_that_do_not_fit_the_formula_of_earlier_batches_are_refused():
    model = Own(OWN["tokens"][0])
    loss = Loss(None, None, "loss_fn")
    settle(loss, model, {"x": TOKEN_OUTPUTS, "labels": TOKEN_TARGETS})
    batch = {"x": OUTPUTS, "labels": TARGETS}
    outputs = SimpleNamespace(loss=F.cross_entropy(OUTPUTS, TARGETS), logits=OUTPUTS)
    with pytest.raises(InvalidArgumentError, match=r"logits of shape .* do not fit the formula"):
        loss.checked_total(outputs, batch, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_models_own_loss_in_half_precision_is_compared_as_such(dtype):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x, labels):
            logits = self.head(x)
            return Output(loss=F.cross_entropy(logits, labels), logits=logits)

    for seed in range(5):
        torch.manual_seed(seed)
        model, x, y = Half().to(dtype), torch.randn(9, 4).to(dtype), torch.randint(3, (9,))
        train = [{"x": x[i : i + 3], "labels": y[i : i + 3]} for i in (0, 3, 6)]
        influence = TracInCP(model, DataLoader(train, None), [model.state_dict()])
        assert influence.influence(train[0]).shape == (3, 9)


def test_a_models_own_mean_over_something_else_is_refused():
    model = Own(lambda x, y: F.cross_entropy(x, y, weight=WEIGHTS))
    loss = Loss(None, None, "loss_fn")
    batch = {"x": OUTPUTS, "labels": TARGETS}
    with pytest.raises(InvalidArgumentError, match="`loss_fn` is not a sum or mean over examples"):
        settle(loss, model, batch)


@pytest.mark.parametrize("output", [SimpleNamespace(logits=OUTPUTS), {"logits": OUTPUTS}])
def test_a_models_output_without_a_loss_is_refused(output):
    match = f"the model returned a {type(output).__name__} without a loss; put the labels into"
    with pytest.raises(InvalidArgumentError, match=match):
        Loss(None, None, "loss_fn").values(output, {"x": OUTPUTS})


def test_without_a_loss_an_output_that_is_no_tensor_is_refused():
    match = r"without a `loss_fn` the model's output .* returned a list: pass `loss_fn`"
    with pytest.raises(InvalidArgumentError, match=match):
        Loss(None, None, "loss_fn").values([OUTPUTS], (OUTPUTS, TARGETS))


@pytest.mark.parametrize("batch", [(OUTPUTS, TARGETS), {"x": OUTPUTS}], ids=["tuple", "dict"])
def test_without_a_loss_a_models_tensor_is_summed_by_example(batch):
    loss = Loss(None, None, "loss_fn")
    assert torch.equal(loss.total(OUTPUTS, batch, N), OUTPUTS.sum())


# Real models of Hugging Face, with random weights.


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=TOKENS,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    ids = torch.randint(1, 11, (N, TOKENS), generator=generator(1))
    mask = (TOKEN_TARGETS != -100).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": TARGETS, "idx": torch.arange(N)}
    return BertForSequenceClassification(config), batch


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=11,
        n_positions=TOKENS,
        n_embd=4,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    ids = torch.randint(1, 11, (3, TOKENS), generator=generator(2))
    labels = ids.masked_fill(SHIFTED_TARGETS == -100, -100)
    mask = (labels != -100).long()
    return GPT2LMHeadModel(config), {"input_ids": ids, "attention_mask": mask, "labels": labels}


# transformers computes the loss of language models in float32
ROUNDING = {bert: {"rtol": 1e-9, "atol": 1e-12}, gpt2: {"rtol": 1e-4, "atol": 1e-6}}


def example_gradients(model: nn.Module, batch) -> torch.Tensor:
    """Each example's gradient of the model's own loss, by autograd: ``[n, P]``."""
    rows = []
    for i in range(example_count(batch)):
        loss = call_model(model, take(batch, slice(i, i + 1))).loss
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_hugging_face_models_own_loss_is_taken_apart_by_example(build):
    torch.manual_seed(0)
    model, batch = build()
    model = model.double().eval()
    expected = example_gradients(model, batch)
    loss = Loss(None, None, "loss_fn")
    settle(loss, model, batch)
    assert (loss.settled, loss.reduction) == (True, "none")
    total = loss.total(call_model(model, batch), batch, len(expected))
    found = torch.autograd.grad(total, list(model.parameters()))
    found = torch.cat([g.flatten() for g in found])
    torch.testing.assert_close(found, expected.sum(0), **ROUNDING[build])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [bert, gpt2])
def test_scores_with_a_hugging_face_models_own_loss_are_products_of_gradients(build):
    torch.manual_seed(0)
    model, batch = build()
    model = model.double().eval()
    gradients = example_gradients(model, batch)
    examples = [{key: v[i] for key, v in batch.items()} for i in range(len(gradients))]
    loader = DataLoader(examples, batch_size=2)
    scores = TracInCP(model, loader, [model.state_dict()]).influence(batch)
    torch.testing.assert_close(scores, gradients @ gradients.T, **ROUNDING[build])
