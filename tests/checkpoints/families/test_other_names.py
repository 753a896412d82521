"""Families that transformers has under another name: counts, routing, and Kimi-K2 as a folder.

Their other proofs are in test_deepseek_moe.py and test_bailing.py; Kimi-K2 is DeepSeek-V3.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.models.count import count
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record

from . import test_bailing, test_deepseek_moe, tiny


@pytest.mark.parametrize("module", [test_bailing, test_deepseek_moe], ids=["ling", "deepseek"])
def test_counts_and_routing(module, tmp_path):
    if module is test_bailing:
        theirs = test_bailing.build()
        folder = test_bailing.save(theirs, tmp_path / "folder")
    else:
        theirs = tiny.build_deepseek()
        folder = test_deepseek_moe.write(tmp_path / "folder", theirs.state_dict())
    ours = open_checkpoint(folder).model
    biases = [x for name, x in theirs.named_buffers() if name.endswith("bias")]
    assert count(ours.cfg).total == sum(x.numel() for x in (*theirs.parameters(), *biases))
    texts = [Passage(torch.randint(0, tiny.VOCABULARY, (n,))) for n in (19, 7)]
    own, expected = record(ours, texts), record(theirs, texts)
    order, theirs_order = own.experts_TLK.argsort(-1), expected.experts_TLK.argsort(-1)
    for name in ("experts_TLK", "weights_TLK"):
        found = np.take_along_axis(getattr(own, name), order, -1)
        wanted = np.take_along_axis(getattr(expected, name), theirs_order, -1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_kimi_k2_as_a_folder(tmp_path):
    theirs = tiny.build("deepseek_v3")
    tiny.save(theirs, tmp_path / "v3")
    path = tmp_path / "v3" / "config.json"
    fields = {**json.loads(path.read_text()), "model_type": "kimi_k2"}
    path.write_text(json.dumps(fields))
    read = open_checkpoint(tmp_path / "v3")
    assert read.family == "kimi_k2"
    tokens_BS = torch.randint(0, tiny.VOCABULARY, (2, 19))
    torch.testing.assert_close(
        read.model(tokens_BS).logits, theirs(tokens_BS).logits, rtol=1e-4, atol=1e-4
    )
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("v3", "back"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == fields
