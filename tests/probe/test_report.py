import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moestro.errors import DataError, MoestroError
from moestro.probe.measures.measure import measure
from moestro.probe.report import page as page_module
from moestro.probe.report.page import Facts, build, write_report
from moestro.probe.report.samples import Samples, without_dropped
from moestro.probe.report.token_text import TokenText, visible
from moestro.text import ByteTokenizer, train_bpe

from ..vocabularies import byte_fallback
from .changed import make_ablations
from .traces import make_trace

HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> {{ 7 * 7 }} &amp; \u2028"
)
BAD_NAME = "<b onclick=alert(3)>$x</b>"


def traced(text=HOSTILE, tokenizer=None, **options):
    """A trace of which every sequence is the start of the text, repeated."""
    tokenizer = tokenizer or ByteTokenizer()
    options = {"lengths": (40, 30), "documents": 4, "by_token": 2.0, **options}
    trace = make_trace(**options)
    ids = np.resize(np.array(tokenizer.encode(text), dtype=np.int32), max(trace.length_N))
    tokens_T = np.concatenate([ids[:length] for length in trace.length_N])
    return trace._replace(tokens_T=tokens_T)


def built(trace, **options):
    return build(measure(trace, draws=19), trace, ByteTokenizer(), **options)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.inside = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        self.text.setdefault(self.inside, []).append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def hostile():
    trace = traced(domains=("code", BAD_NAME), name="<i>model</i>")
    facts = Facts(1_500_000_000, 300_000_000, 4, (("<u>", "</dd><script>"),))
    changed = make_ablations(domains=trace.domains)
    return built(trace, title=HOSTILE, facts=facts, ablations=changed)


def test_text_never_becomes_markup(hostile):
    tags = Tags(hostile)
    assert len(tags.named("script")) == 2
    assert not tags.named("img")
    assert not tags.named("u")
    assert "onclick" not in {name for _, attrs in tags.tags for name in attrs}
    data = tags.text["script"][0]
    assert "<" not in data
    assert "\u2028" not in data
    shown = json.loads(data)
    assert BAD_NAME in shown["domains"]
    read = "".join(shown["passages"][0]["pieces"])
    assert read == visible(HOSTILE[:40])
    assert "{{ 7 * 7 }}" in tags.text["title"][0]


