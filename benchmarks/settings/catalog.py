"""The settings, by name: those of the field, and those that need no download."""

from dataclasses import replace
from functools import partial

from torch import nn

from benchmarks.settings import images, sequences, tables
from benchmarks.settings.catalog_wide import WIDE
from benchmarks.settings.data import Data, Sizes
from benchmarks.settings.losses import (
    class_losses,
    closeness,
    log_likelihoods,
    squared_losses,
    token_losses,
)
from benchmarks.settings.models.gpt2 import pretrained_gpt2
from benchmarks.settings.models.perceptrons import linear, perceptron
from benchmarks.settings.models.resnet9 import resnet9
from benchmarks.settings.models.transformer import GPT, MusicTransformer
from benchmarks.settings.published import published
from benchmarks.settings.recipes import Loss, MiniBatches, Minimum, WarmupCosine, WarmupLine
from benchmarks.settings.setting import Loader, Setting
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import log_odds

MNIST_FILES = "MNIST's four idx files"
CIFAR_FILES = "CIFAR-10's batches, Python or binary"
# the published settings have these numbers of training and test examples
FIRST = Sizes(5000, 500)


def _linear(data: Data) -> nn.Module:
    return linear(data.inputs, data.outputs)


def _linear_in_double(data: Data) -> nn.Module:
    return linear(data.inputs, data.outputs).double()


def _perceptron(data: Data, hidden: tuple[int, ...], dropout: float = 0.0) -> nn.Module:
    return perceptron((data.inputs, *hidden, data.outputs), dropout)


def _resnet9(data: Data) -> nn.Module:
    return resnet9(data.outputs)


def _gpt(
    data: Data, context: int, layers: int, width: int, heads: int, dropout: float
) -> nn.Module:
    return GPT(data.outputs, context, layers, width, heads, dropout)


def _music_transformer(data: Data) -> nn.Module:
    return MusicTransformer(data.outputs, sequences.MUSIC_CONTEXT)


def _gpt2(data: Data) -> nn.Module:
    if data.folder is None:
        raise InvalidArgumentError("GPT-2's weights are read from the data's folder; it has none")
    return pretrained_gpt2(data.folder)


_RESNET_RECIPE = MiniBatches(epochs=10, batch_size=64, learning_rate=0.01, momentum=0.9)
_GPT2 = Setting(
    name="wikitext2-gpt2",
    title="WikiText-2, GPT-2 fine-tuned, blocks of 512 tokens",
    loader=sequences.wikitext2,
    sizes=Sizes(4656, 481),
    network=_gpt2,
    loss_fn=token_losses,
    measurement=log_likelihoods,
    recipe=MiniBatches(
        epochs=3, batch_size=8, learning_rate=5e-5, optimizer="adamw", weight_decay=0.01
    ),
    metrics=("LDS",),
    needs="wiki.train.raw, wiki.valid.raw, GPT-2's files",
    published=published("wikitext2-gpt2"),
    # all linear layers of the blocks; the embeddings have as many weights as a third of GPT-2
    layers=("*.attn.c_attn", "*.attn.c_proj", "*.mlp.c_fc", "*.mlp.c_proj"),
)

