"""Token scores of models of the transformers package: their own loss, padding, kinds of layers."""

from typing import Any

import oracles
import pytest
import torch
from cases import Examples
from contract import assert_close
from torch import Tensor
from torch.nn import functional as F

import influence_kit as ik

transformers = pytest.importorskip("transformers")
N, M, T, VOCABULARY = 6, 3, 6, 11
SIDES = ("train", "test_positions", "test_terms")


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=T, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def batch(n: int, prompt: int = 0) -> dict[str, Tensor]:
    """Padded on the right, without labels at padding and at a prompt."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, VOCABULARY, (n, T), generator=generator)
    labels = ids.clone()
    for i in range(n):
        labels[i, T - i % 3 :] = -100
    mask = (labels != -100).long()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_terms(outputs: Any, given: dict[str, Tensor]) -> Tensor:
    """The loss of predicting each label, divided by their number, ``[1, t]``."""
    labels = given["labels"]
    found = F.cross_entropy(
        outputs.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none"
    )
    return F.pad(found, (1, 0)) / (labels[:, 1:] != -100).sum()


def gradients(model: Any, given: dict[str, Tensor], column: int | None = None) -> Tensor:
    rows = []
    for i in range(len(given["labels"])):
        one = oracles.one(given, i)
        outputs = model(**one)
        total = outputs.loss if column is None else own_terms(outputs, one)[0, column]
        found = torch.autograd.grad(total, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("prompt", [0, 2])
def test_the_models_own_loss(prompt: int) -> None:
    model, train, test = gpt2(), batch(N), batch(M, prompt)
    method = ik.TracInCP(model, Examples(train), [model.state_dict()], batch_size=4)
    g, h = gradients(model, train), torch.stack([gradients(model, test, s) for s in range(T)], 1)
    found = method.influence(test, per_token="test_terms")
    # the package's own loss of tokens is computed in float32 whatever the model
    assert_close(found, torch.einsum("isp,jp->ijs", h, g), 1e-6)
    assert not found[:, :, : 1 + max(0, prompt - 1)].any()
    assert not found.transpose(1, 2)[test["labels"] == -100].any()
    for side in SIDES:
        found = method.influence(test, per_token=side)
        assert_close(found.sum(2), method.influence(test), 1e-10)


def test_padding_has_no_part_in_training_tokens_of_causal_models() -> None:
    """No labelled position sees what follows it, so nothing passes through padding."""
    model, train = gpt2(), batch(N)
    method = ik.TracInCP(model, Examples(train), [model.state_dict()])
    found = method.influence(batch(M), per_token="train")
    padded = train["attention_mask"] == 0
    assert padded.any()
    assert not found.transpose(0, 1).transpose(1, 2)[padded].any()


@pytest.mark.parametrize("side", SIDES)
def test_layers_of_a_language_model(side: str) -> None:
    """By layer, token scores sum to the score of the layer."""
    model, train, test = gpt2(), batch(N), batch(M)
    states = [model.state_dict()]
    for layers in (["transformer.wte"], ["transformer.h.*.mlp"], ["transformer.ln_f"]):
        method = ik.TracInCP(model, Examples(train), states, layers=layers)
        found = method.influence(test, per_token=side)
        assert_close(found.sum(2), method.influence(test), 1e-10)


def test_an_encoder_with_a_head() -> None:
    """The head acts on one position: it is named, and `layers` leaves it out."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=9,
        max_position_embeddings=T,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    train = batch(N) | {"labels": torch.arange(N) % 3}
    test = batch(M) | {"labels": torch.arange(M) % 3}
    method = ik.TracInCP(model, Examples(train), [model.state_dict()])
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias.*classifier\.bias"):
        method.influence(test, per_token="train")
    some = ik.TracInCP(model, Examples(train), [model.state_dict()], layers=["bert.encoder"])
    for side in ("train", "test_positions"):
        found = some.influence(test, per_token=side)
        assert_close(found.sum(2), some.influence(test), 1e-10)
    with pytest.raises(ValueError, match="does not show the term of each token"):
        some.influence(test, per_token="test_terms")


def test_llama_without_norms() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=9,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=T,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    layers = ["model.layers.*.mlp", "model.layers.*.self_attn", "model.embed_tokens", "lm_head"]
    train, test = batch(N), batch(M)
    method = ik.LoGra(
        model, Examples(train), [model.state_dict()], layers=layers, projection_dim=9, damping=0.1
    )
    for side in SIDES:
        found = method.influence(test, per_token=side)
        assert_close(found.sum(2), method.influence(test), 1e-8)


def test_an_error_leaves_no_trace_of_other_readings_of_a_batch() -> None:
    """Three examples of three keys allow several readings, which are tried after an error."""
    model = gpt2()
    terms = ik.TokenLogProbability("token", "position")
    method = ik.TracInCP(model, Examples(batch(N)), [model.state_dict()], test_output_fn=terms)
    test = batch(M) | {"token": torch.arange(M), "position": torch.tensor([0, -1, 1])}
    expected = method.influence(test)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not show the term of each token"):
            method.influence(test, per_token="test_terms")
        for side in ("train", "test_positions"):
            assert_close(method.influence(test, per_token=side).sum(2), expected, 1e-6)
