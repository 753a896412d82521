import pytest
import torch

from moestro.errors import DataError, MoestroError
from moestro.probe.recording.passages import Passage, cut, in_batches, pad, prepare
from moestro.text import ByteTokenizer

BYTES = ByteTokenizer()


def test_documents_are_cut_into_passages_that_keep_their_name():
    passages = cut({"prose": ["abcde", "", "xy"], "code": ["if"]}, BYTES, 2)
    assert [(bytes(p.tokens).decode(), p.document) for p in passages] == [
        ("ab", "prose/0"),
        ("cd", "prose/0"),
        ("e", "prose/0"),
        ("xy", "prose/2"),
        ("if", "code/0"),
    ]
    assert {p.domain for p in passages[:4]} == {"prose"}


def test_a_domain_is_read_no_further_than_asked():
    def endless():
        while True:
            yield "abcdefgh"

    passages = cut({"prose": endless(), "code": ["xyz"]}, BYTES, 4, most=10)
    assert [len(p.tokens) for p in passages] == [4, 4, 2, 3]
    assert [p.document for p in passages[:3]] == ["prose/0", "prose/0", "prose/1"]


def test_every_passage_without_a_document_is_one_of_its_own():
    readings = prepare(
        [
            Passage([1], "b"),
            "text",
            Passage([2], "b"),
            Passage([3], "b", "x"),
            Passage([4], "b", "b/x"),
        ],
        BYTES,
    )
    assert [r.document for r in readings] == ["b/#0", "text/#0", "b/#1", "b/x", "b/x"]
    assert readings[1].tokens_S.tolist() == list(b"text")
    assert [r.prompt for r in readings] == [1, 4, 1, 1, 1]


def test_one_string_is_one_text():
    assert [r.tokens_S.tolist() for r in prepare("hey", BYTES)] == [list(b"hey")]


def test_batches_mix_the_domains_evenly():
    readings = prepare(
        [Passage([1], "a") for _ in range(8)] + [Passage([2], "b") for _ in range(4)], None
    )
    batches = in_batches(readings, 3)
    assert [sum(r.domain == "b" for r in batch) for batch in batches] == [1, 1, 1, 1]


def test_only_shorter_sequences_are_padded():
    short, long = prepare([Passage([1, 2]), Passage([3, 4, 5])], None)
    batch = pad((short, long))
    assert batch.tokens_BS.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert batch.valid_BS.tolist() == [[True, True, False], [True, True, True]]
    assert pad((short, short)).valid_BS is None


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], DataError, "no text to record"),
        ([Passage([])], DataError, r"text 0 \(text\) has no tokens"),
        (["a string"], MoestroError, "give its tokenizer"),
        ([Passage([1]), Passage(torch.ones(2), "b")], DataError, r"text 1 \(b\) is torch.float32"),
        ([Passage(torch.ones(1, 2).long())], DataError, r"int64 \[1, 2\]"),
    ],
)
def test_texts_that_cannot_be_read(texts, error, message):
    with pytest.raises(error, match=message):
        prepare(texts, None)


def test_cutting_refuses_what_leaves_nothing():
    with pytest.raises(DataError, match="domain 'b' has no text"):
        cut({"a": ["x"], "b": [""]}, BYTES, 4)
    with pytest.raises(DataError, match="no domains"):
        cut({}, BYTES, 4)
    with pytest.raises(MoestroError, match="length is 0"):
        cut({"a": ["x"]}, BYTES, 0)
    with pytest.raises(MoestroError, match="most is 0"):
        cut({"a": ["x"]}, BYTES, 4, most=0)
    with pytest.raises(MoestroError, match="batch_size is 0"):
        in_batches(prepare([Passage([1])], None), 0)
