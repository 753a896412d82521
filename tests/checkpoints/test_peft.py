"""PEFT's format against what is known of it: names, shapes, and ΔW_e = alpha / r · B_e A_e.

test_adapters_peft.py compares with peft itself, where that is installed.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.peft import PEFT_FILE, read_peft, write_peft
from moestro.config import LoraConfig, ModelConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.models.adapters import attach, attached, merge
from moestro.models.decoder import Decoder

E, D, F, N = 3, 8, 6, 2
BODY = {"vocab_size": 11, "dim": D, "num_layers": 1, "attention": {"num_heads": 2}}
MOE = {"num_experts": E, "hidden_dim": F, "top_k": 2}
LAYER = "base_model.model.model.layers.0."


def model(**changes):
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**BODY, "moe": {**MOE, **changes}})).double()


def random_adapters(net, **lora):
    attach(net, LoraConfig(rank=N, alpha=3.0, **lora))
    for adapter in attached(net).values():
        torch.nn.init.normal_(adapter.b)
        adapter.double()
    return net


def merged(net):
    merge(net)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_the_flat_format_has_the_expert_slowest_in_a_and_fastest_in_b(tmp_path):
    net, before = random_adapters(model()), model().state_dict()
    write_peft(net, FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    shapes = {
        "self_attn.q_proj": ([N, D], [D, N]), "self_attn.k_proj": ([N, D], [D, N]),
        "self_attn.v_proj": ([N, D], [D, N]), "self_attn.o_proj": ([N, D], [D, N]),
        "mlp.gate": ([N, D], [E, N]),
        "mlp.experts.base_layer": ([E * N, D], [2 * F, E * N]),
        "mlp.experts": ([E * N, F], [D, E * N]),
    }  # fmt: skip
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
        f"{LAYER}{name}.lora_{letter}.weight": shape
        for name, both in shapes.items()
        for letter, shape in zip("AB", both, strict=True)
    }
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (N, 3.0, "LORA")
    assert config["target_parameters"] == [
        "mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight",
    ]  # fmt: skip
    after = merged(net)
    for name, own in (("mlp.experts.base_layer", "gate_up"), ("mlp.experts", "down")):
        a = stored[f"{LAYER}{name}.lora_A.weight"].view(E, N, -1)
        b = stored[f"{LAYER}{name}.lora_B.weight"].view(-1, N, E)
        path = f"blocks.0.ffn.experts.{own}"
        for expert in range(E):
            delta = 3.0 / N * b[:, :, expert] @ a[expert]
            assert (after[path][expert] - before[path][expert] - delta).abs().max() < 1e-12
    reread = model()
    read_peft(reread, FAMILIES["qwen3_moe"], tmp_path / "a")
    assert max((merged(reread)[name] - after[name]).abs().max() for name in after) < 1e-12


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_an_adapter_for_each_expert_is_the_same_one(family, tmp_path):
    net = random_adapters(model())
    write_peft(net, FAMILIES[family], tmp_path / "a", "base", per_expert=True)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    assert len(experts) == E * 3 * 2
    assert all(tensor.dim() == 2 for tensor in stored.values())
    after, reread = merged(net), model()
    read_peft(reread, FAMILIES[family], tmp_path / "a")
    # What was read as parts is written flat by a diagonal of blocks, and read again.
    write_peft(reread, FAMILIES[family], tmp_path / "b", "base")
    again = model()
    read_peft(again, FAMILIES[family], tmp_path / "b")
    for other in (merged(reread), merged(again)):
        assert max((other[name] - after[name]).abs().max() for name in after) < 1e-12


def test_interleaved_and_transposed_weights_have_factors_in_their_order(tmp_path):
    changes = {"activation": "clamped_swiglu", "experts": {"bias": True}, "router": {"bias": True}}
    net = random_adapters(model(**changes), targets=["experts"])
    write_peft(net, FAMILIES["gpt_oss"], tmp_path / "a", "base")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    b = stored[f"{LAYER}mlp.experts.base_layer.lora_B.weight"].view(2 * F, N, E)
    own = net.blocks[0].ffn.experts.gate_up_adapter.b  # gate rows first
    assert torch.equal(b[0::2].permute(2, 0, 1), own[:, :F])
    assert torch.equal(b[1::2].permute(2, 0, 1), own[:, F:])
    with pytest.raises(ConfigError, match="leave --per-expert out"):
        write_peft(net, FAMILIES["gpt_oss"], tmp_path / "b", "base", per_expert=True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("only", ["gate_up", "down"])
def test_a_lone_wrapper_is_told_by_the_config(only, tmp_path):
    net = random_adapters(model(), targets=["experts"])
    experts = net.blocks[0].ffn.experts
    setattr(experts, f"{'down' if only == 'gate_up' else 'gate_up'}_adapter", None)
    write_peft(net, FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(stored) == {f"{LAYER}mlp.experts.lora_{letter}.weight" for letter in "AB"}
    after, reread = merged(net), model()
    read_peft(reread, FAMILIES["qwen3_moe"], tmp_path / "a")
    assert list(attached(reread)) == [f"blocks.0.ffn.experts.{only}"]
    assert max((merged(reread)[name] - after[name]).abs().max() for name in after) < 1e-12


def test_patterns_and_rslora_scale(tmp_path):
    net = random_adapters(model(), targets=["attention"])
    write_peft(net, FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_rslora": True, "alpha_pattern": {"o_proj": 6.0}}))
    before, after, reread = model().state_dict(), merged(net), model()
    read_peft(reread, FAMILIES["qwen3_moe"], tmp_path / "a")
    scaled = merged(reread)
    for name, factor in (("qkv", N**0.5), ("out", 2 * N**0.5)):
        key = f"blocks.0.attention.{name}.weight"
        expected = before[key] + factor * (after[key] - before[key])
        assert (scaled[key] - expected).abs().max() < 1e-12


def test_numbers_in_16_bits_are_scaled_exactly(tmp_path):
    """Of scales that are no powers of two: one for the layer, or one for each of its matrices."""
    net = random_adapters(model(), targets=["attention"])
    write_peft(net, FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    path, tensors = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / PEFT_FILE
    stored = {name: tensor.bfloat16() for name, tensor in load_file(tensors).items()}
    save_file(stored, tensors)
    config = json.loads(path.read_text()) | {"use_rslora": True, "alpha_pattern": {"v_proj": 5.0}}
    path.write_text(json.dumps(config))
    reread = model()
    read_peft(reread, FAMILIES["qwen3_moe"], tmp_path / "a")
    found = attached(reread)
    for place, names in (("qkv", "qkv"), ("out", "o")):
        expected = torch.cat([
            (5.0 if name == "v" else 3.0) / 2**0.5
            * stored[f"{LAYER}self_attn.{name}_proj.lora_B.weight"].double()
            @ stored[f"{LAYER}self_attn.{name}_proj.lora_A.weight"].double()
            for name in names
        ])  # fmt: skip
        adapter = found[f"blocks.0.attention.{place}.weight"]
        delta = copy.deepcopy(adapter).double().delta()[0]
        assert (delta - expected).norm() < 1e-6 * expected.norm()
    assert found["blocks.0.attention.out.weight"].b.dtype == torch.bfloat16  # as it was stored


def test_the_rank_is_that_of_the_matrices(tmp_path):
    write_peft(random_adapters(model()), FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    for wrong, words in (
        ({"r": 1}, f"self_attn.q_proj has rank {N} in .* and 1 by"),
        ({"rank_pattern": {"mlp.experts.gate_up_proj": 3}}, f"base_layer has rank {N} .* and 3 by"),
        ({"rank_pattern": {"gate.weight": 4}}, f"mlp.gate has rank {N} .* and 4 by"),
    ):
        path.write_text(json.dumps(config | wrong))
        with pytest.raises(CheckpointError, match=words):
            read_peft(model(), FAMILIES["qwen3_moe"], tmp_path / "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", -1), ("r", 2.5), ("r", True), ("r", "8"), ("r", None),
        ("lora_alpha", None), ("lora_alpha", "16"),
        ("rank_pattern", {"(": 3}), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": "8"}), ("alpha_pattern", {"[": 3}),
        ("alpha_pattern", {"q_proj": None}), ("target_parameters", "gate"),
        ("target_parameters", [1]), ("use_rslora", "false"),
    ],
)  # fmt: skip
def test_a_value_that_says_nothing_is_refused_by_its_name(field, value, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | {field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"{field} = .*, which must be "):
        read_peft(model(), FAMILIES["qwen3_moe"], tmp_path)


def test_numbers_that_are_no_adapters_are_refused(tmp_path):
    write_peft(random_adapters(model()), FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    tensors = tmp_path / "a" / PEFT_FILE
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(tensors).items()}, tensors)
    with pytest.raises(CheckpointError, match=r"as torch.int8; read are adapters in float64"):
        read_peft(model(), FAMILIES["qwen3_moe"], tmp_path / "a")


def test_ranks_that_differ_are_named_as_peft_matches_them(tmp_path):
    """By the name of a parameter where `target_parameters` has it, else by that of a module."""
    net = model(shared={"hidden_dim": 4})
    for rank, kinds in ((N, ["attention", "router"]), (4, ["experts"]), (3, ["dense"])):
        attach(net, LoraConfig(rank=rank, targets=kinds))
    write_peft(net, FAMILIES["qwen2_moe"], tmp_path / "a", "base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == N
    assert config["rank_pattern"] == {
        "model.layers.0.mlp.experts.gate_up_proj": 4,
        "model.layers.0.mlp.experts.down_proj": 4,
        "model.layers.0.mlp.shared_expert.gate_proj.weight": 3,
        "model.layers.0.mlp.shared_expert.up_proj.weight": 3,
        "model.layers.0.mlp.shared_expert.down_proj.weight": 3,
    }


def test_an_adapter_of_a_module_that_takes_none_is_said_to_be(tmp_path):
    net = random_adapters(model())
    write_peft(net, FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    tensors = tmp_path / "a" / PEFT_FILE
    known = load_file(tensors)
    none = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(N, D),
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(N, 11),
    }
    save_file(known | none, tensors)
    words = r"changes lm_head, model.embed_tokens: no adapters are taken"
    with pytest.raises(ConfigError, match=words):
        read_peft(model(), FAMILIES["qwen3_moe"], tmp_path / "a")
    other = {f"{LAYER}mlp.other.lora_A.weight": torch.ones(N, D)}
    save_file(known | none | other, tensors)
    with pytest.raises(CheckpointError, match=r"of another model .*takes model\S*mlp.other"):
        read_peft(model(), FAMILIES["qwen3_moe"], tmp_path / "a")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    write_peft(random_adapters(model()), FAMILIES["qwen3_moe"], tmp_path / "a", "base")
    for other in (model(hidden_dim=F + 2), model(num_experts=E + 1)):
        with pytest.raises(CheckpointError, match=r"of another model .*mlp.experts"):
            read_peft(other, FAMILIES["qwen3_moe"], tmp_path / "a")
    with pytest.raises(CheckpointError, match="of another model"):
        read_peft(model(), FAMILIES["gpt_oss"], tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    odd = {
        "use_dora": True, "peft_type": "IA3", "bias": "all", "init_lora_weights": "pissa",
        "alora_invocation_tokens": [1],
    }  # fmt: skip
    for field, value in odd.items():
        path.write_text(json.dumps({**config, field: value}))
        with pytest.raises(ConfigError, match=f"{field} = .* is not read"):
            read_peft(model(), FAMILIES["qwen3_moe"], tmp_path / "a")
    path.write_text(json.dumps({**config, "r": None}))
    with pytest.raises(ConfigError, match="r = None, which must be a whole number"):
        read_peft(model(), FAMILIES["qwen3_moe"], tmp_path / "a")
    path.write_text(json.dumps(config))
    save_file({}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no adapter at all"):
        read_peft(model(), FAMILIES["qwen3_moe"], tmp_path / "a")
