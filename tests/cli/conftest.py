"""A tiny published checkpoint: weights, tokenizer, chat template, as on the Hugging Face hub."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch

from moestro.checkpoints.writing import write_pretrained
from moestro.config import ModelConfig
from moestro.models.decoder import Decoder

MARKS = ("<s>", "</s>", "<|user|>", "<|reply|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<|user|>"
    "{% elif message.role == 'system' %}[{% else %}<|reply|>{% endif %}{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|reply|>{% endif %}"
)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The folder of a tiny Mixtral with a byte-level tokenizer; <s> begins a prompt."""
    torch.manual_seed(0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({mark: place for place, mark in enumerate(alphabet)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(MARKS))
    begin, end, user, _ = map(inner.token_to_id, MARKS)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    cfg = ModelConfig(
        vocab_size=260,
        dim=16,
        num_layers=2,
        attention={"num_heads": 2, "num_kv_heads": 1, "context": 64, "head_dim": 8},
        moe={"hidden_dim": 24, "num_experts": 4, "top_k": 2},
        head={"tied": False},
    )
    folder = tmp_path_factory.mktemp("published") / "tiny"
    write_pretrained(Decoder(cfg), folder, family="mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"bos_token_id": begin, "eos_token_id": end})
    )
    inner.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": begin, "eos_token_id": [end, user]})
    )
    return folder


@pytest.fixture
def larger(published, tmp_path) -> Path:
    """A copy whose tokenizer has two tokens more than the model: [PAD], special, and <tool>."""
    folder = shutil.copytree(published, tmp_path / "larger")
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens(["[PAD]"])
    inner.add_tokens(["<tool>"])
    inner.save(str(folder / "tokenizer.json"))
    return folder
