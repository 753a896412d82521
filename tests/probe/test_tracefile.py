"""Trace files: what is written is read, damage is told, nothing is left half-written."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from moestro.errors import DataError
from moestro.probe.recording.tracecheck import dtypes
from moestro.probe.recording.tracefile import TraceWriter, read_parts, read_trace, write_parts
from moestro.probe.recording.traces import Trace, join

from .traces import make_trace

KINDS = {
    "plain": {},
    "one token": {"lengths": (1,), "documents": 1, "sequences": 1, "domains": ("a",)},
    "dropped": {"dropped": 0.3, "generated": 2},
    "varying": {"empty": 0.4, "top_k": 3},
    "many experts": {"experts": 256, "top_k": 8, "layers": 1},
    "no logits": {"logits": False},
    "names": {"domains": ("código", "日本語", "a\0", "\udce4")},
}


def write(path, *traces, append=False):
    write_parts(path, iter(traces), append)


def assert_same(here: Trace, there: Trace):
    np.testing.assert_equal(here._asdict(), there._asdict())
    for name in dtypes(here.subject.num_experts):
        if getattr(here, name) is not None:
            assert getattr(here, name).dtype == getattr(there, name).dtype, name


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def split(trace, parts):
    """A trace in parts of some sequences each."""
    part_N = np.arange(len(trace.length_N)) * parts // len(trace.length_N)
    numbered = trace._replace(batch_N=part_N)
    return [numbered.choose(part_N == part) for part in range(parts)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.npz"


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_what_is_written_is_read(options, path):
    trace = make_trace(**options)
    write(path, trace)
    assert_same(read_trace(path), join([trace]))
    (part,) = read_parts(path)
    assert_same(part, trace)
    assert names_in(path.parent) == [path.name]


def test_a_hundred_parts(path):
    parts = split(make_trace(documents=25, sequences=4), 100)
    write(path, *parts)
    assert_same(read_trace(path), join(parts))
    for found, part in zip(read_parts(path), parts, strict=True):
        assert_same(found, part)


def test_parts_name_their_own_domains_and_documents(path):
    parts = [make_trace(domains=(name,), seed=seed) for seed, name in enumerate("abca")]
    parts[2] = parts[2]._replace(kept_TLK=parts[2].experts_TLK > 0)
    write(path, *parts)
    trace = read_trace(path)
    assert_same(trace, join(parts))
    assert trace.domains == ("a", "b", "c")


def test_append(path):
    parts = split(make_trace(documents=4), 4)
    write(path, parts[0], append=True)
    write(path, *parts[1:3], append=True)
    renamed = parts[3]._replace(subject=parts[3].subject._replace(name="elsewhere"))
    write(path, renamed, append=True)
    assert_same(read_trace(path), join(parts))
    with TraceWriter(path, parts[0].subject, append=True):
        pass
    assert_same(read_trace(path), join(parts))
    write(path, parts[1])
    assert_same(read_trace(path), join(parts[1:2]))


def test_numpy_alone_reads_it(path):
    trace = make_trace(dropped=0.1)
    write(path, trace)
    with np.load(path, allow_pickle=False) as file:
        header, names = json.loads(file["header.json"]), json.loads(file["part-00000/names.json"])
        arrays = {name: file[f"part-00000/{name}"] for name in dtypes(4)}
        assert len(file.files) == 2 + len(arrays)
    assert header["subject"] == {**trace.subject._asdict(), "moe_layers": [0, 1]}
    assert (tuple(names["domains"]), tuple(names["documents"])) == (trace.domains, trace.documents)
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, getattr(trace, name))


def test_another_model_is_refused(path):
    trace = make_trace()
    for other in (make_trace(fingerprint="1" * 32), make_trace(experts=5), make_trace(layers=3)):
        with (
            pytest.raises(DataError, match="different models"),
            TraceWriter(path, trace.subject) as writer,
        ):
            writer.write(other)
        assert names_in(path.parent) == []
    write(path, trace)
    before = path.read_bytes()
    with pytest.raises(DataError, match="different models, tiny and tiny"):
        write(path, make_trace(fingerprint="1" * 32), append=True)
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


@pytest.mark.parametrize("append", [False, True])
def test_an_error_leaves_the_old_file(append, path):
    old, new = split(make_trace(), 2)
    write(path, old)
    before = path.read_bytes()

    def interrupted():
        with TraceWriter(path, old.subject, append) as writer:
            writer.write(new)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


def test_a_part_that_could_not_be_written_spoils_the_file(path, monkeypatch):
    trace = make_trace()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def go_on():
        with TraceWriter(path, trace.subject) as writer:
            writer.write(trace)
            monkeypatch.setattr(np.lib.format, "write_array", full)
            with pytest.raises(DataError, match="cannot be written: No space left"):
                writer.write(trace)

    with pytest.raises(DataError, match="one of its parts could not be"):
        go_on()
    assert names_in(path.parent) == []


def test_a_refused_part_does_not_spoil_the_file(path):
    trace = make_trace()
    with TraceWriter(path, trace.subject) as writer:
        writer.write(trace)
        with pytest.raises(DataError, match="weights_TLK must be finite"):
            writer.write(trace._replace(weights_TLK=trace.weights_TLK * np.float32(np.nan)))
    assert_same(read_trace(path), join([trace]))


def test_a_kill_leaves_the_old_file(path):
    write(path, make_trace())
    before = path.read_bytes()
    code = """
