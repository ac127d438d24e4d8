"""A user's mistake is told with what was got, and leaves the model exactly as it was."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from turns import in_turn

from influence_kit import GradCos, GradDot, TracInCP, TracInCPFast, TracInCPFastRandProj
from influence_kit.errors import InvalidArgumentError, NonFiniteError, UnknownLayerError

METHODS = [TracInCP, TracInCPFast, TracInCPFastRandProj, GradDot, GradCos]
OF_ANY_LAYERS = [TracInCP, GradDot, GradCos]
OF_ONE_LAYER = [TracInCPFast, TracInCPFastRandProj]

N = 11
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 2
DATA = TensorDataset(X, Y)
TEST = (X[:4] + 1, Y[:4])
EMPTY = TensorDataset(X[:0], Y[:0])

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def model() -> nn.Module:
    """A model with gradients and with layers in both modes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model(X).square().sum().backward()
    model.train()
    model[1].eval()
    return model


@pytest.fixture
def refused(unchanged):
    """A context manager of what must fail with an error and leave the model as it was."""

    @contextmanager
    def block(model, error, match):
        with unchanged(model), pytest.raises(error, match=match):
            yield

    return block


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that are not the model's own."""
    return {key: value + 0.5 for key, value in model.state_dict().items()}


def make(method, model, train=DATA, checkpoints=None, final_fc_layer="2", **options):
    """A method with all that it needs but what a test gives."""
    options = {"loss_fn": nn.CrossEntropyLoss(), **options}
    checkpoints = [weights(model)] if checkpoints is None else checkpoints
    own = [final_fc_layer] if method in OF_ONE_LAYER else []
    return method(model, *own, train, checkpoints, **options)


def all_scores(explainer, inputs=TEST):
    return explainer.influence(inputs, k=None)


# Layers and parameters.

LAYERS = {
    "unknown": (
        ["0", "9"],
        UnknownLayerError,
        r"the model has no layers \['9'\]; it has \['0', '1', '2'\]",
    ),
    "a parameter": (["0.weight"], UnknownLayerError, r"the model has no layers \['0.weight'\]"),
    "no list": (
        {"0"},
        InvalidArgumentError,
        r"`layers` should be a list! \(of names, .*\) got a set: \{'0'\}",
    ),
    "one name": (
        "9",
        UnknownLayerError,
        r"the model has no layers \['9'\]; it has \['0', '1', '2'\]",
    ),
    "a pattern": (["*.9"], UnknownLayerError, r"the model has no layers \['\*.9'\]; it has \['0'"),
    "a module": (
        nn.Linear(2, 2),
        UnknownLayerError,
        r"modules that are not in the model: \['Linear'\]; it has 3 modules, such as \['0'",
    ),
    "empty": ([], InvalidArgumentError, r"`layers` cannot be empty! Leave it out"),
    "numbers": ([0, 2], InvalidArgumentError, r"`layers` should contain str layer names. got \[0"),
    "without parameters": (["1"], InvalidArgumentError, r"the layers \['1'\] have no parameters"),
}


@in_turn("method, name", OF_ANY_LAYERS, LAYERS)
def test_layers_that_cannot_be_meant_are_refused(model, refused, method, name):
    layers, error, match = LAYERS[name]
    with refused(model, error, match):
        make(method, model, layers=layers)


@pytest.mark.parametrize(
    ("layers", "error"), [(["9"], AttributeError), (["9"], ValueError), ({"0"}, AssertionError)]
)
def test_errors_about_layers_are_those_that_captums_users_catch(model, refused, layers, error):
    with refused(model, error, match="layers"):
        make(TracInCP, model, layers=layers)


@pytest.mark.parametrize("method", OF_ANY_LAYERS)
def test_a_model_without_a_parameter_that_requires_a_gradient_is_refused(model, refused, method):
    model.requires_grad_(False)
    with refused(model, InvalidArgumentError, "no parameter of the model requires a gradient"):
        make(method, model)


