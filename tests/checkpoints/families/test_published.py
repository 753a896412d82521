"""Published settings are read whole, and the models they describe have the published sizes."""

import json

import pytest
import torch

from moestro.checkpoints.families.translate import canonical, to_fields
from moestro.checkpoints.reading import read_settings
from moestro.checkpoints.transfer import unique_tensors
from moestro.config import EncDecConfig
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec

from .published import PUBLISHED as OTHERS
from .published_delta import DELTA_MODELS

PUBLISHED = {**OTHERS, **DELTA_MODELS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_the_published_size(name, tmp_path):
    fields, total = PUBLISHED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    described = read_settings(path)
    assert described.family.model_type == fields["model_type"]
    assert described.fields == fields
    kind = EncDec if isinstance(described.cfg, EncDecConfig) else Decoder
    with torch.device("meta"):
        model = kind(described.cfg)
    # Selection biases count as published, though no gradient moves them.
    assert sum(tensor.numel() for tensor in unique_tensors(model).values()) == total
    assert count(described.cfg).total == total


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_settings_keep_every_field(name, tmp_path):
    """But what they say of quantisation, since weights are written plain, and of a second head."""
    fields, _ = PUBLISHED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    described = read_settings(path)
    written = to_fields(described.family, described.cfg, fields)
    expected = {key: value for key, value in fields.items() if key != "quantization_config"}
    for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        if name in expected:
            expected[name] = 0
    assert written == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_from_our_settings_alone_they_mean_the_same(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED[name][0]))
    described = read_settings(path)
    path.write_text(json.dumps(to_fields(described.family, described.cfg, {})))
    assert canonical(read_settings(path).cfg) == canonical(described.cfg)
