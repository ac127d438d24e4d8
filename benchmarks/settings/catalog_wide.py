"""Settings with more inputs than examples, or as many: where the damping decides."""

from functools import partial

from torch import nn

from benchmarks.settings import bags, images, sequences, tables
from benchmarks.settings.data import Data, Sizes
from benchmarks.settings.losses import (
    class_losses,
    log_likelihoods,
    minus_squared_errors,
    squared_errors,
    token_losses,
)
from benchmarks.settings.models.perceptrons import linear, perceptron
from benchmarks.settings.models.small_cnn import small_cnn
from benchmarks.settings.models.transformer import GPT
from benchmarks.settings.recipes import MiniBatches, WarmupCosine
from benchmarks.settings.setting import Loader, Setting
from influence_kit.evaluation import log_odds


def _perceptron(data: Data, hidden: int, layers: int = 1) -> nn.Module:
    return perceptron((data.inputs, *[hidden] * layers, data.outputs))


def _linear(data: Data) -> nn.Module:
    return linear(data.inputs, data.outputs)


def _small_cnn(data: Data) -> nn.Module:
    return small_cnn(data.outputs)


def _small_gpt(data: Data) -> nn.Module:
    return GPT(data.outputs, sequences.WORDS_CONTEXT, layers=2, width=48, heads=4)


def _mnist(name: str, title: str, loader: Loader, hidden: int | None, rate: float) -> Setting:
    """A thousand images."""
    return Setting(
        name=name,
        title=title,
        loader=loader,
        sizes=Sizes(1000, 60),
        network=partial(_perceptron, hidden=hidden) if hidden else _linear,
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=MiniBatches(epochs=20, batch_size=20, learning_rate=rate),
        metrics=("LDS", "AUC"),
        needs="MNIST's four idx files",
        at_once=True,
    )


def _words(name: str, title: str, loader: Loader, sizes: Sizes, needs: str) -> Setting:
    """Features that are 0 or 1, and mostly 0."""
    return Setting(
        name=name,
        title=title,
        loader=loader,
        sizes=sizes,
        network=partial(_perceptron, hidden=32),
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=MiniBatches(epochs=20, batch_size=20, learning_rate=0.3),
        metrics=("LDS", "AUC"),
        needs=needs,
        at_once=True,
    )


WIDE = [
    _words("sparse", "sparse features, MLP 800-32-2", tables.sparse, Sizes(400, 60), ""),
    _words(
        "texts",
        "Shakespeare or WikiText-2 by their words, MLP 800-32-2",
        bags.texts,
        Sizes(520, 60),
        "input.txt, wiki.valid.tokens, wiki.test.tokens",
    ),
    _mnist("mnist-pixels", "MNIST from 0 to 1, MLP 784-64-10", images.mnist_pixels, 64, 0.1),
    _mnist("mnist-normalised", "MNIST standardised, MLP 784-64-10", images.mnist, 64, 0.05),
    _mnist(
        "mnist-lr-1000", "MNIST from 0 to 1, logistic regression", images.mnist_pixels, None, 0.1
    ),
    Setting(
        name="cifar2-cnn",
        title="CIFAR-2 at 16 x 16, CNN of two convolutions",
        loader=images.small_cifar2,
        sizes=Sizes(800, 60),
        network=_small_cnn,
        loss_fn=class_losses,
        measurement=log_odds,
        recipe=MiniBatches(epochs=15, batch_size=20, learning_rate=0.05),
        metrics=("LDS", "AUC"),
        needs="CIFAR-10's batches, or those of its cats and dogs",
    ),
    Setting(
        name="concrete",
        title="strength of concrete, MLP 8-32-1",
        loader=tables.concrete,
        sizes=Sizes(824, 60),
        network=partial(_perceptron, hidden=32),
        loss_fn=squared_errors,
        measurement=minus_squared_errors,
        recipe=MiniBatches(epochs=40, batch_size=32, learning_rate=0.05),
        metrics=("LDS",),
        needs="concrete.data",
        at_once=True,
    ),
    Setting(
        name="concrete-mlp",
        # kronfluence's example of UCI data; it drops the last, smaller batch of an epoch
        title="strength of concrete, MLP 8-128-128-128-1",
        loader=tables.concrete_in_tenths,
        sizes=Sizes(927, 103),
        network=partial(_perceptron, hidden=128, layers=3),
        loss_fn=squared_errors,
        measurement=minus_squared_errors,
        recipe=MiniBatches(epochs=40, batch_size=32, learning_rate=0.03, weight_decay=1e-5),
        metrics=("LDS",),
        needs="concrete.data",
        at_once=True,
    ),
    Setting(
        name="shakespeare-gpt",
        title="Shakespeare by words, GPT 2 x 48, context 32",
        loader=sequences.shakespeare_words,
        sizes=Sizes(990, 60),
        network=_small_gpt,
        loss_fn=token_losses,
        measurement=log_likelihoods,
        # two seeds agree by .7 in rank, and by .1 if the learning rate is constant
        recipe=MiniBatches(
            epochs=6,
            batch_size=32,
            learning_rate=3e-3,
            optimizer="adamw",
            weight_decay=0.01,
            schedule=WarmupCosine(warmup=0.1, floor=0.0),
        ),
        metrics=("LDS",),
        needs="input.txt",
    ),
]