def test_nothing_is_loaded_and_only_its_own_script_may_run(hostile):
    tags = Tags(hostile)
    policy = next(attrs["content"] for attrs in tags.named("meta") if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    script = hostile.rsplit("<script>", 1)[1].rsplit("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    for _, attrs in tags.tags:
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith(("#", "data:"))
    assert set(re.findall(r"https?://[\w.]+", hostile)) <= {"http://www.w3.org"}
    assert "url(" not in hostile


def test_summary_and_tables_are_there_without_a_script(hostile):
    body = hostile.split("<script", 1)[0]
    for words in (
        "1.5 billion",
        "20\u00a0%",
        "The busiest expert",
        "Balance of each layer",
        "matters more to its domain",
    ):
        assert words in body
    assert "noscript" in body


def test_routing_shown_is_the_routing_recorded():
    trace = traced("abc", experts=6, layers=3, dropped=0.3)
    kept = without_dropped(trace)
    first = Samples(kept, (0, 2), TokenText(ByteTokenizer(), trace.tokens_T)).passages()[0]
    shape = len(first["pieces"]), 2, 2
    experts = np.frombuffer(base64.b64decode(first["experts"]), np.uint8).reshape(shape)
    expected = np.where(trace.kept_TLK, trace.experts_TLK, 6)[: shape[0]][:, [0, 2]]
    np.testing.assert_array_equal(experts, expected)
    weights = np.frombuffer(base64.b64decode(first["weights"]), np.uint8).reshape(shape) / 255
    np.testing.assert_allclose(weights, kept.weights_TLK[: shape[0]][:, [0, 2]], atol=0.003)
    margin = np.frombuffer(base64.b64decode(first["margin"]), np.uint8).reshape(shape[:2]) / 127 - 1
    np.testing.assert_allclose(margin, trace.margin_TL[: shape[0]][:, [0, 2]], atol=0.005)


@pytest.mark.parametrize("text", ["naïve 中文字 😀 ok", "\x00\x1b[31m\u202eevil\u200b", "тест"])
def test_characters_of_several_tokens_come_whole(text):
    tokens = np.array(ByteTokenizer().encode(text), dtype=np.int32)
    pieces = TokenText(ByteTokenizer(), tokens)
    given = pieces.passage(tokens.tolist())
    assert len(given) == len(tokens)
    assert "".join(given).replace("⟨end of text⟩", "\u2400") == visible(text)
    assert not re.search("[\x00-\x08\x1b\u202e\u200b\ufffd]", "".join(given))


def test_half_a_character_is_named_by_the_whole():
    tokenizer = train_bpe(["plain text only"] * 3, 300)
    tokens = np.array(tokenizer.encode("a 中 b 中"), dtype=np.int32)
    pieces = TokenText(tokenizer, tokens)
    part = next(token for token in tokens.tolist() if "\ufffd" in tokenizer.decode([token]))
    assert pieces.name(part) == "⟨part of 中⟩"
    merged = train_bpe(["中 中 中 国 国 国 丰"] * 9, 262)
    tokens = np.array(merged.encode("中 中 丰"), dtype=np.int32)
    mixed = [t for t in tokens.tolist() if re.fullmatch(" \ufffd+", merged.decode([t]))]
    assert mixed
    assert TokenText(merged, tokens).name(mixed[0]) == " ⟨part of 中丰⟩"
    assert pieces.name(tokenizer.end_of_text) == "⟨end of text⟩"
    assert pieces.passage([tokenizer.end_of_text]) == ["⟨end of text⟩"]


def test_characters_spelled_in_bytes_come_whole_and_spaces_stay():
    tokenizer = byte_fallback()
    tokens = np.array(tokenizer.encode(" 😀 the — é"), dtype=np.int32)
    pieces = TokenText(tokenizer, tokens)
    given = pieces.passage(tokens.tolist())
    assert given == [" ", " ", *[""] * 3, "😀", " ", "th", "e", " ", "", "", "—", " ", "é"]
    emoji, dash = tokens[2:6].tolist(), tokens[10:13].tolist()
    assert [pieces.name(token) for token in emoji[:3]] == ["⟨part of 😀⟩"] * 3
    assert pieces.name(emoji[3]) == pieces.name(dash[1]) == "⟨part of 😀—⟩"
    first, inner = tokenizer.encode("a")[0], tokenizer.encode("ta")[-1]
    assert [pieces.name(token) for token in (first, inner)] == [" a", "a"]
    assert pieces.passage([2, *dash[:2]]) == ["⟨end of text⟩", "", "\ufffd\ufffd"]


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1, "experts": 2, "top_k": 1},
        {"domains": ("one",)},
        {"documents": 1},
        {"empty": 0.4},
        {"logits": False},
        {"experts": 260, "layers": 1, "lengths": (20,), "sequences": 1, "top_k": 1},
        {"generated": 5},
    ],
    ids=["small", "one domain", "one document", "expert choice", "no logits", "wide", "written"],
)
def test_odd_traces_give_a_page(options):
    shown = json.loads(Tags(built(traced(**options))).text["script"][0])
    assert shown["passages"]
    assert len(shown["load"][0]) == shown["experts"]


def test_labels_of_one_document_each_get_words_in_place_of_empty_charts():
    page = built(traced(text="the same tokens everywhere", domains=("a", "b"), documents=1))
    assert "Whether it is chance cannot be determined" in page
    assert "Topic and words cannot be told apart" in page
    assert 'data-chart="apart-0"' not in page
    assert "No token occurs under two labels" not in page, "all do"


def test_what_the_model_wrote_is_no_example_of_a_domain():
    trace = traced(text="read", generated=10)
    tokens_T = np.where(trace.generated_T, ord("#"), trace.tokens_T).astype(np.int32)
    trace = trace._replace(tokens_T=tokens_T)
    findings = measure(trace.choose_tokens(~trace.generated_T), draws=19)
    shown = json.loads(Tags(build(findings, trace, ByteTokenizer())).text["script"][0])
    assert any("#" in piece for passage in shown["passages"] for piece in passage["pieces"])
    assert set(shown["strings"]) == set("read")


def test_a_page_stays_small(monkeypatch):
    trace = traced(layers=6, experts=8, domains=tuple("abcd"), lengths=(200, 150))
    findings = measure(trace, draws=9)
    whole = build(findings, trace, ByteTokenizer())
    limit = len(whole.encode()) * 9 // 10
    monkeypatch.setattr(page_module, "LARGEST", limit)
    page = build(findings, trace, ByteTokenizer())
    assert len(page.encode()) <= limit
    assert Tags(page).text["script"][0] != Tags(whole).text["script"][0]


def test_what_does_not_belong_together_is_refused():
    trace = traced()
    findings = measure(trace, draws=19)
    with pytest.raises(DataError, match="measure this trace"):
        build(findings, traced(domains=("x", "y")), ByteTokenizer())
    with pytest.raises(DataError, match="no token"):
        build(findings, trace.choose(np.zeros(len(trace.length_N), dtype=bool)), ByteTokenizer())


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(MoestroError, match="cannot write the report"):
        write_report(tmp_path / "missing" / "page.html", "new")
    place = tmp_path / "page.html"
    place.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_report(place, "new \ud800")
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]
    write_report(place, "new\n")
    assert place.read_bytes() == b"new\n"