@pytest.mark.parametrize("method", OF_ONE_LAYER)
@pytest.mark.parametrize("layer", ["9", nn.Linear(4, 2)], ids=["name", "module"])
def test_a_last_layer_that_the_model_does_not_have_is_refused(model, refused, method, layer):
    match = r'Invalid final_fc_layer str: ".*" provided! The model has the layers \[\'0\', \'1\', '
    with refused(model, InvalidArgumentError, match):
        make(method, model, final_fc_layer=layer)


@pytest.mark.parametrize("method", OF_ONE_LAYER)
def test_a_last_layer_of_another_kind_is_refused(refused, method):
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    with refused(model, InvalidArgumentError, "`final_fc_layer` must be a linear layer"):
        make(method, model, final_fc_layer="0")


@pytest.mark.parametrize("method", OF_ONE_LAYER)
def test_the_last_layers_methods_need_a_loss(model, refused, method):
    with refused(model, InvalidArgumentError, "loss function must not be none"):
        make(method, model, loss_fn=None)


@pytest.mark.parametrize("dim", [0, -3])
def test_a_projection_to_nothing_is_refused(model, refused, dim):
    match = f"`projection_dim` must be a positive int or None; got {dim}"
    with refused(model, InvalidArgumentError, match):
        make(TracInCPFastRandProj, model, projection_dim=dim)


# Checkpoints.


@every_method
@pytest.mark.parametrize(
    ("checkpoints", "match"),
    [
        ((), "Invalid checkpoints provided for TracIn class: an empty list"),
        (3, "Invalid checkpoints .* got a int; put a single one into a list"),
        ("no/such/folder", "Invalid checkpoints .* There is no such folder or file"),
    ],
    ids=["empty", "number", "no folder"],
)
def test_what_names_no_checkpoints_is_refused(model, refused, method, checkpoints, match):
    with refused(model, InvalidArgumentError, match):
        make(method, model, checkpoints=checkpoints)


@every_method
def test_a_checkpoint_folder_with_a_foreign_file_is_refused(model, refused, method, tmp_path):
    torch.save(weights(model), tmp_path / "ck1.pt")
    (tmp_path / "notes.txt").write_text("")
    with refused(
        model, InvalidArgumentError, r"holds files that are not checkpoints: \['notes.txt'\]"
    ):
        make(method, model, checkpoints=tmp_path)


@every_method
def test_a_second_checkpoint_of_another_model_is_refused_when_it_is_reached(model, refused, method):
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).state_dict()
    explainer = make(method, model, checkpoints=[weights(model), other])
    match = r"checkpoint in memory does not fit the model: .*'0.weight: \[5, 3\] where the model"
    with refused(model, InvalidArgumentError, match):
        all_scores(explainer)


def load_nothing(model, checkpoint):
    model.load_state_dict(checkpoint)


def load_nan(model, checkpoint):
    model.load_state_dict(checkpoint, assign=True)
    return float("nan")


def load_and_fail(model, checkpoint):
    model.load_state_dict(checkpoint, assign=True)
    model.eval()
    raise OSError("the disk is gone")


@every_method
@pytest.mark.parametrize(
    ("load", "error", "match"),
    [
        (load_nothing, InvalidArgumentError, "`checkpoints_load_func` returned None for ch"),
        (load_nan, InvalidArgumentError, "returned nan for checkpoint 0; .* a finite number"),
        (load_and_fail, OSError, "the disk is gone"),
    ],
)
def test_a_load_function_that_fails_leaves_the_model_as_it_was(
    model, refused, method, load, error, match
):
    explainer = make(method, model, checkpoints_load_func=load)
    with refused(model, error, match):
        all_scores(explainer)


@pytest.mark.parametrize("method", [TracInCP, TracInCPFast, TracInCPFastRandProj])
def test_vectors_of_a_negative_learning_rate_are_refused(model, refused, method):
    checkpoints = [weights(model), {**model.state_dict(), "learning_rate": -0.5}]
    explainer = make(method, model, checkpoints=checkpoints)
    match = "checkpoint 1 has the negative learning rate -0.5"
    with refused(model, InvalidArgumentError, match):
        explainer.compute_intermediate_quantities(TEST)


# Training data.


