"""Experts that stay in their file: the bits of those packed in memory, within a budget."""

import os
import sys
import warnings

import pytest
import torch
import transformers

import moestro.hf as hf
from moestro.errors import BackendError, CheckpointError, ConfigError
from moestro.kernels import native_cpu
from moestro.models import budget
from moestro.models.budget import Use

from .zoo import build, experts_of, tokens

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason="no native library on this machine"
)
offloading = sys.modules["moestro.hf.offload"]  # whose name is that of its function
USE = Use(64, tokens=16)


def saved(name, folder, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(name, layers=2, **changes).bfloat16().save_pretrained(folder)
    return folder


def packed_in_memory(folder, kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hf.quantize(model.eval(), kind)
    return model


@pytest.fixture
def tight(monkeypatch):
    """Budgets of one expert of the second mixture and two of the first, whatever is asked for."""

    def fit(needs, _):
        return budget.fit(needs, needs.fixed + 3 * needs.mixtures[0].slab_bytes)

    monkeypatch.setattr(offloading, "fit", fit)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mixtral", "int8"), ("qwen3_moe", "int8"), ("qwen3_moe", "int4"), ("olmoe", "int4"),
        ("qwen2_moe", "int8"), ("deepseek_v3", "bfloat16"), ("gpt_oss", "int8"),
    ],
)  # fmt: skip
def test_the_bits_of_experts_packed_in_memory(tmp_path, tight, name, kind):
    folder, ids = saved(name, tmp_path), tokens(2, 12)
    ours, theirs = hf.offload(folder, "1GiB", kind, texts=USE), packed_in_memory(folder, kind)
    assert type(ours) is type(theirs)
    assert not any(hasattr(module, "down_proj") for module in experts_of(ours))
    assert hf.reads(ours).misses == 0
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))
    assert hf.reads(ours).misses > hf.reads(ours).hits
    assert list(hf.check(ours, ids).ran) == [f"model.layers.{n}.mlp.experts" for n in (0, 1)]


def test_prompts_are_counted_whole_as_transformers_passes_them(tmp_path, monkeypatch):
    folder, seen = saved("mixtral", tmp_path), []

    def fit(needs, memory):
        seen.append(needs.buffers)
        return budget.fit(needs, memory)

    monkeypatch.setattr(offloading, "fit", fit)
    for texts in (Use(64, texts=2), Use(64, texts=2, tokens=128), Use(64, texts=2, tokens=64)):
        hf.offload(folder, "64GiB", texts=texts)
    assert seen[-4] == seen[-2] > seen[-1]


def test_an_amount_is_kept_to_or_refused_with_the_smallest_that_works(tmp_path):
    folder = saved("mixtral", tmp_path)
    with pytest.raises(ConfigError, match=r"1 MiB is too small.*give at least \d+MiB") as refused:
        hf.offload(folder, "1MiB", texts=USE)
    least = str(refused.value).partition("at least ")[2].partition(",")[0]
    ids = tokens()
    with torch.no_grad():
        fits, whole = (hf.offload(folder, each, texts=USE)(ids) for each in (least, "none"))
    assert torch.equal(fits.logits, whole.logits)
    with pytest.raises(ConfigError, match=r"'much' is not a number of bytes.*auto or none"):
        hf.offload(folder, "much")


def test_weights_of_every_token_count_as_they_are_loaded(tmp_path):
    config = transformers.AutoConfig.from_pretrained(saved("mixtral", tmp_path))
    base = offloading._class_of(config)
    narrow = offloading._dense(base, config, {})
    assert narrow.number == 2
    for options in ({"dtype": "float32"}, {"torch_dtype": torch.float32}):
        assert offloading._dense(base, config, options) == (2 * narrow.bytes, 4)


def test_what_cannot_be_offloaded(tmp_path, tight):
    folder = saved("mixtral", tmp_path / "model")
    model = hf.offload(folder, packed=tmp_path / "packed", texts=USE)
    with pytest.raises(BackendError, match="packed weights, which transformers cannot save"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(BackendError, match="cannot be trained"):
        model.train()(tokens())
    with pytest.raises(CheckpointError, match="another form than int4"):
        hf.offload(folder, kind="int4", packed=tmp_path / "packed")
    other = saved("mixtral", tmp_path / "other", num_local_experts=4)
    with pytest.raises(CheckpointError, match="different checkpoint"):
        hf.offload(other, packed=tmp_path / "packed")
    with pytest.raises(BackendError, match="all experts in memory"):
        hf.reads(packed_in_memory(folder, "int8"))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        hf.offload(tmp_path)
    os.truncate(tmp_path / "packed", (tmp_path / "packed").stat().st_size // 2)
    with torch.no_grad(), pytest.raises(CheckpointError, match=r"ends there|written to while"):
        model.eval()(tokens())


def test_no_graph_has_experts_of_a_file(tmp_path, tight):
    """What a compiler sees has no numbers, as tensors of the meta device have none."""
    (first, _) = experts_of(hf.offload(saved("mixtral", tmp_path), texts=USE))
    rows_TD, experts_TK = torch.empty(2, 30, device="meta"), torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad(), pytest.raises(BackendError, match="part of no graph"):
        first(rows_TD, experts_TK, torch.ones(2, 3))
