"""What the presets count against what was published; papers' misprints are in docs, not here."""

import pytest

from moestro.models.count import count
from moestro.plan.presets import preset

# name: total, active with all embeddings, active without the input embedding.
# Totals are exact where a checkpoint's size or a model card tells (papers give them rounded).
CHECKPOINTS = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744, 38_955_423_744),
    "mixtral-8x22b-v0.3": (140_630_071_296, 39_161_468_928, 38_960_142_336),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280, 1_178_994_688),
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496, 2_618_935_296),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "deepseek-v3.2": (671_877_944_064, 38_403_822_336, 37_477_143_296),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504, 2_378_008_576),
    "qwen2-57b-a14b": (57_408_658_944, 14_249_270_784, 13_704_732_160),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520, 21_568_433_664),
    "qwen3-next-80b-a3b": (79_674_391_296, 3_874_929_408, 3_563_764_480),
    "qwen3.5-35b-a3b": (34_660_610_688, 3_454_988_928, 2_946_429_568),
    "qwen3.5-397b-a17b": (396_346_350_336, 17_349_040_896, 16_331_922_176),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 3_608_307_264),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912, 5_132_849_472),
    "phi-3.5-moe": (41_873_153_344, 6_640_999_744, 6_509_665_600),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
    "glm-4.7-flash": (29_943_393_920, 3_896_766_080, 3_579_571_840),
    "glm-4.5-air": (106_852_251_264, 13_424_129_664, 12_803_372_672),
    "glm-4.6": (352_797_829_024, 33_632_266_144, 32_856_319_904),
    "minimax-m2": (228_689_764_864, 11_030_553_088, 10_415_956_480),
    "ernie-4.5-21b-a3b": (21_825_437_888, 3_352_150_208, 3_352_150_208),
    "granite-3.0-1b-a400m": (1_334_628_352, 428_658_688, 428_658_688),
    "hunyuan-a13b": (80_393_183_232, 12_747_448_320, 12_747_448_320),
    "dots.llm1": (142_774_381_696, 14_016_588_928, 13_393_734_784),
    "ling-mini-2.0": (16_255_643_392, 1_432_973_056, 1_111_060_224),
    "llama-4-scout": (107_769_861_120, 17_172_894_720, 16_138_408_960),
    "llama-4-maverick": (400_711_848_960, 17_184_691_200, 16_150_205_440),
    "lfm2-8b-a1b": (8_339_930_560, 1_557_740_992, 1_557_740_992),
    "lfm2-1.2b": (1_170_340_608, 1_170_340_608, 1_170_340_608),
    "dbrx": (131_596_523_520, 36_469_708_800, 35_853_146_112),
    # Tied: the input embedding is the head, so it is never left out.
    "switch-base-8": (619_339_008, 222_977_280, 222_977_280),
    "switch-base-16": (1_072_397_568, 223_051_008, 223_051_008),
    "switch-base-32": (1_978_514_688, 223_198_464, 223_198_464),
    "switch-base-64": (3_790_748_928, 223_493_376, 223_493_376),
    "switch-base-128": (7_415_217_408, 224_083_200, 224_083_200),
    "switch-base-256": (14_664_154_368, 225_262_848, 225_262_848),
    "switch-large-128": (26_309_291_008, 740_813_824, 740_813_824),
    "switch-xxl-128": (394_543_476_736, 11_016_318_976, 11_016_318_976),
    "switch-c-2048": (1_571_308_972_448, 1_728_326_048, 1_728_326_048),
    "t5-base": (222_903_552, 222_903_552, 222_903_552),
    "t5-large": (737_668_096, 737_668_096, 737_668_096),
    "t5-xxl": (11_135_332_352, 11_135_332_352, 11_003_736_064),
    "llama-2-7b": (6_738_415_616, 6_738_415_616, 6_607_343_616),
    "llama-2-13b": (13_015_864_320, 13_015_864_320, 12_852_024_320),
    "llama-2-70b": (68_976_648_192, 68_976_648_192, 68_714_504_192),
    "mistral-7b": (7_241_732_096, 7_241_732_096, 7_110_660_096),
    "qwen2.5-7b": (7_615_616_512, 7_615_616_512, 7_070_619_136),
    "qwen3-0.6b": (596_049_920, 596_049_920, 596_049_920),
    "qwen3-1.7b": (1_720_574_976, 1_720_574_976, 1_720_574_976),
    "qwen3-8b": (8_190_735_360, 8_190_735_360, 7_568_405_504),
}