import os, signal, sys
from pathlib import Path
from moestro.probe.recording.tracefile import TraceWriter, read_trace
path = Path(sys.argv[1])
trace = read_trace(path)
fresh = path.with_name(sys.argv[2])
for place, append in ((path, True), (fresh, False)):
    writer = TraceWriter(place, trace.subject, append=append).__enter__()
    writer.write(trace)
os.kill(os.getpid(), signal.SIGKILL)
"""
    words = [sys.executable, "-c", code, str(path), "fresh.npz"]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    left = set(names_in(path.parent)) - {path.name}
    assert len(left) == 2
    assert all(name.startswith(".unfinished-") for name in left)
    write(path, make_trace(seed=1), append=True)
    assert len(list(read_parts(path))) == 2


def test_nothing_written_is_an_error(path):
    with (
        pytest.raises(DataError, match="no part of a trace was given"),
        TraceWriter(path, make_trace().subject),
    ):
        pass
    with pytest.raises(DataError, match="no part of a trace was given"):
        write_parts(path, iter(()))
    assert names_in(path.parent) == []


def test_places_that_cannot_be_written(path):
    path.mkdir()
    with pytest.raises(DataError, match=r"out\.npz cannot be written: .*folder"):
        write(path, make_trace())
    file = path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(file / "below.npz", make_trace())
    write(path / "new" / "below.npz", make_trace())
    assert names_in(path / "new") == ["below.npz"]


def test_a_link_is_followed(path):
    target = path.parent / "folder" / "real.npz"
    target.parent.mkdir()
    path.symlink_to(target)
    write(path, make_trace())
    assert path.is_symlink()
    assert_same(read_trace(target), join([make_trace()]))


def test_one_part_is_in_memory_at_a_time(path):
    one = make_trace(lengths=(2000,), documents=4, layers=8)
    size = sum(getattr(one, n).nbytes for n in dtypes(4) if getattr(one, n) is not None)
    tracemalloc.start()
    with TraceWriter(path, one.subject) as writer:
        for _ in range(20):
            writer.write(one)
    writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    assert sum(len(part.tokens_T) for part in read_parts(path)) == 20 * len(one.tokens_T)
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20 * size
    assert writing < 4 * size
    assert reading < 4 * size


def test_a_truncated_file_is_refused(path, tmp_path):
    trace = make_trace()
    write(path, trace)
    write(path, trace, append=True)
    whole, short = path.read_bytes(), tmp_path / "short.npz"
    rng = np.random.default_rng(0)
    ends = {0, 1, 30, *range(len(whole) - 40, len(whole)), *rng.integers(len(whole), size=80)}
    for end in ends:
        short.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"short\.npz"):
            read_trace(short)
        with pytest.raises(DataError, match=r"short\.npz"):
            write(short, trace, append=True)
        assert short.read_bytes() == whole[:end]


def test_a_changed_byte_is_refused_or_changes_nothing(path, tmp_path):
    trace = join([make_trace(lengths=(3,), documents=1, sequences=1)])
    write(path, trace)
    whole, other = path.read_bytes(), tmp_path / "other.npz"
    messages = []
    places = range(0, len(whole), 19)
    for at in places:
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        other.write_bytes(changed)
        try:
            assert_same(read_trace(other), trace)
        except DataError as error:
            messages.append(str(error))
    assert all("other.npz" in message for message in messages)
    assert len(messages) > len(places) / 2


def rewrite(path, changes=(), *, compression=zipfile.ZIP_STORED, extra=()):
    """The same file with some members changed (None: left out), and some more."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()} | dict(changes)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in [*members.items(), *extra]:
            if data is not None:
                file.writestr(name, data)


def npy(values, dtype=None, shape=None, order="C"):
    """The bytes of an .npy file; its header says what it is told to."""
    plain = np.asarray(values)
    about = np.dtype(dtype or plain.dtype).str, order == "F", shape or plain.shape
    text = "{{'descr': {!r}, 'fortran_order': {}, 'shape': {}, }}".format(*about)
    return npy_header(text) + plain.tobytes()


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


