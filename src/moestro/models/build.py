"""From settings to a model: a decoder or an encoder-decoder."""

from __future__ import annotations

import torch

from moestro.config import EncDecConfig, ModelConfig
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.models.materialize import materialize, without_memory

Model = Decoder | EncDec


def build_model(cfg: ModelConfig | EncDecConfig, backend: str = "auto") -> Model:
    """The model of these settings, with random weights."""
    return EncDec(cfg, backend) if isinstance(cfg, EncDecConfig) else Decoder(cfg, backend)


def new_model(cfg: ModelConfig | EncDecConfig, backend: str = "auto") -> Model:
    """The same on the CPU and in fp32, whatever the default device and dtype."""
    with without_memory():
        model = build_model(cfg, backend)
    materialize(model, torch.float32, "cpu")
    model.reset_parameters()
    return model
