import numpy as np
import pytest

from moestro.probe.measures.measure import measure
from moestro.probe.report.summary import summary

from .changed import make_ablations
from .traces import make_trace


def said(about, **options):
    options = {"documents": 12, "lengths": (60,), "layers": 2, "sequences": 1, **options}
    findings = measure(make_trace(**options), draws=199)
    return next(each for each in summary(findings) if each.about == about)


def test_chance_is_called_chance():
    by_domain = said("By domain")
    assert not by_domain.sure
    assert "does not differ by domain beyond chance in any of the 2" in by_domain.text
    assert not said("Neighbours").sure
    assert not said("Pairs", experts=6).sure
    assert said("Caching", experts=8).sure is False


def test_domains_told_apart_are_said_with_chance_and_interval():
    by_domain = said("By domain", by_domain=1.5)
    assert by_domain.sure
    assert "in 2 of 2 mixture layers" in by_domain.text
    assert "where chance gives" in by_domain.text
    assert "95 % interval" in by_domain.text
    assert said("Domain or words?", by_domain=1.5).sure


def test_routing_by_token_is_not_called_topic():
    options = {"by_token": 3.0, "vocabulary": 20}
    assert not said("Domain or words?", **options).sure
    assert "Nor is it shown that the same token" in said("Domain or words?", **options).text
    assert said("Tokens", **options).sure


def test_balance_names_the_busiest_and_the_unused():
    uneven = said("Balance", skew=1.5)
    assert uneven.sure
    assert "times an equal share" in uneven.text
    assert "All 8 experts were used" in uneven.text
    trace = make_trace(experts=4, top_k=1, documents=4)
    none = np.where(trace.experts_TLK == 3, 0, trace.experts_TLK).astype(trace.experts_TLK.dtype)
    text = summary(measure(trace._replace(experts_TLK=none), draws=19))[0].text
    assert "2 of 8 experts were not used" in text


def test_one_document_gives_no_interval_and_says_so():
    findings = measure(make_trace(domains=("a", "b"), documents=1), draws=19)
    sentences = summary(findings)
    assert "Only one document was read of a, b" in sentences[-1].text
    by_domain = next(each for each in sentences if each.about == "By domain")
    assert "cannot be determined" in by_domain.text
    assert "assigning the documents" not in by_domain.text
    assert not by_domain.sure
    assert "Domain or words?" not in {each.about for each in sentences}
    alone = summary(measure(make_trace(domains=("a",), documents=1), draws=19))[0].text
    assert "no interval" in alone
    assert "may as well be even" not in alone


def test_what_is_not_found_is_not_called_absent():
    assert "cannot be determined" in said("Pairs", experts=6).text
    text = said("Domain or words?", by_token=3.0, vocabulary=20, documents=60, by_domain=0.0).text
    assert "goes to the same experts" not in text


def test_a_cache_for_one_token_only_is_not_the_example():
    assert "A cache of 3 of 8 experts" in said("Caching", experts=8, top_k=2).text


def test_only_experts_that_matter_are_said_to_matter():
    findings = measure(make_trace(), draws=19)

    def text(**options):
        said = summary(findings, make_ablations(**options))
        return next(each for each in said if each.about == "Does it matter?")

    some = text()
    assert some.sure
    assert "2 experts that look specialised were silenced" in some.text
    assert "1 matters more" in some.text
    assert "than the same tokens lose elsewhere is shown for none of the 1" in some.text
    assert "expert 0 of layer 1 to code" in some.text
    assert "Of the other 1 that cannot be said" in some.text
    none = text(matters=(False, False))
    assert not none.sure
    assert "None of them was shown to matter more" in none.text


@pytest.mark.parametrize("options", [{"empty": 0.5}, {"domains": ("one",)}, {"logits": False}])
def test_what_was_not_measured_is_not_mentioned(options):
    findings = measure(make_trace(**options), draws=19)
    about = {each.about for each in summary(findings)}
    assert ("Neighbours" in about) == (findings.repetition is not None)
    assert ("By domain" in about) == bool(findings.specialisation)
