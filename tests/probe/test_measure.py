import json

import numpy as np
import pytest

from moestro.errors import DataError, MoestroError
from moestro.probe.measures import measure as m
from moestro.probe.measures.specialise import Grouping, by_pattern

from .traces import make_trace
from .worlds import world


def plain(trace, **kwargs):
    return m.to_json(m.measure(trace, draws=kwargs.pop("draws", 9), **kwargs))


def test_every_measure_of_a_usual_trace():
    trace = make_trace(domains=("en-prose", "de-prose", "en-code"), dropped=0.1, generated=2)
    language = by_pattern("language", "^([a-z]+)-", trace.domains)
    found = m.measure(trace, groupings=[language], draws=9)
    assert all(value is not None for value in found)
    assert ["fewer than 8 documents" in note for note in found.notes] == [True]
    assert m.measure(make_trace(documents=8), draws=9).notes == ()
    assert [each.grouping for each in found.specialisation] == ["domain", "language"]
    assert found.specialisation[1].labels == ("en", "de")
    assert found.tokens_M.tolist() == [48, 48, 48]
    assert found.documents_M.tolist() == [3, 3, 3]
    assert found.table_LME.shape == (2, 3, 4)
    assert found.table_interval_LME2.shape == (2, 3, 4, 2)
    assert found.model == "tiny"
    assert found.top_k == 2


def test_same_seed_same_findings():
    trace = make_trace(by_domain=1.0)
    assert plain(trace, seed=7) == plain(trace, seed=7)
    assert plain(trace, seed=7) != plain(trace, seed=8)


def test_findings_serialise_to_plain_json():
    one = make_trace(documents=1)
    found = plain(one)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["domains"] == ["code", "prose"]
    assert found["specialisation"][0]["interval_LM2"] == [[[None, None]] * 2] * 2
    assert isinstance(found["specialisation"][0]["supported_L"][0], bool)
    assert len(found["table_LME"][0][1]) == 4


def test_one_document_of_a_domain_is_said():
    found = m.measure(make_trace(documents=1), draws=9)
    assert any("one document only in code, prose: no interval" in note for note in found.notes)
    single = m.measure(make_trace(domains=("code",), documents=1), draws=9)
    assert single.explained is None
    assert any("one document only; give at least two" in note for note in single.notes)
    assert np.isnan(single.load.share_interval_LE2).all()


def test_one_domain_has_no_specialisation():
    found = m.measure(make_trace(domains=("text",)), draws=9)
    assert found.specialisation == ()
    assert any("by 'domain' the text has only 'text'" in note for note in found.notes)


def test_expert_choice_leaves_out_what_needs_ranked_choices():
    found = m.measure(make_trace(empty=0.3), draws=9)
    for name in ("explained", "coactivation", "overlap", "repetition", "caching"):
        assert getattr(found, name) is None, name
    assert found.specialisation
    assert found.load.share_LE.shape == (2, 4)
    assert sum("expert choice" in note for note in found.notes) == 5


def test_unknown_probabilities_and_lone_layers_are_none_and_said():
    found = m.measure(make_trace(logits=False, layers=1, top_k=1, documents=9), draws=9)
    for name in ("entropy", "margin", "coactivation", "overlap"):
        assert getattr(found, name) is None, name
    assert len(found.notes) == 3


def test_bad_input_is_refused_and_not_noted():
    trace = make_trace()
    with pytest.raises(DataError, match="no token"):
        m.measure(trace.choose(np.zeros(len(trace.length_N), dtype=bool)))
    with pytest.raises(MoestroError, match="1 labels for 2 domains"):
        m.measure(trace, groupings=[Grouping("bad", ("x",))], draws=9)
    with pytest.raises(MoestroError, match="draws is 0"):
        m.measure(trace, draws=0)


def test_a_part_of_a_trace_is_measured_like_a_trace_of_that_part():
    trace = world(0, documents=(4, 4, 4), layers=2, top_k=2)
    part = m.measure(trace.choose(trace.domain_N != 1), draws=9)
    assert part.tokens_M[1] == 0
    assert part.documents_M.tolist() == [4, 0, 4]
    assert part.specialisation[0].labels == ("a", "c")
    assert not part.table_supported_LME[:, 1].any()
    assert np.isfinite(part.load.share_interval_LE2).all()


def test_a_single_expert_gives_finite_numbers():
    found = m.measure(world(0, documents=(3, 3), experts=1, layers=2), draws=9)
    assert found.repetition.first_uniform == 1.0
    assert found.specialisation[0].mean_L.tolist() == [0.0, 0.0]
    assert np.isfinite(found.entropy.balance_L).all()