BATCH_SIZES = [
    (None, "since the `train_dataset` argument was a `Dataset`, `batch_size` must be an int"),
    (0, '`batch_size` must be a positive int or "auto"; got 0'),
    (-4, '`batch_size` must be a positive int or "auto"; got -4'),
    ("x", "`batch_size` must be a positive int or \"auto\"; got 'x'"),
    (2.5, '`batch_size` must be a positive int or "auto"; got 2.5'),
    (True, '`batch_size` must be a positive int or "auto"; got True'),
]


@in_turn("method, case", METHODS, BATCH_SIZES)
def test_a_batch_size_that_is_no_count_is_refused(model, refused, method, case):
    size, match = case
    with refused(model, InvalidArgumentError, match):
        make(method, model, batch_size=size)


@every_method
def test_a_training_loader_that_shuffles_is_refused(model, refused, method):
    loader = DataLoader(DATA, batch_size=4, shuffle=True)
    match = r"`train_dataset` is a DataLoader that shuffles \(RandomSampler\)"
    with refused(model, InvalidArgumentError, match):
        make(method, model, train=loader)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@in_turn(
    "method, k, train",
    [TracInCP, TracInCPFast, GradDot, GradCos],
    [None, 2],
    [EMPTY, DataLoader(EMPTY), Nothing(), []],
)
def test_a_training_set_without_examples_is_refused(model, refused, method, k, train):
    explainer = make(method, model, train=train)
    with refused(model, InvalidArgumentError, "there are no examples: the data set or loader is"):
        explainer.influence(TEST, k=k)


def test_a_training_set_without_examples_has_no_self_influence(model, refused):
    explainer = make(TracInCP, model, train=EMPTY)
    with refused(model, InvalidArgumentError, "there are no examples: the data set or loader is"):
        explainer.self_influence()


@pytest.mark.parametrize("k", [None, 2])
def test_a_training_set_without_examples_has_no_vectors(model, refused, k):
    explainer = make(TracInCPFastRandProj, model, train=EMPTY)
    with refused(model, InvalidArgumentError, "holds no examples|there are no examples"):
        explainer.influence(TEST, k=k)


# Inputs.


class Table:
    """What looks like a data frame."""

    iloc = None

    def __len__(self):
        return N

    def __getitem__(self, column):
        raise KeyError(column)


INPUTS = {
    "nothing": (None, r"`inputs` argument is required\."),
    "a tensor": (X, "`inputs` must be a batch .* or a DataLoader; got a Tensor"),
    "a number": (3, "`inputs` must be a batch .* or a DataLoader; got a int"),
    "a generator": (
        (batch for batch in [TEST]),
        "`inputs` must be a batch .* or a DataLoader; got a generator: which can be read only once",
    ),
    "a text": ("abc", "`inputs` must be a batch .* got a str: tokenize it"),
    "an array": (X.numpy(), r"`inputs` must be a batch .* got a ndarray: convert it to a tensor"),
    "a table": (Table(), "`inputs` must be a batch .* got a Table: convert its columns to tensors"),
    "a list of dicts": (
        [{"x": X[0], "y": 1}, {"x": X[1], "y": 0}],
        r"`inputs` is a list of 2 dicts with the same keys \['x', 'y'\]; a batch is one dict",
    ),
    "one example": ((X[0], 1), "`inputs` is one example, not a batch: each of its tensors has one"),
    "one example of tensors": ((X[0], Y[0]), "`inputs` is one example, not a batch"),
    "an empty batch": ((X[:0], Y[:0]), r"one row per example; got a tuple of .* shape \[0, 3\]"),
    "no tensors": ((1.0, "a"), "one row per example; got a tuple of a float, a str"),
    "an empty loader": (DataLoader(EMPTY), "`inputs` holds no examples"),
    "a shuffling loader": (
        DataLoader(DATA, shuffle=True),
        r"`inputs` is a DataLoader that shuffles \(RandomSampler\)",
    ),
}
CALLS = {
    "scores": lambda explainer, inputs: explainer.influence(inputs, k=None),
    "best": lambda explainer, inputs: explainer.influence(inputs, k=2),
    "vectors": lambda explainer, inputs: explainer.compute_intermediate_quantities(inputs),
}


