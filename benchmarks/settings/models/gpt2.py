"""GPT-2 of ``transformers``, from a local folder: nothing is downloaded."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.settings.optional import optional
from benchmarks.settings.readers.files import find_file
from benchmarks.settings.readers.text import GPT2_FOLDERS

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

    They are in the folder or in ``gpt2`` below it.

    Raises:
        FileNotFoundError: where a file is missing.
        ModuleNotFoundError: where transformers is not installed.
    """
    config = find_file(folder, ["config.json"], "GPT-2's configuration", GPT2_FOLDERS)
    find_file(config.parent, WEIGHTS, "GPT-2's weights")
    model = optional("transformers").GPT2LMHeadModel
    return GPT2(model.from_pretrained(str(config.parent), local_files_only=True))


def new_gpt2(tokens: int, **config: Any) -> GPT2:
    """GPT-2 with weights drawn at random; sizes as ``transformers.GPT2Config`` names them."""
    transformers = optional("transformers")
    return GPT2(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=tokens, **config)))
