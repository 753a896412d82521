"""Reading documents, labelling them, and choosing what is held out."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moestro.config import DataConfig
from moestro.data import documents
from moestro.data.documents import (
    Document,
    choose_held_out,
    read_documents,
    source_files,
    source_state,
    stable_hash,
)
from moestro.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(*sources: Path | str, **settings) -> list[Document]:
    return list(read_documents(DataConfig(sources=tuple(map(str, sources)), **settings)))


def labels(documents: list[Document]) -> dict[str, str]:
    return {document.name: document.domain for document in documents}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    write(root / "top.md", "top")
    write(root / "b" / "two.txt", "two")
    write(root / "a" / "one.py", "one = 1")
    write(root / "a" / "deep" / "three.txt.gz", "three")
    write(root / "a" / "model.pickle", b"\x80\x04\xff")
    write(root / "a" / "photo.jpg", b"\xff\xd8")
    write(root / ".git" / "secret.txt", "hidden")
    write(root / "a" / ".hidden.txt", "hidden")
    write(root / "a" / "__pycache__" / "x.txt", "cache")
    write(root / "b" / "blank.txt", " \n")
    return root


def test_a_folder_is_read_whole_and_sorted(tree: Path) -> None:
    found = read(tree)
    assert [(document.name, document.text) for document in found] == [
        ("root/a/deep/three.txt.gz", "three"),
        ("root/a/one.py", "one = 1"),
        ("root/b/two.txt", "two"),
        ("root/top.md", "top"),
    ]


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        ("folder", {"a", "b", "top"}),
        ("file", {"one", "two", "three", "top"}),
        ("none", {"all"}),
    ],
)
def test_domains(tree: Path, domains: str, expected: set[str]) -> None:
    assert set(labels(read(tree, domains=domains)).values()) == expected


def test_domains_by_folder_and_stem(tree: Path) -> None:
    assert labels(read(tree)) == {
        "root/a/deep/three.txt.gz": "a",
        "root/a/one.py": "a",
        "root/b/two.txt": "b",
        "root/top.md": "top",
    }


def test_globs_count_domains_from_their_fixed_part(tree: Path) -> None:
    assert labels(read(f"{tree}/*/*.txt")) == {"root/b/two.txt": "b"}
    assert labels(read(f"{tree}/**/*.gz")) == {"root/a/deep/three.txt.gz": "a"}
    assert labels(read(f"{tree}/*")) == labels(read(tree))
    assert labels(read(f"{tree}/[ab]")) == {
        name: label for name, label in labels(read(tree)).items() if label != "top"
    }


def test_relative_sources_have_the_same_names(tree: Path, monkeypatch) -> None:
    expected = read(tree)
    monkeypatch.chdir(tree)
    assert read(".") == expected
    assert labels(read("*")) == labels(expected)
    assert labels(read("top.md")) == {"root/top.md": "top"}


def test_a_file_met_twice_is_read_once(tree: Path) -> None:
    assert len(read(tree, tree / "top.md", f"{tree}/*.md")) == 4


def test_a_path_with_glob_characters_that_exists(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1].txt", "text")
    assert [document.text for document in read(path)] == ["text"]


def test_a_named_file_is_read_whatever_its_extension(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.xyz", "text")
    assert labels(read(path)) == {f"{tmp_path.name}/notes.xyz": "notes"}


@pytest.mark.parametrize("name", ["many.txt", "many.txt.gz"])
def test_nul_ends_a_document(tmp_path: Path, name: str) -> None:
    long = "x" * 1_500_000  # longer than one read
    path = write(tmp_path / name, f"first\0second\0\0{long}\0")
    found = read(path)
    assert [document.text for document in found] == ["first", "second", long]
    assert [document.name.partition("#")[2] for document in found] == ["", "1", "3"]


@given(parts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=5))
@example(parts=["\ufeff"])
@example(parts=["\ufeffa", "\ufeff", " "])
def test_texts_come_back_unchanged(tmp_path_factory, parts: list[str]) -> None:
    whole = "\0".join([*parts, "last"])
    path = write(tmp_path_factory.mktemp("parts") / "t.txt", whole)
    expected = whole.removeprefix("\ufeff").split("\0")  # a byte-order mark is no text
    assert [document.text for document in read(path)] == [text for text in expected if text.strip()]


def test_a_byte_order_mark_is_dropped_and_lines_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", b"\xef\xbb\xbfa\r\nb")
    assert read(path)[0].text == "a\r\nb"


ROWS = [{"text": "eins\0zwei", "domain": "de", "n": 1}, {"text": "one", "domain": "en"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n\n".join(map(json.dumps, ROWS)))
    root = tmp_path.name
    assert read(path, domains="field") == [
        Document(f"{root}/{name}#1", "de", "eins"),
        Document(f"{root}/{name}#1.1", "de", "zwei"),
        Document(f"{root}/{name}#3", "en", "one"),
    ]
    assert {document.domain for document in read(path)} == {"rows"}
    assert [d.text for d in read(path, text_field="domain")] == ["de", "en"]


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("{'a': 1}", {}, r"line 2 is not JSON"),
        ("[" * 100_000, {}, r"line 2 is not JSON"),
        ("[1]", {}, r"line 2 is not a JSON object"),
        ('{"body": "x"}', {}, r"line 2: the field 'text' is missing.*'body'.*data\.text_field"),
        ('{"text": 5}', {}, r"line 2: the field 'text' is not a string"),
        ('{"text": "x"}', {"domains": "field"}, r"line 2: the field 'domain' is missing"),
        (r'{"text": "\ud800"}', {}, r"line 2: character 0 .* surrogate"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: str, settings: dict[str, str], message: str) -> None:
    path = write(tmp_path / "r.jsonl", '{"text": "fine", "domain": "d"}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read(path, **settings)
    assert str(path) in str(caught.value)


def test_field_domains_need_jsonl(tree: Path) -> None:
    with pytest.raises(DataError, match=r"not a \.jsonl file.*'folder'"):
        read(tree, domains="field")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"no such file or folder: .*missing\.txt.*'builtin'"),
        ("*.nothing", r"nothing matches the glob"),
        ("**x/y", r"not a glob that works"),
        ("binary", r"no text file in the folder .*binary"),
        ("binary/*", r"matches 1 names, but no text file"),
    ],
)
def test_bad_sources(tmp_path: Path, source: str, message: str) -> None:
    write(tmp_path / "binary" / "x.pkl", b"\x80")
    with pytest.raises(DataError, match=message):
        read(tmp_path / source)


def test_no_source_at_all() -> None:
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        read()


def test_a_bad_source_is_told_before_anything_is_read() -> None:
    with pytest.raises(DataError, match="no such file"):
        next(read_documents(DataConfig(sources=("builtin", "missing"))))


@pytest.mark.parametrize(
    ("name", "raw", "offset"),
    [
        ("bad.txt", b"good\0ab\xffcd", 7),
        ("bad.txt.gz", b"good\0ab\xffcd", 7),
        ("bad.jsonl", b'{"text": "a"}\n\xff', 14),
        ("utf16.txt", "text".encode("utf-16"), 0),
        ("cut.txt", "é".encode()[:1], 0),
    ],
)
def test_undecodable_bytes_are_located(tmp_path: Path, name: str, raw: bytes, offset: int) -> None:
    path = write(tmp_path / name, raw)
    with pytest.raises(DataError, match=rf"{name} is not UTF-8: byte {offset}\b.*convert"):
        read(path)


@pytest.mark.parametrize("name", ["t.txt.gz", "t.jsonl.gz"])
def test_damaged_gzip(tmp_path: Path, name: str) -> None:
    content = "\n".join(json.dumps({"text": str(n) * 50}) for n in range(5000))
    path = write(tmp_path / name, content)
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for raw in (whole[: len(whole) // 2], b"no gzip", bytes(broken)):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="not a whole gzip file"):
            read(path)


def test_an_unreadable_file(tree: Path, monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"top\.md cannot be read \(Permission denied\)"):
        read(tree / "top.md")


def test_pipes_and_dangling_links_in_a_folder_are_passed_over(tree: Path) -> None:
    (tree / "link.txt").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "pipe.txt")
    assert len(read(tree)) == 4


def test_links_to_folders_are_not_followed_and_told(tree: Path, tmp_path: Path) -> None:
    whole = read(tree)
    write(tmp_path / "elsewhere" / "four.txt", "four")
    (tree / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "b" / "up").symlink_to(tree)
    with pytest.warns(UserWarning, match=r"not followed: .*b/linked and 1 more in .*root; to"):
        assert read(tree) == whole
    assert [each.text for each in read(tree / "b" / "linked")] == ["four"]
    assert [each.text for each in read(f"{tree}/b/link*")] == ["four"]


def test_state_changes_with_the_files(tree: Path) -> None:
    cfg = DataConfig(sources=(str(tree),))
    before = source_state(cfg)
    assert before == source_state(cfg)
    assert len(before) == len(source_files(cfg)) == 5
    write(tree / "top.md", "changed")
    assert before != source_state(cfg)


def test_builtin_is_grouped_by_module() -> None:
    found = read("builtin")
    assert {document.domain for document in found} == {"code", "english", "arithmetic"}
    groups: dict[str, set[str]] = {}
    for document in found:
        groups.setdefault(document.group or document.name, set()).add(document.domain)
        assert "\0" not in document.text
    assert groups["builtin/bisect.py"] == {"code", "english"}
    assert len({document.name for document in found}) == len(found)
    assert next(read_documents(DataConfig(domains="none"))).domain == "all"


def test_stable_hash_is_stable() -> None:
    assert stable_hash("a", 1) == 0x1430B8865A685CD
    assert stable_hash("a", 1) != stable_hash("a", 2)
    assert stable_hash("a\udcff") >= 0


@st.composite
def collections(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = draw(st.integers(1, 40))

    def column(highest: int, lowest: int = 0) -> list[int]:
        return draw(st.lists(st.integers(lowest, highest), min_size=count, max_size=count))

    groups = [stable_hash("group", number) for number in column(30)]
    return np.array(column(3)), np.array(groups, dtype=np.uint64), np.array(column(1000, 1))


@given(documents=collections(), share=st.floats(0.01, 0.99), least=st.integers(1, 5000))
def test_groups_stay_together(documents, share: float, least: int) -> None:
    domains, groups, sizes = documents
    held = choose_held_out(domains, groups, sizes, share, least)
    for group in np.unique(groups):
        assert len(set(held[groups == group].tolist())) == 1
    again = choose_held_out(domains[::-1], groups[::-1], sizes[::-1], share, least)
    assert (again[::-1] == held).all()


@given(documents=collections(), share=st.floats(0.01, 0.99))
def test_one_domain_has_both_sides(documents, share: float) -> None:
    _, groups, sizes = documents
    held = choose_held_out(np.zeros_like(sizes), groups, sizes, share, 1)
    if len(np.unique(groups)) > 1:
        assert 0 < held.sum() < len(held)


def test_share_of_documents() -> None:
    count = 4000
    groups = np.array([stable_hash("g", number) for number in range(count)], dtype=np.uint64)
    held = choose_held_out(np.zeros(count, np.int64), groups, np.full(count, 100), 0.1, 1)
    assert 0.08 < held.mean() < 0.12
    # A document that joins moves no other one across.
    fewer = choose_held_out(np.zeros(3000, np.int64), groups[:3000], np.full(3000, 100), 0.01, 1)
    more = choose_held_out(np.zeros(count, np.int64), groups, np.full(count, 100), 0.01, 1)
    assert (fewer != more[:3000]).mean() < 0.01


def test_one_huge_document_does_not_swallow_the_evaluation() -> None:
    groups = np.array([1, 2**63, 2**63 + 5], dtype=np.uint64)  # the first falls below the share
    held = choose_held_out(np.zeros(3, np.int64), groups, np.array([10, 10_000, 50]), 0.1, 1000)
    assert held.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "line", ["ein Wort und 😀 ", "ß", "語\n"], ids=["spaces", "no break", "lines"]
)
def test_a_long_file_comes_in_parts_of_one_group(tmp_path, monkeypatch, line: str) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 1000)
    monkeypatch.setattr(documents, "_CHUNK_BYTES", 64)
    text = line * 800
    path = write(tmp_path / "long.txt", "short\0" + text + "\0end")
    first, *parts, last = read(path)
    assert (first.text, last.text) == ("short", "end")
    assert "".join(part.text for part in parts) == text
    assert [part.name for part in parts[:2]] == [
        f"{path.parent.name}/long.txt#1",
        parts[0].name + "@1",
    ]
    assert {part.group or part.name for part in parts} == {parts[0].name}
    assert max(len(part.text.encode()) for part in parts) <= 1064
    assert all(part.text.endswith("\n") for part in parts) == ("\n" in line)
    assert len({part.name for part in parts}) == len(parts) > 1


def test_bytes_that_are_no_text_are_named_by_their_place_in_the_whole_file(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 100)
    monkeypatch.setattr(documents, "_CHUNK_BYTES", 64)
    path = write(tmp_path / "bad.txt", b"a\0" + b"word " * 60 + b"\xff rest")
    with pytest.raises(DataError, match="byte 302 is 0xff"):
        read(path)
    with pytest.raises(DataError, match="byte 0 is 0x80"):
        read(write(tmp_path / "worse.txt", b"\x80" * 300))


def test_memory_does_not_depend_on_the_length_of_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 1 << 20)
    path = tmp_path / "one_line.txt"
    path.write_bytes(b"a cde" * (4 << 20))
    tracemalloc.start()
    total = sum(len(document.text) for document in read_documents(DataConfig(sources=(str(path),))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20 << 20
    assert peak < 12 << 20  # held whole it would be four times the file


def test_a_line_that_is_too_long_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE", 1 << 20)
    path = write(tmp_path / "x.jsonl", json.dumps({"text": "short"}) + "\n")
    assert len(read(path)) == 1
    write(path, json.dumps({"text": "a" * (1 << 20)}) + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl has a line longer than 1 MiB; put one document"):
        read(path)