# name: (total, active) without any embedding.
NON_EMBEDDING = {
    "mixtral-8x7b": (46_440_648_704, 12_617_781_248),
    "mixtral-8x22b": (140_227_418_112, 38_758_815_744),
    "olmoe-1b-7b": (6_713_116_672, 1_075_972_096),
    "deepseek-moe-16b": (15_956_297_728, 2_409_220_096),
    "deepseek-v2-lite": (15_287_053_824, 2_241_719_808),
    "deepseek-v2": (234_692_858_880, 20_327_224_320),
    "deepseek-v3": (669_173_061_120, 35_698_939_392),
    "ling-mini-2.0": (15_611_817_728, 789_147_392),
    "qwen1.5-moe-a2.7b": (13_693_454_336, 2_066_843_648),
    "qwen3-30b-a3b": (29_909_792_768, 2_730_702_848),
    "qwen3-235b-a22b": (233_848_974_848, 20_946_103_808),
    "qwen3-next-80b-a3b": (79_052_061_440, 3_252_599_552),
}

# As printed: total, active, and under which convention the printed active count comes out.
PRINTED = [
    ("mixtral-8x7b", "47B", "13B", "all"),
    ("mixtral-8x22b", "141B", "39B", "all"),
    ("olmoe-1b-7b", "6.9B", "1.3B", "all"),
    ("deepseek-moe-16b", "16.4B", "2.8B", "all"),
    ("deepseek-v2", "236B", "21B", "all"),
    ("deepseek-v3", "671B", "37B", "output"),
    ("qwen1.5-moe-a2.7b", "14.3B", "2.7B", "all"),
    ("qwen2-57b-a14b", "57B", "14B", "all"),
    ("qwen3-235b-a22b", "235B", "22B", "all"),
    ("qwen3-next-80b-a3b", "80B", None, "all"),
    ("qwen3.5-35b-a3b", "35B", None, "all"),
    ("qwen3.5-397b-a17b", None, "17B", "all"),
    ("gpt-oss-20b", "20.91B", "3.61B", "output"),
    ("gpt-oss-120b", "116.83B", "5.13B", "output"),
    ("phi-3.5-moe", "41.9B", "6.6B", "all"),
    ("ling-mini-2.0", "16.26B", "1.43B", "all"),
    ("kimi-k2", "1T", "32B", "output"),
    ("hunyuan-a13b", "80B", "13B", "all"),
    ("lfm2-8b-a1b", "8.3B", None, "all"),
    ("llama-4-scout", None, "17B", "all"),
    ("llama-4-maverick", "401B", "17B", "all"),
    ("granite-3.0-1b-a400m", "1.3B", "0.4B", "all"),
    ("dbrx", "132B", "36B", "all"),
    ("switch-base-128", "7B", None, "all"),
    ("switch-large-128", "26B", None, "all"),
    ("switch-xxl-128", "395B", None, "all"),
    ("switch-c-2048", "1571B", None, "all"),
    ("st-moe-32b", "269B", None, "all"),
    ("st-moe-l", "4.1B", None, "all"),
    ("gpt-3", "175B", "175B", "all"),
    ("gpt-4-rumour", "1831B", "277B", "all"),
    ("mixture-800b", "800B", None, "all"),
    # GLaM's Table 4, as far as its figures follow from its shapes.
    ("glam-0.1b-64e", "1.9B", None, "all"),
    ("glam-1.7b", "1.7B", "1.7B", "all"),
    ("glam-1.7b-32e", None, "1.878B", "all"),
    ("glam-1.7b-64e", "27B", "1.879B", "all"),
    ("glam-1.7b-128e", "53B", "1.881B", "all"),
    ("glam-8b", "8.7B", "8.7B", "all"),
    ("glam-8b-64e", "143B", "9.8B", "all"),
    ("glam-64b-64e", "1.2T", "96.6B", "all"),
]


