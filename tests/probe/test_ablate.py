"""Ablation on models built by hand, so that it is known which expert serves which domain."""

import math

import numpy as np
import pytest
import torch

from moestro.errors import MoestroError
from moestro.probe.ablation import effects
from moestro.probe.ablation.ablate import ablate, cost, mask_top
from moestro.probe.ablation.targets import Target, targets
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record

from .rings import DOMAINS, TOKENS, WIDTH, make_model, make_text

FAST = {"draws": 999, "batch_size": 64}


def test_an_expert_that_serves_one_domain_matters_to_it_alone():
    model, text = make_model(), make_text()
    result = ablate(model, text, [Target(0, 1, "prose")], **FAST)
    (row,) = result.rows
    assert row.verdict == effects.MORE
    assert row.matters_more
    assert row.own == row.change_M[1] > 0.5
    np.testing.assert_array_equal(row.change_M[[0, 2]], 0)
    np.testing.assert_array_equal(row.share_M, [0, 1, 0])
    assert row.change_interval_M2[1, 0] > 0.3
    assert row.difference_interval_2[0] > 0.3
    # Nobody else reads or predicts these tokens, so nothing can be said about them elsewhere.
    assert row.tokens_verdict == effects.OTHER_TOKENS
    assert row.by_input.covered == 0


def test_losses_are_those_of_plain_cross_entropy():
    model = make_model(top_k=2, num_layers=3, mixtures=2)
    text = [*make_text(documents=2, length=9), Passage([1, 2, 3], "code", "code/short")]
    result = ablate(model, text, [Target(2, 0, "code")], batch_size=3, draws=20)

    @torch.no_grad()
    def losses():
        found = {domain: [] for domain in DOMAINS}
        for passage in text:
            tokens = torch.tensor(passage.tokens)
            logits = model(tokens[None]).logits[0, :-1]
            found[passage.domain].append(
                torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            )
        return [float(torch.cat(each).mean()) / math.log(2) for each in found.values()]

    before = losses()
    np.testing.assert_allclose(result.baseline_M, before, rtol=1e-5)
    np.testing.assert_array_equal(result.tokens_M, [18, 16, 16])
    np.testing.assert_array_equal(result.documents_M, [3, 2, 2])
    # An expert that gives nothing is the same as a weight of 0.
    with torch.no_grad():
        model.blocks[2].ffn.experts.down[0].zero_()
    np.testing.assert_allclose(result.rows[0].change_M, np.subtract(losses(), before), atol=1e-5)


def test_modes_differ_as_they_are_named():
    model, text = make_model(top_k=2), make_text(documents=3, length=12)
    seen = {}
    for mode in ("silence", "silence_renormalised", "swap"):
        result = ablate(model, text, [Target(0, 0, "code", other=1)], mode=mode, **FAST)
        assert result.mode == mode
        seen[mode] = result.rows[0]
    # The heaviest expert is gone in both; one that knows nothing is then turned up, or not.
    changes = {mode: row.change_M for mode, row in seen.items()}
    assert not np.allclose(changes["silence"], changes["silence_renormalised"])
    assert seen["silence"].other is None
    assert seen["swap"].other == 1
    # A swap is that of the two experts' weights.
    before = ablate(model, text, [Target(0, 0, "code")], **FAST).baseline_M
    with torch.no_grad():
        experts = model.blocks[0].ffn.experts
        experts.down[:2] = experts.down[:2].flip(0)
        experts.gate_up[:2] = experts.gate_up[:2].flip(0)
    after = ablate(model, text, [Target(0, 0, "code")], **FAST).baseline_M
    np.testing.assert_allclose(changes["swap"], after - before, atol=1e-5)
    np.testing.assert_allclose(seen["swap"].share_M[0], 0.5 + seen["silence"].share_M[1], atol=0.5)


def test_the_model_is_as_before():
    model, text = make_model(top_k=2), make_text(documents=2)
    model.train()
    tokens = torch.tensor([text[0].tokens])
    before = model(tokens).logits
    ablate(model, text, [Target(0, 0, "code")], draws=20)
    assert model.training
    assert torch.equal(model(tokens).logits, before)


