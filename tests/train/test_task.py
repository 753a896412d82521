import math
import shutil

import pytest
import torch
from torch.nn import functional as F

from moestro.checkpoints.opening import open_checkpoint
from moestro.config import EncDecConfig, ModelConfig, RunConfig
from moestro.data.spans import corrupt, hidden
from moestro.data.windows import HeldOut
from moestro.errors import ConfigError
from moestro.models.count import count
from moestro.models.encdec import START_TOKEN, EncDec
from moestro.text import ByteTokenizer
from moestro.train.distributed import Ranks
from moestro.train.evaluate import evaluate
from moestro.train.loop import Trainer
from moestro.train.task import (
    NEXT_TOKEN,
    FillSpans,
    example_train_flops,
    task_of,
    train_flops,
    vocabulary,
)

T5 = {
    "dim": 16,
    "vocab_size": 257,  # 256 bytes, and the one span that 16 tokens have
    "encoder_layers": 2,
    "decoder_layers": 2,
    "dense": {"hidden_dim": 16, "activation": "relu"},
    "attention": {
        "num_heads": 2,
        "context": 16,
        "positions": {"kind": "relative", "shared": True, "buckets": 8, "max_distance": 12},
    },
    "moe": {"hidden_dim": 16, "num_experts": 4, "top_k": 1, "activation": "relu"},
    "moe_every": 2,
}


@pytest.fixture
def two_sided(tiny_settings):
    """The RunConfig of an encoder-decoder's short run."""

    def make(model=None, **changes) -> RunConfig:
        values = tiny_settings().model_dump()
        values["model"] = T5 | (model or {})
        for part, change in changes.items():
            values[part] = values[part] | change
        return RunConfig(**values)

    return make


def test_the_settings_say_which_kind_a_model_is():
    assert isinstance(RunConfig().model, ModelConfig)
    assert isinstance(RunConfig(model={"dim": 64}).model, ModelConfig)
    for name in ("encoder_layers", "decoder_layers"):
        assert isinstance(RunConfig(model={name: 2}).model, EncDecConfig)
    again = RunConfig(**RunConfig(model=EncDecConfig(encoder_layers=3)).model_dump(mode="json"))
    assert again.model == EncDecConfig(encoder_layers=3)
    with pytest.raises(ConfigError, match=r"model\.num_layers: did you mean encoder_layers"):
        RunConfig(model={"encoder_layers": 2, "num_layers": 2})


def test_next_token():
    windows_BS = torch.randint(0, 256, (3, 17))
    example = NEXT_TOKEN.examples(windows_BS, [()] * 3)
    assert torch.equal(example.inputs[0], windows_BS[:, :-1])
    assert torch.equal(example.targets, windows_BS[:, 1:])
    assert NEXT_TOKEN.predicted(windows_BS) == 3 * 16


def test_fill_spans():
    windows_BS = torch.randint(1, 256, (3, 41))
    task = task_of(EncDecConfig(vocab_size=300), 9)
    places = [("x", row) for row in range(3)]
    example = task.examples(windows_BS, places)
    source_BS, before_BT = example.inputs
    for row, place in enumerate(places):
        want = corrupt(windows_BS[row, :-1].numpy(), 300, 9, place)
        assert source_BS[row].tolist() == want.source.tolist()
        assert example.targets[row].tolist() == want.target.tolist()
        assert before_BT[row].tolist() == [START_TOKEN, *want.target[:-1].tolist()]
    pieces = example.chunk(3)
    assert [len(piece.inputs) for piece in pieces] == [2, 2, 2]
    assert torch.equal(pieces[1].inputs[0], source_BS[1:2])
    assert torch.equal(pieces[2].targets, example.targets[2:])


def test_the_vocabulary_has_room_for_sentinels(two_sided, tiny_corpus, tmp_path):
    assert vocabulary(EncDecConfig(), ByteTokenizer(), 512) == 256 + 26
    assert vocabulary(ModelConfig(), ByteTokenizer(), 512) == 256
    with pytest.raises(ConfigError, match=r"each of 1 hidden spans.*vocab_size = 257"):
        Trainer(two_sided(model={"vocab_size": 256}), tmp_path / "run", tiny_corpus)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_flops_are_those_of_the_count_where_both_sides_are_equally_long(length):
    cfg = EncDecConfig(**T5)
    want = length * count(cfg).train_flops(length)
    assert example_train_flops(cfg, length, length) == pytest.approx(want)
    decoder = ModelConfig()
    assert train_flops(decoder, length) == length * count(decoder).train_flops(length)