@in_turn("method, call, name", METHODS, CALLS, INPUTS)
def test_inputs_that_are_no_examples_are_refused(model, refused, method, call, name):
    inputs, match = INPUTS[name]
    explainer = make(method, model)
    with refused(model, InvalidArgumentError, match):
        CALLS[call](explainer, inputs)


@pytest.mark.parametrize("call", ["influence_by_layer", "self_influence"])
@pytest.mark.parametrize("name", [name for name in INPUTS if name != "nothing"])
def test_other_questions_refuse_the_same_inputs(model, refused, call, name):
    inputs, match = INPUTS[name]
    if (call, name) == ("self_influence", "an empty loader"):
        match = "there are no examples"
    explainer = make(TracInCP, model)
    with refused(model, InvalidArgumentError, match):
        getattr(explainer, call)(inputs)


def test_scores_by_layer_need_inputs(model, refused):
    explainer = make(TracInCP, model)
    with refused(model, InvalidArgumentError, r"`inputs` argument is required\."):
        explainer.influence_by_layer(None)


@every_method
@pytest.mark.parametrize(
    ("k", "error", "match"),
    [
        (-1, InvalidArgumentError, "k must not be negative; got -1"),
        (2.0, TypeError, r"k must be an int or None; got 2\.0 of type float"),
        (True, TypeError, "k must be an int or None; got True of type bool"),
        ("3", TypeError, "k must be an int or None; got '3' of type str"),
    ],
)
def test_a_k_that_is_no_count_is_refused(model, refused, method, k, error, match):
    explainer = make(method, model)
    with refused(model, error, match):
        explainer.influence(TEST, k=k)


def test_projected_vectors_have_no_self_influence(model, unchanged):
    explainer = make(TracInCPFastRandProj, model)
    match = "self influence is not computed from projected vectors: `TracInCPFast.self_influence`"
    with (
        unchanged(model),
        pytest.warns(UserWarning, match=match),
        pytest.raises(NotImplementedError, match=match),
    ):
        explainer.self_influence()


# Losses.


@pytest.mark.parametrize(
    ("reduction", "flag", "words"),
    [("none", True, '"sum" or "mean"'), ("mean", False, '"none"'), ("sum", False, '"none"')],
)
@pytest.mark.parametrize("name", ["loss_fn", "test_loss_fn"])
def test_a_reduction_that_does_not_fit_captums_flag_is_refused(
    model, refused, reduction, flag, words, name
):
    fits = nn.CrossEntropyLoss(reduction="sum" if flag else "none")
    losses = {"loss_fn": fits, name: nn.CrossEntropyLoss(reduction=reduction)}
    match = f"reduction for `{name}` must be {words} when `sample_wise_grads_per_batch` is {flag}"
    with refused(model, InvalidArgumentError, match):
        make(TracInCP, model, sample_wise_grads_per_batch=flag, **losses)


class Declares:
    """A loss that declares another reduction than it makes."""

    def __init__(self, reduction, made):
        self.reduction, self.made = reduction, made

    def __call__(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction=self.made)


def interrupted(outputs, targets):
    raise KeyboardInterrupt("Ctrl-C")


def mixes(outputs, targets):
    return F.cross_entropy(outputs - outputs.mean(0), targets, reduction="none")


LOSSES = {
    "no tensor": (lambda o, t: 1.0, InvalidArgumentError, "`loss_fn` must return a tensor; got a"),
    "second dimension": (
        lambda o, t: F.cross_entropy(o, t, reduction="none").unsqueeze(0),
        InvalidArgumentError,
        "`loss_fn` returned a tensor of shape .* its first dimension must count the examples",
    ),
    "hidden reduction": (
        Declares("none", "mean"),
        InvalidArgumentError,
        "Loss function is applying a reduction. `loss_fn` was declared to return one loss per",
    ),
    "other reduction": (
        Declares("sum", "mean"),
        InvalidArgumentError,
        "`loss_fn` is not a sum over examples",
    ),
    "no reduction": (
        Declares("mean", "none"),
        InvalidArgumentError,
        "`loss_fn` was declared to return the mean over the batch and returned a tensor of shape",
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64)),
        InvalidArgumentError,
        "`loss_fn` is not a mean over examples",
    ),
    "plain class weights": (
        lambda o, t: F.cross_entropy(o, t, torch.tensor([1.0, 3.0], dtype=torch.float64)),
        InvalidArgumentError,
        "`loss_fn` is not a sum or mean over examples",
    ),
    "mixed examples": (mixes, InvalidArgumentError, "the loss mixes the examples of a batch"),
    "a user's error": (interrupted, KeyboardInterrupt, "Ctrl-C"),
}


