"""Models through GGUF and back: the same numbers as through Hugging Face's layout."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.families import tiny

from moestro.checkpoints.gguf.folder import NOTE
from moestro.checkpoints.gguf.header import read
from moestro.checkpoints.gguf.writing import NETWORKS, write_gguf
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.packed_files import default_path
from moestro.checkpoints.quantize import AS_STORED
from moestro.checkpoints.reading import read_settings
from moestro.config import ModelConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.kernels import native_cpu
from moestro.models.build import build_model
from moestro.models.decoder import Decoder
from moestro.moe.packed import Packed, PackedStack

WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
FOUR = {"num_attention_heads": 4, "num_key_value_heads": 4}
# Forms of tiny.TINY that llama.cpp has a network for, with widths that blocks of 32 divide.
FORMS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mixtral_window": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {"moe_intermediate_size": 32},
    "olmoe": FOUR,
    "qwen2_moe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "deepseek_v2": {"moe_intermediate_size": 32, **FOUR},
    "deepseek_v2_lite": {"moe_intermediate_size": 32, **FOUR},
    "deepseek_v3": {"moe_intermediate_size": 32, **FOUR},
    "gpt_oss_even": {},
    "glm4_moe": {"moe_intermediate_size": 32},
    "glm4_moe_air": {"moe_intermediate_size": 32, "head_dim": 16},
    "dots1": {"moe_intermediate_size": 32, "sliding_window": None, **FOUR},
    "minimax_m2": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "ernie4_5_moe": {"moe_intermediate_size": 32},
    "granitemoe": FOUR,
    "hunyuan_v1_moe_plain": {},
    "phimoe": {
        **FOUR,
        "router_jitter_noise": 0.01,
        "rope_parameters": {
            **tiny.TINY["phimoe"][1]["rope_parameters"],
            **dict.fromkeys(
                ("short_factor", "long_factor"), (1.0, 1.1, 1.3, 1.7, 2.0, 3.0, 4.0, 5.0)
            ),
            **dict.fromkeys(("short_mscale", "long_mscale"), 1.25),
        },
    },
    "qwen3_next": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "linear_value_head_dim": 16,
    },
}


def theirs(name: str, folder: Path) -> Path:
    """A tiny model of transformers with wide matrices, saved."""
    kind, changes = tiny.TINY[name]
    tiny.TINY["wide"] = (kind, {**changes, **WIDE, **FORMS[name]})
    try:
        tiny.save(tiny.build("wide"), folder)
    finally:
        del tiny.TINY["wide"]
    return folder


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs(request.param, tmp_path_factory.mktemp("theirs"))


def written(folder: Path, kind: str, target: Path, family: str | None = None) -> Path:
    opened = open_checkpoint(folder)
    assert opened.family is not None
    write_gguf(opened.model, target, family=family or opened.family, kind=kind)
    return target


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_fp32_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    file = written(folder, "f32", tmp_path / "m.gguf")
    ours, back = open_checkpoint(folder), open_checkpoint(file)
    assert back.family == ours.family
    assert read_settings(file).cfg == read_settings(back.folder).cfg
    state = back.model.state_dict()
    close = {"rtol": 0, "atol": 0}
    if back.family == "qwen3_next":  # to gains 1 is added, and of rates the logarithm is taken
        close = {"rtol": 1e-5, "atol": 1e-5}
    for name, tensor in ours.model.state_dict().items():
        torch.testing.assert_close({name: state[name]}, {name: tensor}, **close)
    torch.testing.assert_close(back.model(tokens()).logits, ours.model(tokens()).logits, **close)


def every_second(layers: int, first: int) -> ModelConfig:
    """ERNIE 4.5 with a mixture in every second layer from one on."""
    router = {"selection_bias": True, "renormalize": True}
    experts = {"num_experts": 4, "top_k": 2, "hidden_dim": 32, "shared": {"hidden_dim": 32}}
    return ModelConfig(
        vocab_size=32, dim=32, num_layers=layers, dense_first=first, moe_every=2,
        norm={"eps": 1e-5}, attention={"positions": {"theta": 5e5}},
        moe={**experts, "router": router},
    )  # fmt: skip


@pytest.mark.parametrize(("layers", "first"), [(5, 2), (4, 0)])
def test_dense_layers_after_a_mixture_are_refused(layers: int, first: int, tmp_path: Path) -> None:
    """llama.cpp asks for a mixture in every layer after the first: it does not open such files."""
    model = Decoder(every_second(layers, first))
    with pytest.raises(ConfigError, match=r"dense and comes after the first mixture.*llama\.cpp"):
        write_gguf(model, tmp_path / "m.gguf", family="ernie4_5_moe", kind="f32")
    assert not list(tmp_path.iterdir())


def test_dense_layers_before_the_first_mixture_are_counted(tmp_path: Path) -> None:
    model, file = Decoder(every_second(4, 2)), tmp_path / "m.gguf"
    write_gguf(model, file, family="ernie4_5_moe", kind="f32")
    assert read(file).get(".leading_dense_block_count") == 3
    back = open_checkpoint(file).model.cfg
    assert [layer for layer in range(4) if back.is_moe_layer(layer)] == [3]


@torch.no_grad()
def test_bailing_has_one_tensor_of_queries_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-4.5's network under Ling's names: transformers has no class of it."""
    form = {**FORMS["glm4_moe"], **FOUR, "attention_bias": False}
    monkeypatch.setitem(FORMS, "glm4_moe", {**form, "head_dim": 12})
    with pytest.raises(ConfigError, match="queries are 48 wide and the model 64"):
        written(theirs("glm4_moe", tmp_path / "n"), "f32", tmp_path / "n.gguf", "bailing_moe")
    assert not (tmp_path / "n.gguf").exists()
    monkeypatch.setitem(FORMS, "glm4_moe", {**form, "head_dim": 16})
    ours = open_checkpoint(theirs("glm4_moe", tmp_path / "t")).model
    write_gguf(ours, tmp_path / "m.gguf", family="bailing_moe", kind="f32")
    assert "blk.0.attn_qkv.weight" in {info.name for info in read(tmp_path / "m.gguf").tensors}
    back = open_checkpoint(tmp_path / "m.gguf")
    assert back.family == "bailing_moe"
    assert torch.equal(back.model(tokens()).logits, ours(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_are_kept_bit_by_bit(kind: str, folder: Path, tmp_path: Path) -> None:
    """Packed weights stand for the very numbers that the blocks stand for."""
    file = written(folder, kind, tmp_path / "m.gguf")
    packed = open_checkpoint(file, keep=False).model
    plain = open_checkpoint(file, dtype="fp32").model
    formats = set()
    for path, module in packed.named_modules():
        if not isinstance(module, Packed):
            continue
        formats.add(module.weights.format.kind)
        original = plain.get_submodule(path)
        if isinstance(module, PackedStack):
            for expert in range(module.weights.num_experts):
                up, down = native_cpu.unpack_expert(module.weights, expert)
                assert torch.equal(up, original.gate_up[expert]), path
                assert torch.equal(down, original.down[expert]), path
        else:
            assert torch.equal(native_cpu.unpack_matrix(module.weights), original.weight), path
    assert formats >= {"int4" if kind == "q4_0" else "int8"}
    assert torch.isfinite(packed(tokens()).logits).all()


def test_the_packed_form_is_kept_and_mapped(tmp_path: Path) -> None:
    file = written(theirs("qwen3_moe", tmp_path / "t"), "q4_0", tmp_path / "m.gguf")
    first = open_checkpoint(file)
    assert default_path(first.folder, AS_STORED).is_file()
    assert first.folder == tmp_path / "m.gguf.moestro"
    again = open_checkpoint(file)
    inputs = tokens()
    assert torch.equal(first.model(inputs).logits, again.model(inputs).logits)
    # Another model under the same name is noticed.
    written(theirs("qwen3_moe", tmp_path / "u"), "q8_0", file)
    with pytest.raises(CheckpointError, match="different checkpoint"):
        open_checkpoint(file)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "qwen2_moe"])