NO_DTYPE = "{'descr': ('<i4',), 'fortran_order': False, 'shape': ()}"
TOKENS = np.zeros(96, dtype=np.int32)
MEMBERS = {
    "no header": ({"header.json": None}, "not a trace: it has no member header.json"),
    "other format": ({"header.json": b'{"format": "x"}'}, "its format is 'x'"),
    "no JSON": ({"header.json": b"{"}, "header.json cannot be read"),
    "deep JSON": ({"header.json": b"[" * 100_000}, "header.json cannot be read"),
    "a list": ({"header.json": b"[]"}, "header.json cannot be read"),
    "no names": ({"part-00000/names.json": None}, "part-00000/names.json is missing"),
    "names no list": (
        {"part-00000/names.json": b'{"domains": "ab", "documents": []}'}, "must be lists",
    ),
    "no member": ({"part-00000/tokens_T.npy": None}, "part-00000/tokens_T.npy is missing"),
    "no part": ({"part-00002/tokens_T.npy": npy(TOKENS)}, "part-00001/.* is missing"),
    "unknown member": ({"part-00000/more.npy": b""}, "has no member 'part-00000/more.npy'"),
    "a path": ({"../tokens_T.npy": b""}, r"has no member '\.\./tokens_T.npy'"),
    "no npy": ({"part-00000/tokens_T.npy": b"no"}, "tokens_T.npy is damaged"),
    "no header at all": ({"part-00000/tokens_T.npy": npy_header("(((")}, "tokens_T.npy is damaged"),
    "no dtype": ({"part-00000/tokens_T.npy": npy_header(NO_DTYPE)}, "tokens_T.npy is damaged"),
    "pickle": (
        {"part-00000/tokens_T.npy": npy(TOKENS, "O")}, "holds object, but must hold int32",
    ),
    "long": ({"part-00000/tokens_T.npy": npy(TOKENS.astype(np.int64))}, "holds int64"),
    "big end first": ({"part-00000/tokens_T.npy": npy(TOKENS, ">i4")}, "holds >i4"),
    "by columns": ({"part-00000/tokens_T.npy": npy(TOKENS, order="F")}, "by columns"),
    "too few": ({"part-00000/tokens_T.npy": npy(TOKENS, shape=(97,))}, "but has 384 bytes"),
    "bomb": ({"part-00000/tokens_T.npy": npy(TOKENS, shape=(10**13,))}, "but has 384 bytes"),
    "huge": ({"part-00000/tokens_T.npy": npy(TOKENS, shape=(10**30,))}, "but has 384 bytes"),
    "negative": ({"part-00000/tokens_T.npy": npy(TOKENS, shape=(-96,))}, "but has 384 bytes"),
    "wrong number": ({"part-00000/tokens_T.npy": npy(TOKENS[:9])}, r"must have \[9\]"),
    "wrong rank": ({"part-00000/tokens_T.npy": npy(TOKENS[:, None])}, "tokens_T has the shape"),
    "bool": (
        {"part-00000/generated_T.npy": npy(np.full(96, 2, np.uint8), "?")},
        "generated_T holds a byte that is neither true nor false",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MEMBERS.values(), ids=MEMBERS)
def test_wrong_members_are_refused(changes, message, path):
    write(path, make_trace())
    rewrite(path, changes)
    with pytest.raises(DataError, match=rf"out\.npz.*{message}"):
        read_trace(path)


def test_other_versions_are_refused(path):
    write(path, make_trace())
    with zipfile.ZipFile(path) as file:
        header = json.loads(file.read("header.json"))
    rewrite(path, {"header.json": json.dumps({**header, "version": 2})})
    with pytest.raises(DataError, match="of version 2, but this moestro reads version 1"):
        read_trace(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_tricks_are_refused(path):
    write(path, make_trace())
    rewrite(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="is compressed; a trace file is not"):
        read_trace(path)
    write(path, make_trace())
    rewrite(path, extra=[("part-00000/tokens_T.npy", npy(TOKENS))])
    with pytest.raises(DataError, match="two members of one name"):
        read_trace(path)
    write(path, make_trace())
    data = bytearray(path.read_bytes())
    last = data.rindex(b"PK\x01\x02")
    for at in (20, 24):
        data[last + at : last + at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match="claim more bytes than the file has"):
        read_trace(path)


def test_no_trace_is_told(path):
    with pytest.raises(DataError, match=r"out\.npz cannot be read: No such file"):
        read_trace(path)
    with pytest.raises(DataError, match="is not a file"):
        read_trace(path.parent)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(DataError, match=r"not a trace: it has no member header\.json"):
        read_trace(path)
