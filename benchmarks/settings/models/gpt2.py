"""GPT-2 of ``transformers``, from a local folder: nothing is downloaded."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.settings.optional import optional
from benchmarks.settings.readers.files import find_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class GPT2(nn.Module):
    """GPT-2: tokens ``[n, t]`` to logits ``[n, t, c]``; position i predicts token i + 1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids, use_cache=False).logits


def pretrained_gpt2(folder: Path) -> GPT2:
    """GPT-2 with the weights of a folder: ``config.json`` and ``model.safetensors``.

    Raises:
        FileNotFoundError: where a file is missing.
        ModuleNotFoundError: where transformers is not installed.
    """
    find_file(folder, ["config.json"], "GPT-2's configuration")
    find_file(folder, WEIGHTS, "GPT-2's weights")
    network = optional("transformers").GPT2LMHeadModel.from_pretrained(
        str(folder), local_files_only=True
    )
    return GPT2(network)


def new_gpt2(tokens: int, **config: Any) -> GPT2:
    """GPT-2 with weights drawn at random; sizes as ``transformers.GPT2Config`` names them."""
    transformers = optional("transformers")
    return GPT2(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=tokens, **config)))