@in_turn("method, name", METHODS, LOSSES)
def test_a_loss_that_has_none_by_example_is_refused(model, refused, method, name):
    loss_fn, error, match = LOSSES[name]
    explainer = make(method, model, loss_fn=loss_fn)
    with refused(model, error, match):
        all_scores(explainer)


class Returns(nn.Module):
    """A model whose output is no tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return {"logits": self.layer(x)}


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (TEST, "without a `loss_fn` the model's output is differentiated and must be a tensor"),
        ({"x": X[:4]}, "the model returned a dict without a loss; put the labels into the batch"),
    ],
    ids=["tuple", "dict"],
)
def test_a_model_without_a_loss_is_refused(refused, batch, match):
    model = Returns()
    explainer = make(TracInCP, model, loss_fn=None)
    with refused(model, InvalidArgumentError, match):
        all_scores(explainer, batch)


# Models without a gradient per example.


def normalizing() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()


@every_method
@pytest.mark.parametrize("running", [True, False], ids=["training", "no running statistics"])
def test_batch_norm_over_the_batch_is_refused(refused, method, running):
    model = normalizing()
    if not running:
        model[1] = nn.BatchNorm1d(4, track_running_stats=False).double()
    explainer = make(method, model, batch_size=4, eval_mode=not running)
    match = r"layer '1' \(BatchNorm1d\) normalizes by the statistics of the batch, .*eval_mode=True"
    with refused(model, InvalidArgumentError, match):
        all_scores(explainer, DataLoader(TensorDataset(*TEST), batch_size=4))


class Centred(nn.Sequential):
    """A model whose outputs depend on the other examples of the batch."""

    def forward(self, x):
        hidden = self[0](x)
        return self[2](self[1](hidden - hidden.mean(0)))


@pytest.mark.parametrize(
    ("inputs", "batch_size"),
    [(TEST, 4), (DataLoader(TensorDataset(*TEST), batch_size=4), "auto")],
    ids=["one batch", "auto"],
)
def test_batch_norm_is_refused_before_one_example_is_run(refused, inputs, batch_size):
    model = normalizing()
    explainer = make(TracInCP, model, batch_size=batch_size, eval_mode=False)
    match = r"layer '1' \(BatchNorm1d\) normalizes by the statistics of the batch"
    with refused(model, InvalidArgumentError, match):
        all_scores(explainer, inputs)


@every_method
def test_a_model_that_mixes_examples_is_refused(model, refused, method):
    model = Centred(*model)
    explainer = make(method, model, loss_fn=nn.CrossEntropyLoss(reduction="none"))
    match = r"for 5 examples together is not the sum of those of each alone. the outputs of an ex"
    with refused(model, InvalidArgumentError, match):
        all_scores(explainer)


class Moody(nn.Sequential):
    """A model that calls its layers otherwise for batches of four."""

    def forward(self, x):
        copies = 2 if len(x) == 4 else 1
        return super().forward(x.repeat(copies, 1))[: len(x)]


@pytest.mark.parametrize("method", [TracInCP, GradDot])
def test_examples_that_stand_elsewhere_in_a_later_batch(model, unchanged, method):
    """The batch is noticed, and the pass starts again in a slower way."""
    loss = nn.CrossEntropyLoss(reduction="none")
    expected = all_scores(make(method, model, loss_fn=loss))
    model = Moody(*model)
    with unchanged(model), pytest.warns(UserWarning, match="batch 1 .*the pass starts again"):
        found = all_scores(make(method, model, loss_fn=loss))
    torch.testing.assert_close(found, expected)


class InPlace(nn.Sequential):
    """A model that fails where gradients are wanted."""

    def forward(self, x):
        self[0].weight.mul_(1)
        return super().forward(x)


class NotAlone(nn.Module):
    """A model of a bare parameter that fails for one example."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))

    def forward(self, x):
        if len(x) < 2:
            raise ValueError("I take two examples or more")
        return x @ self.weight


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (
            lambda model: InPlace(*model),
            RuntimeError,
            "a leaf Variable that requires grad is being",
        ),
        (lambda model: NotAlone(), ValueError, "I take two examples or more"),
    ],
    ids=["in place", "not alone"],
)
def test_a_models_own_errors_are_passed_on(model, refused, build, error, match):
    model = build(model)
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    explainer = make(TracInCP, model, batch_size=4, loss_fn=loss_fn)
    with refused(model, error, match):
        all_scores(explainer, DataLoader(TensorDataset(*TEST), batch_size=4))


