"""Folders in Hugging Face's layout: transformers writes, we read and write, transformers reads."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro import Decoder, ModelConfig
from moestro.checkpoints import tensor_files
from moestro.checkpoints.folders import atomic_folder, is_pretrained
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import read_settings
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.errors import CheckpointError, ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {}),
    "llama with biases and scaled positions": (
        "Llama",
        {"attention_bias": True, "rope_parameters": LLAMA3},
    ),
    "mistral, tied, sliding": ("Mistral", {"tie_word_embeddings": True, "sliding_window": 5}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, one layer sliding": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "experts_implementation": "eager"}),
    "mixtral, sliding, yarn": (
        "Mixtral",
        {
            "num_local_experts": 3,
            "experts_implementation": "eager",
            "sliding_window": 6,
            "head_dim": 8,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 16},
        },
    ),
}


def build(name, **changes):
    """A tiny model of transformers, its biases and norms no longer trivial."""
    kind, own = CASES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder, **options)
    return folder


def load_theirs(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


def tensors_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def logits(model, length=21):
    tokens_BS = torch.arange(2 * length).view(2, length) * 7 % 50
    return model(tokens_BS).logits


def assert_close(ours, theirs):
    scale = theirs.abs().max()
    assert scale > 0.5, "logits too small to tell anything"
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral of transformers in several shards."""
    return save(build("mixtral"), tmp_path_factory.mktemp("mixtral"), max_shard_size="10KB")


@pytest.mark.parametrize("shard_bytes", [10_000, 10**9])
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path, name, shard_bytes):
    theirs = build(name)
    size = f"{shard_bytes // 1000}KB"
    folder = save(theirs, tmp_path / "theirs", max_shard_size=size)
    assert (folder / tensor_files.SINGLE).is_file() is (shard_bytes == 10**9)
    assert is_pretrained(folder)
    read = open_checkpoint(folder)
    assert not read.model.training
    assert_close(logits(read.model), logits(theirs))

    back = tmp_path / "back"
    write_pretrained(read.model, back, hf_config=read.hf_config, shard_bytes=shard_bytes)
    assert config_of(back) == config_of(folder)
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(load_theirs(back)), logits(theirs))


@pytest.mark.parametrize("name", CASES)
def test_written_without_the_original_config(tmp_path, name):
    theirs = build(name)
    read = open_checkpoint(save(theirs, tmp_path / "theirs"))
    write_pretrained(read.model, tmp_path / "back", family=read.family)
    again = load_theirs(tmp_path / "back")
    assert torch.equal(logits(again), logits(theirs))
    assert again.config.eos_token_id is None


def test_a_checkpoint_of_mixed_dtypes_says_what_is_rounded(tmp_path, mixtral):
    mixed = tmp_path / "mixed"
    shutil.copytree(mixtral, mixed)
    tensors = {
        key: tensor if key.endswith("norm.weight") else tensor.bfloat16()
        for key, tensor in tensors_of(mixtral).items()
    }
    save_file(tensors, mixed / "model.safetensors")
    with pytest.warns(UserWarning, match=r"rounded to torch.bfloat16.*: model\S*norm.weight"):
        open_checkpoint(mixed)
    for dtype in (torch.float32, torch.bfloat16):  # asked for, so no warning, which would fail here
        norm = open_checkpoint(mixed, dtype=dtype).model.norm.weight
        assert torch.equal(norm.detach(), tensors["model.norm.weight"].to(dtype))


def test_dtypes(tmp_path, mixtral):
    """The checkpoint's is kept, another converted on the way in or out."""
    half = save(load_theirs(mixtral).bfloat16(), tmp_path / "half")
    kept, wide = open_checkpoint(half).model, open_checkpoint(half, dtype=torch.float32).model
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    narrow = open_checkpoint(mixtral, dtype=torch.bfloat16).model.state_dict()
    for key, tensor in kept.state_dict().items():
        assert torch.equal(narrow[key], tensor)
        assert torch.equal(wide.state_dict()[key], tensor.float())
    original = config_of(mixtral)
    write_pretrained(wide, tmp_path / "out", hf_config=original, dtype=torch.bfloat16)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert config_of(tmp_path / "out") == {**original, "dtype": "bfloat16"}


