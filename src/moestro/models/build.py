"""From settings to a model: a decoder or an encoder-decoder."""

from __future__ import annotations

from moestro.config import EncDecConfig, ModelConfig
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec

Model = Decoder | EncDec


def build_model(cfg: ModelConfig | EncDecConfig, backend: str = "auto") -> Model:
    """The model of these settings, with random weights."""
    return EncDec(cfg, backend) if isinstance(cfg, EncDecConfig) else Decoder(cfg, backend)
