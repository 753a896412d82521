"""Presets: found by name, honest about what they are, and the models that they describe."""

import dataclasses

import pytest
import torch

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import canonical, to_fields, to_settings
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import ConfigError
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.plan.presets import names, preset

from ..checkpoints.families.published_newer import NEWER

# Published in layouts that no family here reads.
OTHER_LAYOUTS = {"dbrx", "t5"}
COUNTED_ONLY = {"dbrx", "grok-1", "gpt-4-rumour"}


@pytest.mark.parametrize("name", sorted(set(names()) - COUNTED_ONLY))
def test_the_model_holds_what_is_counted(name):
    """Built without memory, up to switch-c-2048's 1.6 trillion parameters."""
    cfg = preset(name).cfg
    with torch.device("meta"):
        model = EncDec(cfg) if isinstance(cfg, EncDecConfig) else Decoder(cfg)
    biases = [b for key, b in model.named_buffers() if key.endswith("router.bias")]
    assert preset(name).count.total == sum(x.numel() for x in (*model.parameters(), *biases))


@pytest.mark.parametrize("name", names())
def test_each_preset_says_where_it_comes_from(name):
    entry = preset(name)
    assert entry.name == name == name.lower()
    assert entry.source
    assert (entry.cfg is None) == (name in COUNTED_ONLY)
    assert entry.rumour == ("rumour" in name)
    made_up = entry.illustrative or entry.rumour
    assert made_up == any(word in entry.note.lower() for word in ("illustrative", "rumour"))


@pytest.mark.parametrize("name", [name for name in names() if preset(name).family in FAMILIES])
def test_a_published_model_can_be_written_as_its_family(name):
    """Its settings survive the way to config.json and back; else `to_fields` names what is lost."""
    entry = preset(name)
    assert to_fields(FAMILIES[entry.family], entry.cfg, {})["model_type"] == entry.family


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("kimi-k2", "Kimi-K2-Instruct"),
        ("glm-4.7-flash", "GLM-4.7-Flash"),
        ("glm-4.5-air", "GLM-4.5-Air"),
        ("glm-4.6", "GLM-4.6"),
        ("minimax-m2", "MiniMax-M2"),
        ("ernie-4.5-21b-a3b", "ERNIE-4.5-21B-A3B-PT"),
        ("granite-3.0-1b-a400m", "granite-3.0-1b-a400m-instruct"),
        ("hunyuan-a13b", "Hunyuan-A13B-Instruct"),
        ("ling-mini-2.0", "Ling-mini-2.0"),
        ("dots.llm1", "dots.llm1.inst"),
        ("llama-4-scout", "Llama-4-Scout-17B-16E"),
        ("llama-4-maverick", "Llama-4-Maverick-17B-128E"),
        ("lfm2-8b-a1b", "LFM2-8B-A1B"),
        ("lfm2-1.2b", "LFM2-1.2B"),
    ],
)
def test_newer_models_are_what_their_config_says(name, published):
    fields = NEWER[published][0]
    assert preset(name).family == fields["model_type"]
    theirs = to_settings(FAMILIES[fields["model_type"]], fields)
    assert canonical(preset(name).cfg) == canonical(theirs)


def test_families_are_known():
    families = {preset(name).family for name in names()} - {None}
    assert families == FAMILIES.keys() | OTHER_LAYOUTS


def test_names_may_be_written_as_papers_do():
    assert preset("Mixtral-8x7B") is preset("mixtral-8x7b")
    assert preset("GLaM-64B/64E") is preset("glam-64b-64e")


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ConfigError, match=r"no preset 'mixtral-8x70b'; did you mean mixtral-8x7b"):
        preset("mixtral-8x70b")
    with pytest.raises(ConfigError, match=r"did you mean gpt-4-rumour\?"):
        preset("gpt-4")
    with pytest.raises(ConfigError, match=r"known: mixtral-8x7b, .*mixture-800b"):
        preset("???")


def test_like_changes_only_what_it_says():
    small, large = preset("gpt-oss-20b"), preset("gpt-oss-120b")
    assert large.cfg.num_layers == 36
    assert large.cfg.moe == small.cfg.moe.model_copy(update={"num_experts": 128})
    assert large.cfg.attention == small.cfg.attention
    assert large.family == small.family == "gpt_oss"


def test_tied_heads_of_t5_are_scaled_by_the_width():
    for name in names():
        cfg = preset(name).cfg
        if isinstance(cfg, EncDecConfig) and cfg.head.tied:
            assert cfg.head.scale == cfg.dim**-0.5, name


def stand_in(dim, layers, vocab, hidden, experts, top_k, **others):
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        attention={"num_heads": 48, "num_kv_heads": 8, "context": 8192},
        moe={"hidden_dim": hidden, "num_experts": experts, "top_k": top_k},
        **others,
    )


def test_what_is_only_counted_counts_like_a_model_of_its_shape():
    """RMSNorm holds as much as DBRX's norms; Grok-1 has two more of them a layer."""
    dbrx = count(stand_in(6144, 40, 100_352, 10_752, 16, 4, head={"tied": False}))
    grok = count(stand_in(6144, 64, 131_072, 32_768, 8, 2, head={"tied": True}))
    norms = 2 * 64 * 6144
    grok = grok._replace(total=grok.total + norms, active=grok.active + norms)
    for name, expected in (("dbrx", dbrx), ("grok-1", grok)):
        given = preset(name).count
        assert given._replace(spans=()) == expected._replace(spans=())
        assert given.attention == expected.attention


def test_the_illustration_differs_in_its_experts_alone():
    dense, mixture = preset("dense-100b"), preset("mixture-800b")
    assert mixture.cfg.model_copy(update={"moe": None}) == dense.cfg
    assert mixture.cfg.moe.hidden_dim == dense.cfg.dense.hidden_dim
    assert dense.illustrative
    assert mixture.illustrative


def test_a_preset_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("gpt-3").name = "gpt-4"
