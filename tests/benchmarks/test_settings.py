"""Every setting: its files are read, its model trains, losses are one an example."""

import doctest
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from small_files import write_cifar_binary, write_maestro, write_mnist, write_tokenizer

import influence_kit
from benchmarks.settings import SETTINGS, Data, Setting, Sizes, sequences
from benchmarks.settings.catalog import FIELD, OFFLINE
from benchmarks.settings.catalog_wide import WIDE
from benchmarks.settings.models.gpt2 import new_gpt2
from benchmarks.settings.models.resnet9 import resnet9
from benchmarks.settings.models.transformer import GPT, MusicTransformer
from benchmarks.settings.readers import music
from benchmarks.settings.recipes import MiniBatches, Minimum, WarmupCosine, WarmupLine
from influence_kit.errors import InvalidArgumentError

GPT2_SIZES = {"n_positions": 512, "n_embd": 8, "n_layer": 2, "n_head": 2}


def write_shakespeare(folder):
    (folder / "input.txt").write_text("to be, or not to be " * 500)


def write_wikitext(folder):
    tokens = write_tokenizer(folder)
    for part in ("train", "valid"):
        (folder / f"wiki.{part}.raw").write_text(" the cat saw the dog . \n" * 150)
    ends = {"bos_token_id": tokens - 1, "eos_token_id": tokens - 1}
    new_gpt2(tokens, **GPT2_SIZES, **ends).network.save_pretrained(folder)


def write_texts(folder):
    lines = [f"thou art the {number} th of all my lines, good sir" for number in range(1500)]
    (folder / "shakespeare").mkdir()
    (folder / "shakespeare/input.txt").write_text("\n".join(lines))
    (folder / "wikitext-2").mkdir()
    sentence = " the lobster lives in the sea of the north and is a crustacean . "
    for part in ("valid", "test"):
        text = " = Lobster = \n" + sentence * 1000
        (folder / f"wikitext-2/wiki.{part}.tokens").write_text(text)


def write_concrete(folder, count=12):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(count, 9, generator=generator).tolist()
    text = "\n".join("\t".join(f"{value:.3f}" for value in row) for row in rows)
    (folder / "concrete.data").write_text(text)


WRITERS = {
    "mnist-lr": write_mnist,
    "mnist-mlp": write_mnist,
    "cifar2-resnet9": partial(write_cifar_binary, count=10),
    "cifar10-resnet9": write_cifar_binary,
    "maestro-music-transformer": write_maestro,
    "shakespeare-nanogpt": write_shakespeare,
    "wikitext2-gpt2": write_wikitext,
    "wikitext2-gpt2-leaderboard": write_wikitext,
    "texts": write_texts,
    "mnist-pixels": write_mnist,
    "mnist-normalised": write_mnist,
    "mnist-lr-1000": write_mnist,
    "cifar2-cnn": partial(write_cifar_binary, count=10),
    "concrete": write_concrete,
    "concrete-mlp": partial(write_concrete, count=20),
    "shakespeare-gpt": write_shakespeare,
}
# models of the same kind that a test can train
SMALL = {
    "cifar2-resnet9": lambda data: resnet9(data.outputs, width=2),
    "cifar10-resnet9": lambda data: resnet9(data.outputs, width=2),
    "maestro-music-transformer": lambda data: MusicTransformer(data.outputs, 256, 1, 8, 2, 8),
    "shakespeare-nanogpt": lambda data: GPT(data.outputs, 256, 1, 8, 2, dropout=0.2),
}


def small(name: str) -> Setting:
    """The setting with a small model, trained for one epoch where it is by batches."""
    setting = SETTINGS[name]
    setting = replace(setting, network=SMALL.get(name, setting.network))
    if isinstance(setting.recipe, MiniBatches):
        return replace(setting, recipe=replace(setting.recipe, epochs=1))
    return setting


def loaded(name: str, folder) -> Data:
    if name in WRITERS:
        WRITERS[name](folder)
        return SETTINGS[name].load(folder, Sizes(4, 2))
    return SETTINGS[name].load(sizes=Sizes(30, 2))