def test_flops_of_each_side():
    """Each matrix counted by hand, in the model itself."""
    cfg = EncDecConfig(**(T5 | {"moe": None}))
    per_side = {"source": 0, "target": 0}
    for name, weight in EncDec(cfg).named_parameters():
        if weight.dim() > 1 and "relative" not in name:
            side = "source" if name.startswith("encoder") or ".kv." in name else "target"
            per_side[side] += weight.numel()  # the head is the embedding's matrix
    source, target, width = 17, 5, 16
    scores = 2 * source**2 + 2 * target * source + 2 * target * (target + 1) / 2
    matmul = per_side["source"] * source + per_side["target"] * target
    want = 3 * (2 * matmul + 4 * width * scores)
    assert example_train_flops(cfg, source, target) == pytest.approx(want)
    tokens, spans = hidden(40)
    found = train_flops(cfg, 40)
    assert found == example_train_flops(cfg, 40 - tokens + spans + 1, tokens + spans + 1)


def test_held_out_bits_are_those_of_the_targets_over_the_bytes_hidden(monkeypatch):
    cfg = EncDecConfig(**(T5 | {"vocab_size": 300}))
    model, task = EncDec(cfg).eval(), FillSpans(300, 0)
    windows_NS = torch.randint(1, 256, (5, 41))
    texts = {"a": HeldOut(windows_NS, bytes_per_token=2.0)}
    example = task.examples(windows_NS, [("held out", "a", row) for row in range(5)])
    with torch.no_grad():
        logits = model(*example.inputs).logits
    nats = F.cross_entropy(logits.flatten(0, 1), example.targets.flatten(), reduction="sum")
    want = float(nats) / math.log(2) / (5 * hidden(40).tokens * 2.0)
    for batch_size in (2, 5):
        found = evaluate(model, texts, batch_size, task=task)
        assert found == pytest.approx({"a": want, "all": want}, rel=1e-5)
    monkeypatch.setattr(Ranks, "sum_", lambda self, tensor: tensor)
    parts = [evaluate(model, texts, 2, ranks=Ranks(r, 3), task=task)["a"] for r in range(3)]
    assert sum(parts) == pytest.approx(want, rel=1e-5)


def test_an_encoder_decoder_trains_and_loads(two_sided, tiny_corpus, tmp_path):
    cfg = two_sided(train={"steps": 30, "eval_every": 15, "save_every": 30}, optim={"lr": 1e-2})
    trainer = Trainer(cfg, tmp_path / "run", tiny_corpus)
    result = trainer.train()
    bits = [point.bits_per_byte["all"] for point in result.history]
    assert bits[1] < bits[0]
    assert result.history[0].train_flops == 15 * 4 * train_flops(cfg.model, 16)
    loaded = open_checkpoint(result.checkpoint).model
    assert isinstance(loaded, EncDec)
    assert loaded.cfg == cfg.model
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_resumed_run_ends_where_the_other_does(two_sided, tiny_corpus, tmp_path):
    whole = Trainer(two_sided(), tmp_path / "run", tiny_corpus)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    resumed = Trainer(two_sided(), tmp_path / "run", tiny_corpus)
    assert resumed.train(resume=True).step == 6
    assert torch.equal(weights(whole), weights(resumed))


def test_every_window_of_a_run_has_spans_of_its_own(two_sided, tiny_corpus, tmp_path, monkeypatch):
    seen, examples = [], FillSpans.examples

    def spy(self, windows_BS, places):
        seen.extend(places)
        return examples(self, windows_BS, places)

    monkeypatch.setattr(FillSpans, "examples", spy)
    Trainer(two_sided(train={"steps": 3, "seed": 5}), tmp_path / "run", tiny_corpus).train()
    assert [place for place in seen if place[0] != "held out"] == [(5, n) for n in range(12)]
    held_out = [place for place in seen if place[0] == "held out"]
    assert len(set(held_out)) == len(held_out) > 4


def test_micro_batches_hide_the_same_spans(two_sided, tiny_corpus, tmp_path):
    """Without mixtures, whose losses are each micro-batch's own, the weights end the same."""
    runs = [
        Trainer(
            two_sided(model={"moe": None}, train={"accumulate": pieces}),
            tmp_path / str(pieces),
            tiny_corpus,
        )
        for pieces in (1, 2)
    ]
    for run in runs:
        run.train()
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-3, atol=1e-4)
