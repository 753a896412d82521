"""Weights on int4's grid: packed exactly, held by bf16, and better than the nearest."""

import pytest
import torch

from moestro.checkpoints.gguf.writing import write_gguf
from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.reading import read_model
from moestro.checkpoints.writing import write_pretrained
from moestro.config import ModelConfig
from moestro.kernels.packing import Format, dequantise, quantise
from moestro.models.decoder import Decoder
from moestro.surgery.layers import Layers
from moestro.surgery.rounding import Care, Moments, on_grid, rounded

from ..checkpoints.families import tiny

TOKENS = torch.randint(0, tiny.VOCABULARY, (40, 33), generator=torch.Generator().manual_seed(4))


def nearest(w_OI, group=32):
    padded_OI = torch.nn.functional.pad(w_OI, (0, -w_OI.shape[1] % group))
    return dequantise(*quantise(padded_OI, Format("int4", group)))[:, : w_OI.shape[1]]


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("rows", [0, 500])
def test_packing_and_bf16_change_nothing_more(rows, group):
    w_OI, moments = torch.randn(40, 100) * 0.02, Moments(100)
    w_OI[3, :32] = 0
    if rows:
        moments.add(torch.randn(rows, 100) @ torch.randn(100, 100))
    made_OI = on_grid(w_OI, moments, group)
    assert torch.equal(nearest(made_OI, group), made_OI)
    assert torch.equal(made_OI.bfloat16().float(), made_OI)
    assert not made_OI[3, :32].any()


def test_outputs_are_closer_than_those_of_the_nearest_weights():
    x_RI = torch.randn(600, 96) @ (torch.randn(96, 96) + 3 * torch.eye(96))
    w_OI, moments = torch.randn(48, 96), Moments(96)
    moments.add(x_RI[:300])
    other_RI = x_RI[300:]
    made_OI = on_grid(w_OI, moments, 32)
    alone_OI = on_grid(w_OI, Moments(96), 32)
    error = {
        name: float((other_RI @ (each_OI - w_OI).T).norm())
        for name, each_OI in (("gptq", made_OI), ("clip", alone_OI), ("near", nearest(w_OI)))
    }
    assert error["gptq"] < 0.8 * error["clip"] < 0.8 * error["near"]


def test_each_care_is_a_choice_and_helps():
    x_RI = torch.randn(600, 96) @ (torch.randn(96, 96) + 3 * torch.eye(96))
    x_RI *= torch.logspace(-0.5, 0.5, 96)[torch.randperm(96)]  # inputs of different size
    w_OI, moments = torch.randn(48, 96), Moments(96)
    moments.add(x_RI[:300])
    cares = (Care(), Care(feedback=False), Care(importance=False, feedback=False))
    made = [on_grid(w_OI, moments, 32, care) for care in (*cares, Care(False, False, False))]
    for each_OI in made:
        assert torch.equal(nearest(each_OI), each_OI)
    outputs = [float((x_RI[300:] @ (each_OI - w_OI).T).norm()) for each_OI in made]
    assert outputs[0] < 0.9 * outputs[1]
    assert outputs[1] < 0.98 * outputs[2]
    weights = [float((each_OI - w_OI).norm()) for each_OI in made]
    assert weights[2] < 0.98 * weights[3]
    assert weights[2] == min(weights)


@pytest.mark.parametrize("group", [32, 64])
def test_the_order_of_a_groups_inputs_does_not_matter(group):
    """The largest come first, wherever they stand."""
    x_RI = torch.randn(600, 100) @ (torch.randn(100, 100) + 3 * torch.eye(100))
    x_RI *= torch.logspace(-0.5, 0.5, 100)[torch.randperm(100)]
    w_OI, moments, moved = torch.randn(48, 100), Moments(100), Moments(100)
    moments.add(x_RI)
    order_I = torch.cat(
        [each[torch.randperm(len(each))] for each in torch.arange(100).split(group)]
    )
    moved.add(x_RI[:, order_I])
    made_OI = on_grid(w_OI, moments, group)
    same = on_grid(w_OI[:, order_I], moved, group).isclose(made_OI[:, order_I])
    assert same.all(1).sum() > 46  # of 48 rows; sums in another order may part a tie


def test_rows_of_a_matrix_are_rounded_each_for_itself(monkeypatch):
    w_OI, moments = torch.randn(50, 64), Moments(64)
    moments.add(torch.randn(300, 64))
    made_OI = on_grid(w_OI, moments, 32)
    monkeypatch.setattr("moestro.surgery.rounding.ROWS", 7)
    assert torch.allclose(on_grid(w_OI, moments, 32), made_OI)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v2", "llama_scaled"])