def printed(number, like):
    """The number with as many decimals as `like` has, in its unit."""
    unit, digits = {"T": 1e12, "B": 1e9}[like[-1]], like[:-1]
    decimals = len(digits.partition(".")[2])
    return f"{number / unit:.{decimals}f}{like[-1]}"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_counts_to_the_parameter(name):
    total, active, without_input = CHECKPOINTS[name]
    assert preset(name).count.parameters() == (total, active)
    assert preset(name).count.parameters("output")[1] == without_input


@pytest.mark.parametrize("name", NON_EMBEDDING)
def test_counts_without_embeddings(name):
    assert preset(name).count.parameters("none") == NON_EMBEDDING[name]


@pytest.mark.parametrize(("name", "total", "active", "convention"), PRINTED)
def test_printed_figures_come_out(name, total, active, convention):
    cost = preset(name).count
    if total is not None:
        assert printed(cost.total, total) == total
    if active is not None:
        assert printed(cost.parameters(convention)[1], active) == active


@pytest.mark.parametrize(
    ("name", "total", "active", "within"),
    [
        ("glam-0.1b", 130e6, 130e6, 0.07),
        ("glam-0.1b-64e", 1.9e9, 145e6, 0.06),
        ("glam-1.7b-256e", 105e9, 1.886e9, 0.01),
        ("glam-137b", 137e9, 137e9, 0.01),
        ("grok-1", 314e9, 0.25 * 314e9, 0.07),
    ],
)
def test_figures_that_no_shape_gives_exactly(name, total, active, within):
    """The published figure is off from its own shape by more than its rounding."""
    cost = preset(name).count
    assert cost.total == pytest.approx(total, rel=within)
    assert cost.active == pytest.approx(active, rel=within)


def test_st_moe_without_what_the_paper_leaves_out():
    """268,561,940,480 and 4,058,251,264 by matrices and embedding alone, no norms and tables."""
    for name, expected in (("st-moe-32b", 268_561_940_480), ("st-moe-l", 4_058_251_264)):
        cfg = preset(name).cfg
        norms = cfg.dim * (2 * cfg.encoder_layers + 3 * cfg.decoder_layers + 2)
        assert preset(name).count.total - norms - 2 * 32 * cfg.attention.num_heads == expected


def test_switch_c_with_the_heads_of_its_config_json():
    cfg = preset("switch-c-2048").cfg
    wrong = cfg.model_copy(update={"attention": cfg.attention.model_copy(update={"num_heads": 30})})
    assert count(wrong).total == 1_571_261_049_120


def test_switch_xxl_with_the_experts_that_table_9_prints():
    cfg = preset("switch-xxl-128").cfg
    printed_64 = cfg.model_copy(update={"moe": cfg.moe.model_copy(update={"num_experts": 64})})
    assert count(printed_64).total == 201_263_656_960


def test_gpt3_lacks_what_its_note_says():
    """Learned positions, and 5 D biases in each feed-forward network: 0.02 % of the whole."""
    dim, layers, positions = 12_288, 96, 2048
    missing = positions * dim + 5 * dim * layers
    # 12 L D² + 13 L D, embedding, positions, the last norm: GPT-2's arithmetic.
    whole = 12 * layers * dim**2 + 13 * layers * dim + (50_257 + positions + 2) * dim
    assert preset("gpt-3").count.total + missing == whole
    assert missing < 0.001 * whole


def test_well_known_comparisons():
    """GLaM costs half of GPT-3; Switch-Base T5-Base; Mixtral a fifth of Llama 2 70B."""
    glam, gpt3 = (preset(name).count.forward_flops(1024) for name in ("glam-64b-64e", "gpt-3"))
    assert glam == pytest.approx(180e9, rel=0.1)
    assert gpt3 == pytest.approx(350e9, rel=0.02)
    switch, t5 = (preset(name).count.forward_flops(512) for name in ("switch-base-128", "t5-base"))
    assert t5 < switch < 1.01 * t5
    mixtral, llama = preset("mixtral-8x7b").count, preset("llama-2-70b").count
    assert mixtral.active / llama.active == pytest.approx(1 / 5, rel=0.1)
    mixture, dense = preset("mixture-800b").count, preset("dense-100b").count
    assert mixture.total == pytest.approx(800e9, rel=0.001)
    assert mixture.active == pytest.approx(dense.active, rel=0.001)
    assert dense.active == pytest.approx(100e9, rel=0.03)