def test_experts_that_serve_all_domains_are_not_said_to_serve_one():
    """Which expert a token goes to has nothing to do with its domain."""
    model = make_model(serve=lambda token: token % 4)
    claims = 0
    for seed in range(10):
        text = make_text(documents=5, length=30, seed=seed)
        wanted = [Target(0, n, DOMAINS[n % 3]) for n in range(4)]
        result = ablate(model, text, wanted, draws=499, batch_size=64, seed=seed)
        claims += any(row.matters_more for row in result.rows)
        assert all(row.own > 0 for row in result.rows)
    assert claims <= 1  # a family-wise 5 % of 10 is 0.5


def test_a_needless_expert_has_no_effect():
    model, text = make_model(), make_text()
    with torch.no_grad():
        model.blocks[0].ffn.experts.down[2].zero_()
    (row,) = ablate(model, text, [Target(0, 2, "sums")], **FAST).rows
    assert row.share_M[2] == 1
    assert row.verdict == effects.NOTHING
    assert row.p_own == 1


def test_one_expert_for_all_matters_as_much_elsewhere():
    model, text = make_model(serve=lambda token: 3), make_text()
    (row,) = ablate(model, text, [Target(0, 3, "code")], **FAST).rows
    assert row.verdict == effects.ALIKE
    assert row.difference_interval_2[0] < 0 < row.difference_interval_2[1]


def test_an_expert_that_harms_is_not_called_needed():
    model, text = make_model(), make_text(regular=0.0)
    with torch.no_grad():  # predicts a token that never comes
        model.blocks[0].ffn.experts.down[0] = torch.roll(torch.eye(WIDTH), 6, 0)
    (row,) = ablate(model, text, [Target(0, 0, "code")], **FAST).rows
    assert row.own < 0
    assert row.verdict == effects.BETTER


def test_what_its_tokens_explain_is_not_put_down_to_the_domain():
    """Each domain has its own mix of tokens, but what follows a token is the same in all."""
    rng = np.random.default_rng(0)
    text = []
    for number, domain in enumerate(DOMAINS):
        share = np.full(3, 0.1)
        share[number] = 0.8
        for document in range(12):
            for _ in range(25):
                place, ring = int(rng.integers(TOKENS)), TOKENS * int(rng.choice(3, p=share))
                step = 1 if rng.random() < 0.8 else 2
                pair = [ring + place, ring + (place + step) % TOKENS]
                text.append(Passage(pair, domain, f"{domain}/{document}"))
    (row,) = ablate(make_model(), text, [Target(0, 0, "code")], draws=999, batch_size=999).rows
    assert row.verdict == effects.MORE
    assert row.tokens_verdict == effects.WITHIN_TOKENS
    assert row.by_input.covered == row.by_target.covered == 1
    assert row.by_input.excess_interval_2[0] < 0 < row.by_input.excess_interval_2[1]
    assert abs(row.by_input.excess) < row.difference / 4


def test_what_tokens_do_not_explain_is_seen():
    """The same tokens in both domains; what follows them differs, and the expert knows of one."""
    rng = np.random.default_rng(0)
    text = []
    for domain, step in (("code", 1), ("prose", -1)):
        for document in range(8):
            steps = np.where(rng.random(40) < 0.8, step, 2)
            tokens = (np.cumsum(steps) % TOKENS).tolist()
            text.append(Passage(tokens, domain, f"{domain}/{document}"))
    wanted = [Target(0, 0, "code"), Target(0, 0, "prose")]
    row, other = ablate(make_model(), text, wanted, **FAST).rows
    assert row.verdict == effects.MORE
    assert row.tokens_verdict == effects.BEYOND_TOKENS
    assert row.by_target.excess_interval_2[0] > 0.5
    assert row.by_input.excess == pytest.approx(row.by_input.here - row.by_input.alike)
    assert row.by_input.excess == pytest.approx(row.difference, abs=0.2)
    assert not other.matters_more
    assert other.own == row.elsewhere


def test_one_document_or_one_domain_gives_numbers_and_no_claim():
    model = make_model()
    text = make_text(documents=4)
    lonely = [p for p in text if p.domain != "code" or p.document == "code/0"]
    (row,) = ablate(model, lonely, [Target(0, 0, "code")], **FAST).rows
    assert row.verdict == effects.ONE_DOCUMENT
    assert np.isnan(row.change_interval_M2[0]).all()
    assert np.isnan(row.difference_interval_2).all()
    assert np.isnan(row.p_more)
    assert not row.matters_more
    assert row.own > 0.5
    one = [p for p in text if p.domain == "code"]
    (row,) = ablate(model, one, [Target(0, 0, "code")], **FAST).rows
    assert row.verdict == effects.ONE_DOMAIN
    assert np.isfinite(row.change_interval_M2).all()
    assert np.isnan(row.elsewhere)


