"""Steps on rows of conversations, whose numbers of labels differ."""

import json

import pytest
import torch

from moestro.checkpoints.opening import open_checkpoint
from moestro.config import ChatConfig, DataConfig
from moestro.data.rows import prepare_chats
from moestro.train.loop import Trainer
from moestro.train.metrics import read_metrics

LENGTHS = (1, 2, 3, 5, 7, 9, 11, 13, 14)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A row for each text, with 2 to 15 labels."""
    root = tmp_path_factory.mktemp("rows")
    lines = [{"prompt": "?", "completion": chr(97 + n) * n} for n in LENGTHS]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cfg = DataConfig(
        sources=(str(root / "texts.jsonl"),), seq_len=16, held_out=0.1, chat=ChatConfig(pack=False)
    )
    return prepare_chats(cfg, root / "data"), cfg


def trained(rows, settings, folder, accumulate):
    """One step: all parameters after it, and what was recorded of it."""
    corpus, data = rows
    train = {"steps": 1, "batch_size": 8, "accumulate": accumulate, "dtype": "float64"}
    cfg = settings(
        data=data.model_dump(mode="json"), balance={"switch": 0.0, "z": 0.0},
        train={**settings().train.model_dump(mode="json"), **train}, optim={"warmup": 0.0},
    )  # fmt: skip
    result = Trainer(cfg, folder, corpus).train()
    (record,) = read_metrics(folder / "metrics.jsonl")
    return dict(open_checkpoint(result.checkpoint).model.named_parameters()), record


def test_micro_batches_with_unequal_labels_are_one_batch(rows, tiny_settings, tmp_path):
    """The mean is over the labels of the step. A mean of means would weigh short answers more."""
    labels = (rows[0].batch(0, 8)[:, 1] >= 0).sum(1)
    for pieces in (2, 4):
        assert len({int(part.sum()) for part in labels.chunk(pieces)}) == pieces
    whole, wanted = trained(rows, tiny_settings, tmp_path / "1", 1)
    assert {parameter.dtype for parameter in whole.values()} == {torch.float64}
    for pieces in (2, 4):
        found, record = trained(rows, tiny_settings, tmp_path / str(pieces), pieces)
        for name in ("loss", "grad_norm"):
            assert record[name] == pytest.approx(wanted[name], rel=1e-13)
        for name, parameter in whole.items():
            # AdamW's first step, lr · g / (|g| + 1e-8), multiplies what g is off by 2e5 at most.
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-10)