# Numbers that are none.


def spoiled(place: int) -> torch.Tensor:
    x = X.clone()
    x[place, 1] = torch.nan
    return x


def named(kind: str, place: int, method) -> str:
    """What the error of a gradient that is not finite must name."""
    layer = "2" if method in OF_ONE_LAYER else "0"
    return (
        rf"the gradient of {kind} example {place} at '{layer}\.weight' \(layer '{layer}'\) is NaN"
    )


@every_method
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("batch_size", "place"), [(2, N - 1), (5, 7), ("auto", 0)])
def test_a_training_example_without_a_finite_gradient_is_named(
    model, refused, method, batch_size, reduction, place
):
    train = TensorDataset(spoiled(place), Y)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    explainer = make(method, model, train=train, loss_fn=loss_fn, batch_size=batch_size)
    with refused(model, NonFiniteError, named("training", place, method)):
        all_scores(explainer)


@pytest.mark.parametrize("place", [0, N - 1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@every_method
def test_a_test_example_without_a_finite_gradient_is_named(
    model, refused, method, reduction, place
):
    explainer = make(method, model, loss_fn=nn.CrossEntropyLoss(reduction=reduction))
    with refused(model, NonFiniteError, named("test", place, method)):
        all_scores(explainer, (spoiled(place), Y))


def test_an_example_without_a_finite_self_influence_is_named(model, refused):
    train = TensorDataset(spoiled(7), Y)
    explainer = make(TracInCP, model, train=train, batch_size=3)
    with refused(model, NonFiniteError, named("training", 7, TracInCP)):
        explainer.self_influence()


def unit_line() -> nn.Module:
    """A line through 0, the gradient of whose output is its input."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def line_scores(model, train, test):
    """Products of inputs, as float32 has them."""
    data = TensorDataset(torch.tensor(train).unsqueeze(1), torch.zeros(len(train)))
    inputs = (torch.tensor(test).unsqueeze(1), torch.zeros(len(test)))
    explainer = TracInCP(model, data, [weights(model)], loss_fn=lambda out, _: out[:, 0])
    return explainer.influence(inputs)


def test_scores_that_overflow_are_told_from_gradients_that_are_not_finite(refused):
    model = unit_line()
    match = r"the score of test example 0 with training example 1 overflows at checkpoint 0"
    with refused(model, NonFiniteError, match):
        line_scores(model, [1.0, 1e18], [1e30])


def test_finite_scores_whose_sum_overflows_are_scores(unchanged):
    model = unit_line()
    with unchanged(model):
        found = line_scores(model, [1e8, 1e8, 1.0], [3e30])
    torch.testing.assert_close(found, torch.tensor([[3e38, 3e38, 3e30]]))


def test_weights_that_are_nan_are_told_with_their_checkpoint(model, refused):
    bad = {key: torch.full_like(value, torch.nan) for key, value in weights(model).items()}
    explainer = make(TracInCP, model, checkpoints=[weights(model), bad])
    with refused(model, NonFiniteError, r"example 0 at .* is NaN or infinite at checkpoint 1"):
        all_scores(explainer)