def test_read_config_reads_no_weights(tmp_path, mixtral):
    (tmp_path / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    for path in (tmp_path, tmp_path / "config.json"):
        described = read_settings(path)
        assert described.family.model_type == "mixtral"
        assert described.cfg == open_checkpoint(mixtral).model.cfg
        assert described.fields == config_of(mixtral)


def test_progress_reaches_the_total(mixtral):
    calls = []
    open_checkpoint(mixtral, progress=lambda *call: calls.append(call))
    done, totals = zip(*calls, strict=True)
    total = sum(tensor.nbytes for tensor in tensors_of(mixtral).values())
    assert set(totals) == {total}
    assert list(done) == sorted(done)
    assert done[-1] == total
    assert len(done) == len(tensors_of(mixtral))


def test_gradients_reach_every_parameter(mixtral):
    model = open_checkpoint(mixtral).model.train()
    model(torch.arange(40).view(2, 20)).logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_tied_head_is_one_tensor(tmp_path):
    folder = save(build("qwen3"), tmp_path / "theirs")
    assert "lm_head.weight" not in tensors_of(folder)
    model = open_checkpoint(folder).model
    assert model.head.weight is model.embed.weight
    # Stored all the same, as some publish it.
    path = folder / tensor_files.SINGLE
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    assert torch.equal(open_checkpoint(folder).model.embed.weight, model.embed.weight)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        open_checkpoint(folder)


def test_the_family_is_guessed_or_asked_for(tmp_path, mixtral):
    model = open_checkpoint(mixtral).model
    write_pretrained(model, tmp_path / "guessed")
    assert config_of(tmp_path / "guessed")["model_type"] == "mixtral"
    with pytest.raises(ConfigError, match=r"llama.*moe"):
        write_pretrained(model, tmp_path / "wrong", family="llama")
    with pytest.raises(ConfigError, match="hf_config is of 'mixtral'"):
        write_pretrained(model, tmp_path / "wrong", family="llama", hf_config=config_of(mixtral))
    dense = Decoder(ModelConfig(vocab_size=20, dim=8, attention={"num_heads": 2}))
    with pytest.raises(ConfigError, match=r"fit llama, mistral; choose"):
        write_pretrained(dense, tmp_path / "wrong")
    strange = {"hidden_dim": 8, "num_experts": 4, "router": {"kind": "noisy_top_k"}}
    strange = Decoder(ModelConfig(dim=8, attention={"num_heads": 2}, moe=strange))
    with pytest.raises(ConfigError, match="no family"):
        write_pretrained(strange, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_folder_is_never_overwritten(mixtral, tmp_path):
    model = open_checkpoint(mixtral).model
    write_pretrained(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        write_pretrained(model, tmp_path / "out")


def test_open_model_takes_either_layout(mixtral, tmp_path):
    theirs = open_checkpoint(mixtral)
    assert theirs.family == "mixtral"
    with atomic_folder(tmp_path / "ours") as folder:
        save_model(theirs.model, folder)
    ours = open_checkpoint(tmp_path / "ours", dtype=torch.bfloat16)
    assert (ours.family, ours.hf_config) == (None, None)
    assert ours.model.embed.weight.dtype == torch.bfloat16
    with atomic_folder(tmp_path / "known/checkpoints/step-000001") as folder:
        save_model(theirs.model, folder)
        (folder / "hf_config.json").write_text(json.dumps(theirs.hf_config))
    known = open_checkpoint(tmp_path / "known")
    assert (known.family, known.hf_config) == ("mixtral", theirs.hf_config)
    assert torch.equal(logits(known.model), logits(theirs.model))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_our_own_checkpoints_load_without_random_weights(mixtral, tmp_path):
    """Neither time nor memory goes into weights that are thrown away."""
    model = open_checkpoint(mixtral).model
    with atomic_folder(tmp_path / "ours") as folder:
        save_model(model, folder)
    state = torch.get_rng_state()
    loaded = open_checkpoint(tmp_path / "ours").model
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(loaded), logits(model))