def test_every_packed_matrix_is_on_the_grid(name, head, tmp_path):
    tiny.save(tiny.build(name), tmp_path / "whole")
    layers = Layers(tmp_path / "whole")
    (tmp_path / "blocks").mkdir()
    made = rounded(layers, TOKENS, 32, tmp_path / "blocks", care=Care(head=head))
    layers.write(made.change, tmp_path / "rounded")
    before, after = (read_model(tmp_path / each) for each in ("whole", "rounded"))
    assert after.cfg.head.tied == (before.cfg.head.tied and not head)
    count, olds = 0, dict(before.named_parameters(remove_duplicate=False))
    for key, new in after.named_parameters(remove_duplicate=False):
        old = olds.pop(key)
        matrix = old.dim() > 1 and "bias" not in key and key.startswith("blocks.")
        matrix = matrix and not any(word in key for word in ("router", "gate.weight", "kv_up"))
        if matrix or (head and key == "head.weight"):
            each = new.detach()
            assert torch.equal(nearest(each.flatten(0, -2)).view_as(each), each), key
            assert not torch.equal(old, new)
            count += 1 if old.dim() == 2 else len(old)
        else:
            assert torch.equal(old, new), key
    assert not olds
    assert count == made.matrices > made.alone


def test_what_is_measured_is_what_is_written_whatever_the_head_was(tmp_path):
    tiny.save(tiny.build("llama_scaled"), tmp_path / "whole")
    layers = Layers(tmp_path / "whole")
    (tmp_path / "blocks").mkdir()
    change = rounded(layers, TOKENS, 32, tmp_path / "blocks").change
    layers.write(change, tmp_path / "rounded")
    again = Layers(tmp_path / "rounded")
    bits = layers.bits(TOKENS, [change, layers.unchanged()])
    assert torch.equal(bits[:1], again.bits(TOKENS, [again.unchanged()]))
    assert not torch.allclose(bits[0], bits[1])


def test_gguf_in_q4_0_holds_the_same_numbers(tmp_path):
    moe = {"hidden_dim": 96, "num_experts": 4, "top_k": 2}
    attention = {"num_heads": 2, "num_kv_heads": 1, "context": 64}
    cfg = ModelConfig(
        vocab_size=tiny.VOCABULARY, dim=64, num_layers=2, attention=attention, moe=moe
    )
    write_pretrained(Decoder(cfg).bfloat16(), tmp_path / "whole", family="mixtral")
    layers = Layers(tmp_path / "whole")
    (tmp_path / "blocks").mkdir()
    layers.write(rounded(layers, TOKENS, 32, tmp_path / "blocks").change, tmp_path / "rounded")
    for name in ("whole", "rounded"):
        model, file = read_model(tmp_path / name, dtype=torch.float32), tmp_path / f"{name}.gguf"
        write_gguf(model, file, family="mixtral", kind="q4_0")
        again = read_model(find_checkpoint(str(file)), dtype=torch.float32)
        parts, others = (
            {key: each for key, each in one.state_dict().items() if not key.startswith("embed")}
            for one in (model, again)
        )
        moved = {key for key, each in parts.items() if not torch.equal(others[key], each)}
        assert not torch.equal(again.embed.weight, model.embed.weight)
        matrices = {key for key, each in parts.items() if each.dim() > 1 and "router" not in key}
        assert moved == (matrices if name == "whole" else set())


def test_moments_are_of_what_each_matrix_multiplies(tmp_path, monkeypatch):
    """With a rounding that keeps the sums: Σ x xᵀ of one expert against a loop."""
    tiny.save(tiny.build("mixtral"), tmp_path)
    found = {}
    monkeypatch.setattr(
        "moestro.surgery.rounding.on_grid",
        lambda w_OI, moments, group, care: found.update({(w_OI.sum().item()): moments}) or w_OI,
    )
    (tmp_path / "blocks").mkdir()
    rounded(Layers(tmp_path), TOKENS, 32, tmp_path / "blocks")
    model = read_model(tmp_path)
    mixture, seen = model.blocks[1].ffn, []
    mixture.experts.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        model(TOKENS[:, :-1])
    x_TD, routing = seen[0]
    rows = routing.experts_R == 2
    x_RD = x_TD[routing.tokens_R[rows]]
    gate_RF, up_RF = (x_RD @ mixture.experts.gate_up[2].T).chunk(2, dim=1)
    inner_RF = torch.nn.functional.silu(gate_RF) * up_RF * routing.weights_R[rows, None]
    moments = found[mixture.experts.down[2].sum().item()]
    assert moments.rows == len(x_RD)
    assert torch.allclose(moments.sums_II, inner_RF.T @ inner_RF, rtol=1e-3, atol=1e-3)
    x_RD = x_RD * routing.weights_R[rows, None]
    moments = found[mixture.experts.gate_up[2].sum().item()]
    assert torch.allclose(moments.sums_II, x_RD.T @ x_RD, rtol=1e-3, atol=1e-3)