@pytest.mark.parametrize("module", [music, sequences], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_names_are_those_of_the_registry():
    assert list(SETTINGS) == [setting.name for setting in (*FIELD, *WIDE, *OFFLINE)]
    assert [name for name, setting in SETTINGS.items() if setting.needs] == list(WRITERS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_whole(name, tmp_path):
    setting, data = small(name), loaded(name, tmp_path)
    before = setting.new_model(data, seed=3)
    model = setting.train(data, [0, 1, 3], seed=3)
    assert not model.training
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    measured = setting.measure(model, data.test)
    assert measured.shape == (len(data.test),)
    assert measured.isfinite().all()
    with torch.no_grad():
        losses = setting.loss_fn(model(data.train.tensors[0]), data.train.tensors[1])
    assert losses.shape == (len(data.train),)
    assert (losses >= 0).all()
    # a minimum is the same from any start, up to the tolerance
    again = setting.measure(setting.train(data, [0, 1, 3], seed=3), data.test)
    assert torch.equal(again, setting.measure(model, data.test))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_can_be_attributed(name, tmp_path):
    setting, data = small(name), loaded(name, tmp_path)
    trained = setting.train_with_checkpoints(data, 1)
    method = influence_kit.GradDot(
        trained.model,
        data.train,
        trained.checkpoints,
        layers=setting.layer_names(trained.model),
        loss_fn=setting.loss_fn,
    )
    scores = method.influence(data.test.tensors)
    assert scores.shape == (len(data.test), len(data.train))
    assert scores.abs().sum() > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_function_goes_to_other_processes(name):
    data = SETTINGS["wine-lr"].load() if name in WRITERS else SETTINGS[name].load()
    train = pickle.loads(pickle.dumps(partial(SETTINGS[name].train, data)))
    assert repr(train.func.__self__) == repr(SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_published_figures_are_of_the_metrics(name):
    setting = SETTINGS[name]
    assert {figure.metric for figure in setting.published} <= set(setting.metrics)
    assert all(-1 <= figure.value <= 1 and figure.source for figure in setting.published)
    assert bool(setting.needs) == (name in WRITERS)
    assert not setting.published or setting in FIELD or name == "digits-mlp"


@pytest.mark.parametrize("name", WRITERS)
def test_a_setting_of_files_asks_for_a_folder(name, tmp_path):
    with pytest.raises(InvalidArgumentError, match="name the folder that holds them"):
        SETTINGS[name].load()
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        SETTINGS[name].load(tmp_path)


def test_wide_settings_are_what_they_say(tmp_path):
    for name in ("texts", "mnist-pixels", "mnist-normalised", "cifar2-cnn", "concrete"):
        (tmp_path / name).mkdir()
        WRITERS[name](tmp_path / name)
    texts = SETTINGS["texts"].load(tmp_path / "texts", Sizes(520, 60)).train.tensors
    assert texts[0].shape == (520, 800)
    assert set(texts[0].unique().tolist()) == {0.0, 1.0}
    # "the" is in texts of both kinds, "thou" and "lobster" in those of one
    assert sorted({tuple(row.tolist()) for row in torch.stack([texts[0][:, 0], texts[1]], 1)}) == [
        (1.0, 0.0),
        (1.0, 1.0),
    ]
    pixels = SETTINGS["mnist-pixels"].load(tmp_path / "mnist-pixels", Sizes(4, 2))
    normal = SETTINGS["mnist-normalised"].load(tmp_path / "mnist-normalised", Sizes(4, 2))
    bytes_of = pixels.train.tensors[0] * 255
    torch.testing.assert_close(bytes_of.round(), bytes_of, atol=1e-3, rtol=0)
    assert bytes_of.max() > 200
    torch.testing.assert_close((pixels.train.tensors[0] - 0.1307) / 0.3081, normal.train.tensors[0])
    images = SETTINGS["cifar2-cnn"].load(tmp_path / "cifar2-cnn", Sizes(4, 2)).train.tensors[0]
    whole = SETTINGS["cifar2-resnet9"].load(tmp_path / "cifar2-cnn", Sizes(4, 2)).train.tensors[0]
    blocks = ((whole + 1) / 2).view(4, 3, 16, 2, 16, 2).mean((3, 5))
    torch.testing.assert_close(images, (blocks - 0.47) / 0.25)
    rows = SETTINGS["concrete"].load(tmp_path / "concrete", Sizes(9, 3))
    values = torch.cat([rows.train.tensors[1], rows.test.tensors[1]])
    torch.testing.assert_close(values.std(), torch.tensor(1.0))
    torch.testing.assert_close(values.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_sparse_features_are_rare_and_some_labels_wrong():
    data = SETTINGS["sparse"].load()
    rows, labels = data.train.tensors
    assert rows.shape == (400, 800)
    assert abs(rows.mean() - 0.03) < 0.002
    # the classes differ in their features: the nearer mean of the test rows is the label
    means = torch.stack([rows[labels == label].mean(0) for label in (0, 1)])
    near = torch.cdist(data.test.tensors[0], means).argmin(1)
    assert (near == data.test.tensors[1]).float().mean() > 0.85
    own = torch.cdist(rows, means).argmin(1)
    assert 0.005 < (own != labels).float().mean() < 0.06


def test_a_table_that_is_not_of_concrete_is_refused(tmp_path):
    (tmp_path / "concrete.data").write_text("1 2 3\n4 5 6\n")
    with pytest.raises(InvalidArgumentError, match=r"rows of 3 numbers; .* have 9"):
        SETTINGS["concrete"].load(tmp_path)
    (tmp_path / "concrete.data").write_text("a table\n")
    with pytest.raises(InvalidArgumentError, match="is not a table of numbers"):
        SETTINGS["concrete"].load(tmp_path)


def test_the_split_of_concrete_is_that_of_kronfluences_example(tmp_path):
    write_concrete(tmp_path, count=20)
    rows = np.loadtxt(tmp_path / "concrete.data")
    chosen = np.random.RandomState(0).choice(np.arange(20), 20, replace=False)
    scaler = StandardScaler().fit(rows[chosen[:18]])
    data = SETTINGS["concrete-mlp"].load(tmp_path, Sizes(18, 2))
    for part, own in ((data.train, chosen[:18]), (data.test, chosen[18:])):
        expected = torch.from_numpy(scaler.transform(rows[own])).float()
        torch.testing.assert_close(torch.cat(part.tensors, 1), expected)


def test_shakespeare_by_words_is_read_in_windows_of_one_vocabulary(tmp_path):
    # 35,201 words are read; "rare" is twice among them, and "late" behind them
    (tmp_path / "input.txt").write_text("a rare , " + "to be " * 17_599 + "rare late late late")
    data = SETTINGS["shakespeare-gpt"].load(tmp_path, Sizes(990, 110))
    assert data.vocabulary == ("<unknown>", "be", "to")
    parts = zip(data.train.tensors, data.test.tensors, strict=True)
    inputs, targets = (torch.cat(pair) for pair in parts)
    assert inputs.shape == targets.shape == (1100, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert int((inputs == 0).sum()) == 3
    follows = {(1, 2), (2, 1), (0, 0), (0, 2)}
    pairs = torch.stack([inputs, targets], -1).flatten(0, 1).tolist()
    assert {tuple(pair) for pair in pairs} <= follows


def test_recipes_are_the_published_ones():
    recipes = {name: setting.recipe for name, setting in SETTINGS.items()}
    sgd = partial(MiniBatches, optimizer="sgd")
    assert recipes["mnist-lr"] == sgd(20, 32, 0.01)
    assert recipes["mnist-mlp"] == sgd(50, 64, 0.01, momentum=0.9)
    assert recipes["cifar2-resnet9"] == sgd(10, 64, 0.01, momentum=0.9)
    assert recipes["digits-mlp"] == sgd(20, 64, 0.03, momentum=0.9, weight_decay=1e-3)
    assert recipes["wikitext2-gpt2"] == MiniBatches(3, 8, 5e-5, "adamw", weight_decay=0.01)
    line = WarmupLine(warmup=0.25, floor=0.1)
    leaderboard = MiniBatches(4, 256, 4e-4, "adamw", schedule=line)
    assert recipes["wikitext2-gpt2-leaderboard"] == leaderboard
    assert recipes["concrete-mlp"] == sgd(40, 32, 0.03, weight_decay=1e-5)
    sizes = {name: tuple(setting.sizes) for name, setting in SETTINGS.items()}
    assert sizes["mnist-lr"] == (5000, 500)
    assert sizes["shakespeare-nanogpt"] == (3921, 435)
    assert sizes["wikitext2-gpt2-leaderboard"] == (4608, 50)
    assert sizes["digits-mlp"] == (1437, 100)
    assert sizes["concrete-mlp"] == (927, 103)


def test_checkpoints_are_evenly_spaced_and_end_at_the_model():
    setting = replace(
        SETTINGS["digits-mlp"],
        recipe=MiniBatches(5, 16, 0.1, schedule=WarmupCosine(warmup=0.1, floor=0.5)),
    )
    data = setting.load(sizes=Sizes(32, 2))
    trained = setting.train_with_checkpoints(data, 2, seed=1)
    assert [c["epoch"] for c in trained.checkpoints] == [2, 5]
    assert trained.checkpoints[0]["learning_rate"] > trained.checkpoints[1]["learning_rate"]
    final = trained.model.state_dict()
    assert all(torch.equal(v, final[k]) for k, v in trained.checkpoints[1]["state_dict"].items())
    # a shorter training is the beginning of a longer one, where rates are the same
    plain = replace(setting, recipe=MiniBatches(5, 16, 0.1))
    short = replace(setting, recipe=MiniBatches(2, 16, 0.1)).train(data, seed=1).state_dict()
    start = plain.train_with_checkpoints(data, 2, seed=1).checkpoints[0]["state_dict"]
    assert all(torch.equal(value, short[key]) for key, value in start.items())


def test_checkpoints_of_adam_hold_its_moments():
    recipe = MiniBatches(2, 16, 0.1, "adamw")
    setting = replace(SETTINGS["digits-mlp"], recipe=recipe)
    data = setting.load(sizes=Sizes(32, 2))
    first, last = setting.train_with_checkpoints(data, 2, seed=1).checkpoints
    steps = [float(one["optimizer"]["state"][0]["step"]) for one in (first, last)]
    assert steps == [2, 4]
    plain = replace(setting, recipe=MiniBatches(2, 16, 0.1))
    assert "optimizer" not in plain.train_with_checkpoints(data, 1).checkpoints[0]


def test_no_more_checkpoints_than_epochs():
    setting = SETTINGS["wine-lr"]
    assert len(setting.train_with_checkpoints(setting.load(), 5).checkpoints) == 1


@pytest.mark.parametrize("name", [n for n, setting in SETTINGS.items() if setting.at_once])
def test_models_trained_at_once_are_those_trained_alone(name, tmp_path):
    setting, data = small(name), loaded(name, tmp_path)
    half = len(data.train) // 2
    subsets = [torch.arange(half), torch.arange(half, 2 * half)]
    for model, subset, seed in zip(
        setting.trainer(data).train_many(subsets, [4, 5]), subsets, (4, 5), strict=True
    ):
        alone = setting.train(data, subset, seed).state_dict()
        assert all(torch.allclose(v, alone[k], atol=1e-5) for k, v in model.state_dict().items())


def test_other_recipes_are_not_trained_at_once():
    setting = replace(SETTINGS["wine-lr"], at_once=True)
    with pytest.raises(InvalidArgumentError, match=r"wine-lr is trained by Minimum.*`at_once` out"):
        setting.trainer(setting.load())


def test_layers_are_found_by_patterns(tmp_path):
    setting = SETTINGS["wikitext2-gpt2"]
    model = setting.new_model(loaded(setting.name, tmp_path))
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = [f"network.transformer.h.{block}.{kind}" for block in range(2) for kind in kinds]
    assert setting.layer_names(model) == expected
    with pytest.raises(InvalidArgumentError, match=r"of wikitext2-gpt2 has no layers \['head'\]"):
        replace(setting, layers=("*.c_fc", "head")).layer_names(model)
    assert SETTINGS["mnist-lr"].layer_names(model) is None


def test_gpt2_needs_the_folder_of_its_data(tmp_path):
    data = replace(loaded("wikitext2-gpt2", tmp_path), folder=None)
    with pytest.raises(InvalidArgumentError, match="weights are read from the data's folder"):
        SETTINGS["wikitext2-gpt2"].new_model(data)


def test_large_models_have_the_sizes_of_the_literature(tmp_path):
    def millions(name, data):
        with torch.device("meta"):
            model = SETTINGS[name].network(data)
        return sum(p.numel() for p in model.parameters()) / 1e6

    data = loaded("mnist-lr", tmp_path)
    assert 10.6 < millions("shakespeare-nanogpt", replace(data, outputs=65)) < 10.8
    assert 13 < millions("maestro-music-transformer", replace(data, outputs=390)) < 14


def test_wrong_labels_are_a_share_and_another_class():
    data = SETTINGS["digits-mlp"].load()
    changed, is_wrong = data.with_wrong_labels(0.1, seed=0)
    (images, labels), (same, others) = data.train.tensors, changed.train.tensors
    assert int(is_wrong.sum()) == 144
    assert torch.equal(labels != others, is_wrong)
    assert torch.equal(images, same)
    assert set(others.tolist()) == set(range(10))
    assert not torch.equal(is_wrong, data.with_wrong_labels(0.1, seed=1)[1])


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("diabetes-ridge", 0.1, r"targets of shape \[353, 1\] and type torch.float64 are not one"),
        ("wine-lr", 0.0, r"the share of labels to change is 0.0, not in \(0, 1\)"),
    ],
)
def test_labels_that_cannot_be_changed(name, share, message):
    with pytest.raises(InvalidArgumentError, match=message):
        SETTINGS[name].load().with_wrong_labels(share, 0)


def test_tables_are_standardised_and_split_at_random():
    for name in ("breast-cancer-lr", "wine-lr", "diabetes-ridge"):
        data = SETTINGS[name].load()
        rows = torch.cat([data.train.tensors[0], data.test.tensors[0]])
        assert torch.allclose(rows.mean(0), torch.zeros_like(rows[0]), atol=1e-9)
        assert torch.allclose(rows.std(0), torch.ones_like(rows[0]))
        assert len(data.train) == int(0.8 * len(rows))
    labels = SETTINGS["wine-lr"].load().test.tensors[1]
    assert set(labels.tolist()) == {0, 1, 2}  # sorted by class, they would be one
    assert isinstance(SETTINGS["wine-lr"].recipe, Minimum)
