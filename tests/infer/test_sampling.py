import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import ConfigError, DataError, MoestroError, ShapeError
from moestro.infer.sampling import (
    Past,
    SamplingConfig,
    new_generator,
    next_tokens,
    penalised,
    probabilities,
    stated_sampling,
)

# Few distinct values, so that ties are common; -inf is a masked token.
LOGIT = st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 0.5, 2.0]) | st.floats(-30, 30)
ROW = st.lists(LOGIT, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
CONFIG = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 5.0]),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**63 - 1),
)


def by_definition(row: list[float], sampling: SamplingConfig) -> list[float]:
    """The distribution, one token at a time."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if sampling.temperature == 0:
        return [float(token == order[0]) for token in range(len(row))]
    top = row[order[0]]
    weight = [math.exp((logit - top) / sampling.temperature) for logit in row]
    kept = order[: sampling.top_k]
    total = sum(weight[token] for token in kept)
    chosen: list[int] = []
    for token in kept:
        chosen.append(token)
        if sum(weight[each] for each in chosen) / total >= sampling.top_p:
            break
    total = sum(weight[token] for token in chosen)
    return [weight[token] / total if token in chosen else 0.0 for token in range(len(row))]


@given(ROW, CONFIG)
@settings(max_examples=300, deadline=None)
def test_distribution_is_the_definition(row: list[float], sampling: SamplingConfig) -> None:
    got_BV = probabilities(torch.tensor([row], dtype=torch.float64), sampling)
    want_BV = torch.tensor([by_definition(row, sampling)], dtype=torch.float64)
    # Where a sum meets top_p to the last bit, adding in another order may keep one token more.
    if sampling.top_p < 1 and not torch.equal(got_BV > 0, want_BV > 0):
        share = by_definition(row, sampling.model_copy(update={"top_p": 1.0}))
        smaller = min((got_BV, want_BV), key=lambda p_BV: int((p_BV > 0).sum()))[0]
        reached = math.fsum(p for p, kept in zip(share, smaller > 0, strict=True) if kept)
        assert reached == pytest.approx(sampling.top_p, abs=1e-12)
        return
    torch.testing.assert_close(got_BV, want_BV, rtol=1e-9, atol=1e-15)


@given(ROW, CONFIG)
@settings(max_examples=200, deadline=None)
def test_a_draw_is_possible_and_unmasked(row: list[float], sampling: SamplingConfig) -> None:
    logits_BV = torch.tensor([row], dtype=torch.float64)
    token = int(next_tokens(logits_BV, sampling, [new_generator(sampling)]))
    assert row[token] > -math.inf
    assert probabilities(logits_BV, sampling)[0, token] > 0


@given(ROW, CONFIG)
@settings(max_examples=100, deadline=None)
def test_probabilities_sum_to_one(row: list[float], sampling: SamplingConfig) -> None:
    p_BV = probabilities(torch.tensor([row]), sampling)
    assert p_BV.dtype == torch.float64
    assert float(p_BV.sum()) == pytest.approx(1.0, abs=1e-12)
    assert bool((p_BV >= 0).all())


@given(ROW, st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_top_k_one_equals_greedy(row: list[float], seed: int) -> None:
    logits_BV = torch.tensor([row])
    one = SamplingConfig(temperature=1.0, top_k=1, seed=seed)
    greedy = SamplingConfig(temperature=0.0)
    assert next_tokens(logits_BV, one, [new_generator(one)]) == next_tokens(
        logits_BV, greedy, [new_generator(greedy)]
    )


def test_ties_go_to_the_lower_token() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 3.0, 1.0]])
    assert probabilities(logits_BV, SamplingConfig(temperature=0.0)).tolist() == [[0, 1, 0, 0, 0]]
    two = probabilities(logits_BV, SamplingConfig(temperature=1.0, top_k=2))
    assert two.tolist() == [[0, 0.5, 0.5, 0, 0]]
    half = probabilities(torch.zeros(1, 4), SamplingConfig(temperature=1.0, top_p=0.5))
    assert half.tolist() == [[0.5, 0.5, 0, 0]]


def test_draws_follow_the_distribution() -> None:
    sampling = SamplingConfig(temperature=1.0, top_k=3)
    logits_BV = torch.tensor([0.1, 0.5, 0.1, 0.3]).log().expand(20_000, 4)
    generator = new_generator(sampling)
    tokens_B = next_tokens(logits_BV, sampling, [generator] * 20_000)
    got = torch.bincount(tokens_B, minlength=4) / 20_000
    want = torch.tensor([0.1, 0.5, 0.0, 0.3]) / 0.9
    # Four standard deviations of a share of 20 000 draws.
    assert float((got - want).abs().max()) < 4 * math.sqrt(0.25 / 20_000)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    configs = [SamplingConfig(temperature=1.0, seed=seed) for seed in range(3)]
    together = next_tokens(logits_BV, configs[0], [new_generator(each) for each in configs])
    alone = [
        int(next_tokens(logits_BV[row : row + 1], config, [new_generator(config)]))
        for row, config in enumerate(configs)
    ]
    assert together.tolist() == alone


def test_the_seed_decides() -> None:
    logits_BV = torch.zeros(1, 1000)

    def drawn(seed: int) -> list[int]:
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        generator = new_generator(sampling)
        return [int(next_tokens(logits_BV, sampling, [generator])) for _ in range(4)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_logits_are_left_as_they_were() -> None:
    logits_BV = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    before = logits_BV.clone()
    probabilities(logits_BV, SamplingConfig(temperature=0.7, top_k=2, top_p=0.5))
    assert torch.equal(logits_BV, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_useless_logits_are_named(bad: float, temperature: float) -> None:
    sampling = SamplingConfig(temperature=temperature)
    logits_BV = torch.tensor([[0.0, 1.0], [0.0, bad]])
    with pytest.raises(MoestroError, match=r"row 1 .* NaN or \+inf"):
        next_tokens(logits_BV, sampling, [new_generator(sampling)] * 2)


def test_a_row_with_every_token_masked_is_refused() -> None:
    with pytest.raises(MoestroError, match="masks every token"):
        probabilities(torch.full((1, 3), -math.inf), SamplingConfig())


def test_wrong_shapes_are_refused() -> None:
    sampling = SamplingConfig()
    with pytest.raises(ShapeError, match="batch, vocabulary"):
        probabilities(torch.zeros(3), sampling)
    with pytest.raises(ShapeError, match="batch, vocabulary"):
        probabilities(torch.zeros(1, 3, dtype=torch.int64), sampling)
    with pytest.raises(ShapeError, match="one generator each"):
        next_tokens(torch.zeros(2, 3), sampling, [new_generator(sampling)])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("max_tokens", 0),
        ("seed", -1),
        ("stop", ("",)),
        ("topk", 3),
    ],
)
def test_a_bad_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        SamplingConfig(**{setting: value})


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (1 - 2**-53, 2)])
def test_the_extreme_draws_are_not_masked_tokens(
    draw: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.tensor([draw], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *sizes, **options: drawn)
    sampling = SamplingConfig(temperature=1.0)
    logits_BV = torch.tensor([[-math.inf, 0.1, 0.7, -math.inf]])
    assert int(next_tokens(logits_BV, sampling, [new_generator(sampling)])) == token


def by_transformers(
    logits_V: torch.Tensor, sampling: SamplingConfig, prompt: list[int], chosen: list[int]
) -> torch.Tensor:
    """The distribution after its processors, in its order; [V]."""
    process = pytest.importorskip("transformers.generation.logits_process")
    # It has no presence and frequency penalties: these are OpenAI's formula.
    ids_1S = torch.tensor([prompt + chosen])
    repetition = process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    scores_1V = repetition(ids_1S, logits_V[None].clone())
    for token in set(chosen):
        times = chosen.count(token)
        scores_1V[0, token] -= sampling.presence_penalty + times * sampling.frequency_penalty
    steps = [process.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    steps += [process.TopPLogitsWarper(sampling.top_p), process.MinPLogitsWarper(sampling.min_p)]
    for step in steps:
        scores_1V = step(ids_1S, scores_1V)
    return scores_1V[0].softmax(-1)


def past_of(prompt: list[int], chosen: list[int]) -> Past:
    past = Past(prompt)
    past.chosen.update(chosen)
    return past


TOKENS = st.lists(st.integers(0, 19), min_size=1, max_size=30)
PENALISED = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 22),
    top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.1, 2.0]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 0.3, 2.0]),
)


@given(PENALISED, TOKENS, TOKENS, st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_every_setting_together_is_that_of_transformers(
    sampling: SamplingConfig, prompt: list[int], chosen: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_V = 3 * torch.randn(20, generator=generator, dtype=torch.float64)
    logits_V[seed % 20] = -math.inf
    logits_BV = penalised(logits_V[None], sampling, [past_of(prompt, chosen)])
    got_V = probabilities(logits_BV, sampling)[0]
    torch.testing.assert_close(got_V, by_transformers(logits_V, sampling, prompt, chosen))


def test_penalties_by_hand() -> None:
    logits_BV = torch.tensor([[2.0, -2.0, 4.0, 0.0, 1.0]])
    past = past_of([0, 1], [2, 2, 3])
    alone = {
        "repetition_penalty": [1.0, -4.0, 2.0, 0.0, 1.0],
        "presence_penalty": [2.0, -2.0, 2.0, -2.0, 1.0],
        "frequency_penalty": [2.0, -2.0, 0.0, -2.0, 1.0],
    }
    for name, want in alone.items():
        sampling = SamplingConfig(**{name: 2.0})
        assert penalised(logits_BV, sampling, [past]).tolist() == [want]
    assert penalised(logits_BV, SamplingConfig(), [past]) is logits_BV
    greedy = SamplingConfig(temperature=0.0, presence_penalty=2.0, repetition_penalty=3.0)
    assert int(penalised(logits_BV, greedy, [past]).argmax()) == 4


def test_biases_come_after_the_penalties() -> None:
    logits_BV = torch.tensor([[2.0, -torch.inf, 4.0, 0.0]])
    sampling = SamplingConfig(presence_penalty=1.0, logit_bias=((2, -3.0), (1, 5.0), (3, 1.5)))
    found = penalised(logits_BV, sampling, [past_of([], [2])])
    assert found.tolist() == [[2.0, -torch.inf, 0.0, 1.5]]
    assert logits_BV.tolist() == [[2.0, -torch.inf, 4.0, 0.0]]
    with pytest.raises(ShapeError, match="names token 4; tokens are 0 to 3"):
        penalised(logits_BV, SamplingConfig(logit_bias=((4, 1.0),)), [past_of([], [])])
    with pytest.raises(ConfigError, match="logit_bias"):
        SamplingConfig(logit_bias=((4, 101.0),))


def test_a_row_is_penalised_for_its_own_past() -> None:
    sampling = SamplingConfig(frequency_penalty=1.0)
    logits_BV = torch.zeros(2, 3)
    pasts = [past_of([], [1]), past_of([1], [2, 2])]
    got_BV = penalised(logits_BV, sampling, pasts)
    assert got_BV.tolist() == [[0, -1, 0], [0, 0, -2]]
    assert logits_BV.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, None),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, None),
        ({"do_sample": True, "eos_token_id": 5, "temperature": None, "typical_p": 0.5}, {}),
        ({"top_k": 0, "temperature": 1}, {"temperature": 1.0}),
        ({"top_k": -1}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {"temperature": 0.0}),
        (
            {"do_sample": False, "repetition_penalty": 1.2},
            {"temperature": 0.0, "repetition_penalty": 1.2},
        ),
    ],
)
def test_what_a_checkpoint_states(tmp_path: Path, values: dict, want: dict | None) -> None:
    assert stated_sampling(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert stated_sampling(tmp_path) == (values if want is None else want)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"temperature": "hot"}', "temperature = 'hot' is not allowed"),
        ('{"top_p": 7}', "top_p = 7 is not allowed"),
        ('{"top_k": [3]}', "top_k"),
        ('{"repetition_penalty": -1}', "repetition_penalty"),
        ("[]", "list instead of an object"),
        ("{", "cannot be read"),
    ],
)
def test_a_bad_statement_names_its_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=rf"generation_config\.json.*{message}"):
        stated_sampling(tmp_path)