FIELD = [
    Setting(
        name="mnist-lr",
        title="MNIST-10, logistic regression 784-10",
        loader=images.mnist,
        sizes=FIRST,
        network=_linear,
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=MiniBatches(epochs=20, batch_size=32, learning_rate=0.01),
        metrics=("LOO", "LDS", "AUC"),
        needs=MNIST_FILES,
        published=published("mnist-lr"),
        at_once=True,
    ),
    Setting(
        name="mnist-mlp",
        title="MNIST-10, MLP 784-128-64-10 with dropout",
        loader=images.mnist,
        sizes=FIRST,
        network=partial(_perceptron, hidden=(128, 64), dropout=0.1),
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=MiniBatches(epochs=50, batch_size=64, learning_rate=0.01, momentum=0.9),
        metrics=("LOO", "LDS", "AUC"),
        needs=MNIST_FILES,
        published=published("mnist-mlp"),
    ),
    Setting(
        name="cifar2-resnet9",
        title="CIFAR-2 (cats and dogs), ResNet-9",
        loader=images.cifar2,
        sizes=FIRST,
        network=_resnet9,
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=_RESNET_RECIPE,
        metrics=("LDS", "AUC"),
        needs=CIFAR_FILES,
        published=published("cifar2-resnet9"),
    ),
    Setting(
        name="cifar10-resnet9",
        title="CIFAR-10, ResNet-9",
        loader=images.cifar10,
        sizes=FIRST,
        network=_resnet9,
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=_RESNET_RECIPE,
        metrics=("LDS", "AUC"),
        needs=CIFAR_FILES,
        published=published("cifar10-resnet9"),
    ),
    Setting(
        name="maestro-music-transformer",
        title="MAESTRO, Music Transformer 6 x 512, context 256",
        loader=sequences.maestro,
        # MAESTRO 3 has 177 test pieces, version 2 has 178
        sizes=Sizes(5000, 177),
        network=_music_transformer,
        loss_fn=token_losses,
        measurement=log_likelihoods,
        recipe=MiniBatches(
            epochs=20, batch_size=64, learning_rate=1e-4, optimizer="adam", betas=(0.9, 0.98)
        ),
        metrics=("LDS",),
        needs="MAESTRO's table and MIDI files",
        published=published("maestro-music-transformer"),
    ),
    Setting(
        name="shakespeare-nanogpt",
        title="Shakespeare by characters, nanoGPT 6 x 384, context 256",
        loader=sequences.shakespeare,
        sizes=Sizes(3921, 435),
        network=partial(
            _gpt, context=sequences.SHAKESPEARE_CONTEXT, layers=6, width=384, heads=6, dropout=0.2
        ),
        loss_fn=token_losses,
        measurement=log_likelihoods,
        # about nanoGPT's 5,000 steps; it warms up for 100 of them
        recipe=MiniBatches(
            epochs=40,
            batch_size=32,
            learning_rate=1e-3,
            optimizer="adamw",
            weight_decay=0.1,
            betas=(0.9, 0.99),
            schedule=WarmupCosine(warmup=0.02, floor=0.1),
            longest_gradient=1.0,
        ),
        metrics=("LDS",),
        needs="nanoGPT's input.txt",
        published=published("shakespeare-nanogpt"),
    ),
    _GPT2,
    replace(
        _GPT2,
        name="wikitext2-gpt2-leaderboard",
        title="WikiText-2, GPT-2 fine-tuned in large batches, as bergson's leaderboard",
        # its chunks are cut from the text in another way
        sizes=Sizes(4608, 50),
        recipe=MiniBatches(
            epochs=4,
            batch_size=256,
            learning_rate=4e-4,
            optimizer="adamw",
            schedule=WarmupLine(warmup=0.25, floor=0.1),
        ),
        published=published("wikitext2-gpt2-leaderboard"),
    ),
]


def _convex(
    name: str,
    title: str,
    loader: Loader,
    loss_fn: Loss = class_losses,
    measurement: Loss = log_odds,
) -> Setting:
    """A setting that is trained to its minimum, so that leaving one out has one answer."""
    return Setting(
        name=name,
        title=title,
        loader=loader,
        sizes=Sizes(),
        network=_linear_in_double,
        loss_fn=loss_fn,
        measurement=measurement,
        recipe=Minimum(weight_decay=0.01),
        metrics=("LOO", "LDS") if loss_fn is squared_losses else ("LOO", "LDS", "AUC"),
    )


OFFLINE = [
    Setting(
        name="digits-mlp",
        title="digits, MLP 64-64-32-10",
        loader=tables.digits,
        sizes=Sizes(1437, 100),
        network=partial(_perceptron, hidden=(64, 32)),
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=MiniBatches(
            epochs=20, batch_size=64, learning_rate=0.03, momentum=0.9, weight_decay=1e-3
        ),
        metrics=("LDS", "AUC"),
        published=published("digits-mlp"),
        at_once=True,
    ),
    _convex("digits-lr", "digits, logistic regression", tables.digits_in_double),
    _convex("breast-cancer-lr", "breast cancer, logistic regression", tables.breast_cancer),
    _convex("wine-lr", "wine, logistic regression", tables.wine),
    _convex(
        "diabetes-ridge", "diabetes, ridge regression", tables.diabetes, squared_losses, closeness
    ),
    Setting(
        name="help-gpt",
        title="Python's help (pydoc_data.topics), GPT 2 x 48, context 64",
        loader=sequences.help_topics,
        sizes=Sizes(1000, 100),
        network=partial(
            _gpt, context=sequences.HELP_CONTEXT, layers=2, width=48, heads=4, dropout=0.0
        ),
        loss_fn=token_losses,
        measurement=log_likelihoods,
        recipe=MiniBatches(
            epochs=6, batch_size=32, learning_rate=3e-3, optimizer="adamw", weight_decay=0.01
        ),
        metrics=("LDS",),
    ),
]

SETTINGS: dict[str, Setting] = {setting.name: setting for setting in (*FIELD, *WIDE, *OFFLINE)}
