"""Models of the transformers package, weights random: dict batches, the model's own loss."""

from typing import Any

import oracles
import pytest
import torch
from cases import Examples
from contract import assert_close
from torch import Tensor
from torch.nn import functional as F

from influence_kit import TracInCP

transformers = pytest.importorskip("transformers")
N, M, T = 7, 3, 6


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=T, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1
    )
    return transformers.GPT2LMHeadModel(config).double()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=9,
        max_position_embeddings=T,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).double()


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=9,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=T,
    )
    return transformers.LlamaForCausalLM(config).double()


def tokens(n: int, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, 11, (n, T), generator=generator)
    labels = ids.clone()
    if padded:
        for i in range(n):
            labels[i, T - 1 - i % 4 :] = -100
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def classes(n: int, padded: bool) -> dict[str, Tensor]:
    return tokens(n, padded) | {"labels": torch.arange(n) % 3}


def own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's loss on one example alone."""
    return model(**batch).loss


def expected_scores(model: Any, train: Any, test: Any) -> Tensor:
    sides = []
    for batch in (test, train):
        rows = []
        for i in range(len(batch["labels"])):
            total = own_loss(model, oracles.one(batch, i))
            found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
            rows.append(torch.cat([g.flatten() for g in found if g is not None]))
        sides.append(torch.stack(rows))
    return sides[0] @ sides[1].T


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("build", "data"),
    [(gpt2, tokens), (llama, tokens), (bert, classes)],
    ids=["gpt2", "llama", "bert"],
)
@pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
def test_the_models_own_loss(build: Any, data: Any, padded: bool) -> None:
    model = build()
    train, test = data(N, padded), data(M, padded)
    influence = TracInCP(model, Examples(train), [model.state_dict()], batch_size=4)
    # the package's own loss of tokens is computed in float32 whatever the model
    relative = 1e-10 if build is bert else 1e-6
    expected = expected_scores(model.eval(), train, test)
    assert_close(influence.influence(test), expected, relative)


def test_a_loss_of_the_users_on_a_dict() -> None:
    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    model = bert()
    train, test = classes(N, True), classes(M, True)
    influence = TracInCP(model, Examples(train), [model.state_dict()], loss_fn=loss)
    assert_close(influence.influence(test), expected_scores(model.eval(), train, test))


def test_rules_cover_gpt2_whole() -> None:
    """Transposed linear layers, tied head, positions without a batch axis: none by torch.func."""
    model = gpt2()
    influence = TracInCP(model, Examples(tokens(N, True)), [model.state_dict()])
    influence.influence(tokens(M, True))
    assert influence._source.capture.without_rule == []