def test_controls_are_compared_by_assignment_removed():
    """Two experts share a domain; one of them knows what comes next, and the other nothing."""
    model = make_model(serve=lambda token: token // TOKENS if token % 2 else 3)
    with torch.no_grad():
        model.blocks[0].ffn.experts.down[3].zero_()
    text = make_text(documents=8)
    wanted = [Target(0, 3, "code", control=True), Target(0, 0, "code")]
    result = ablate(model, text, wanted, **FAST)
    row, control = result.rows
    used = row.share_M[0] * result.tokens_M[0]
    assert row.per_assignment == pytest.approx(row.own * result.tokens_M[0] / used)
    assert control.per_assignment == row.control_per_assignment == 0
    assert row.control_interval_2[0] > 0.3
    assert np.isnan(row.per_assignment_elsewhere)  # none was touched there
    assert np.isnan(control.control_per_assignment)


def test_cost_is_said_beforehand_and_kept():
    model, text = make_model(), make_text(documents=3)
    wanted = [
        Target(0, 0, "code"),
        Target(0, 0, "prose"),  # the same change, another question: runs once
        Target(0, 1, "prose", control=True),
    ]
    said = cost(text, wanted, batch_size=4)
    assert said.batches == 3
    assert said.passes == 9
    seen = []
    result = ablate(
        model, text, wanted, batch_size=4, draws=20, progress=lambda *each: seen.append(each)
    )
    assert seen == [(n + 1, 9) for n in range(9)]
    assert result.passes == 9
    assert len(result.rows) == 3


def test_bits_per_byte():
    model, text = make_model(), make_text()
    plain = ablate(model, text, [Target(0, 0, "code")], **FAST)
    result = ablate(model, text, [Target(0, 0, "code")], token_bytes=lambda token: 2, **FAST)
    assert plain.unit == "bits per token"
    assert plain.bytes_M is None
    assert result.unit == "bits per byte"
    np.testing.assert_array_equal(result.bytes_M, 2 * plain.tokens_M)
    np.testing.assert_allclose(result.baseline_M, plain.baseline_M / 2)
    np.testing.assert_allclose(result.rows[0].change_M, plain.rows[0].change_M / 2)
    assert result.rows[0].per_assignment == pytest.approx(plain.rows[0].per_assignment)
    assert result.rows[0].p_more == plain.rows[0].p_more


def test_masking_more_experts_costs_more():
    model, text = make_model(top_k=2, num_layers=2), make_text(documents=3)
    result = mask_top(model, text, draws=99)
    assert result.layers == (1,)
    assert result.mode == "mask_top"
    np.testing.assert_array_equal(result.masked_X, [0, 1, 2])
    np.testing.assert_array_equal(result.change_XM[0], 0)
    assert (result.change_XM[1] > 0.5).all()
    assert result.passes == 3
    np.testing.assert_allclose(
        result.change_XM, result.loss_XM - result.loss_XM[0], atol=1e-6
    )  # fmt: skip
    # With every choice masked the layer gives nothing.
    with torch.no_grad():
        model.blocks[1].ffn.experts.down.zero_()
    np.testing.assert_allclose(
        mask_top(model, text, draws=20).loss_XM[0], result.loss_XM[2], atol=1e-5
    )
    renormalised = mask_top(model, text, layer=1, renormalise=True, draws=20)
    assert renormalised.mode == "mask_top_renormalised"


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    cfg = transformers.MixtralConfig(
        vocab_size=WIDTH, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(cfg).eval()
    text = make_text(documents=3, length=20)
    text.append(Passage([1, 2, 3], "code", "code/short"))
    found = targets(record(model, text), most=2)
    result = ablate(model, text, found, batch_size=4, draws=99)
    assert np.isfinite(result.baseline_M).all()
    row = result.rows[0]
    with torch.no_grad():
        model.model.layers[row.layer].mlp.experts.down_proj[row.expert].zero_()
    without = ablate(model, text, found, batch_size=4, draws=99).baseline_M
    np.testing.assert_allclose(row.change_M, without - result.baseline_M, atol=1e-5)
    assert np.abs(row.change_M).max() > 1e-3
    assert mask_top(model, text, layer=1, draws=20).change_XM.shape == (3, 3)
    with pytest.raises(MoestroError, match="no head"):
        ablate(model.model, text, found)