def test_transformers_reads_the_same_numbers(name: str, tmp_path: Path) -> None:
    """transformers has a reader of its own for some networks."""
    file = written(theirs(name, tmp_path / "t"), "f32", tmp_path / "m.gguf")
    kind = f"{tiny.TINY[name][0]}ForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its reader of settings takes its own defaults for the width of an expert.
        config = tiny.transformers.AutoConfig.from_pretrained(tmp_path / "t")
        other = getattr(tiny.transformers, kind).from_pretrained(
            tmp_path, gguf_file="m.gguf", dtype=torch.float32, config=config
        )
    ours = open_checkpoint(file).model
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens()).logits, other.eval()(tokens()).logits, rtol=1e-4, atol=1e-4
        )


def test_other_networks_are_refused_by_name(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"'rwkv7' is not read.*qwen3moe"):
        open_checkpoint(tmp_path / "m.gguf")
    assert not (tmp_path / f"m.gguf.moestro/{NOTE}").exists()
    with pytest.raises(ConfigError, match="switch"):
        write_gguf(
            build_model(read_settings(theirs("qwen3", tmp_path / "t")).cfg),
            tmp_path / "n.gguf",
            family="switch_transformers",
            kind="f32",
        )
    assert set(NETWORKS) > {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}


def test_settings_that_gguf_cannot_say_are_refused(tmp_path: Path) -> None:
    cfg = read_settings(theirs("qwen3_moe", tmp_path / "t")).cfg
    changed = cfg.model_copy(update={"norm": cfg.norm.model_copy(update={"kind": "layer"})})
    with pytest.raises(ConfigError, match="GGUF cannot say norm"):
        write_gguf(build_model(changed), tmp_path / "n.gguf", family="qwen3_moe", kind="f32")
    olmoe = read_settings(theirs("olmoe", tmp_path / "o")).cfg
    grouped = olmoe.attention.model_copy(update={"num_kv_heads": 2})
    with pytest.raises(ConfigError, match="as many heads of keys and values"):
        write_gguf(
            build_model(olmoe.model_copy(update={"attention": grouped})),
            tmp_path / "n.gguf",
            family="olmoe",
            kind="f32",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "t"]


def test_a_folder_with_one_file_and_with_two(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = written(theirs("qwen3", tmp_path / "t"), "f32", tmp_path / "m" / "a.gguf")
    assert open_checkpoint(tmp_path / "m").family == "qwen3"
    assert read(file).architecture == "qwen3"
    file.with_name("b.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="holds 2 models"):
        open_checkpoint(tmp_path / "m")
