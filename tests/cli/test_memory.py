"""--memory: the same text in less memory, said beforehand and afterwards, or refused."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from moestro.checkpoints import streamed
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.gguf.writing import write_gguf
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.cli.budget import _rates
from moestro.cli.main import main
from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.kernels import native_cpu
from moestro.models import budget
from moestro.models.decoder import Decoder
from moestro.probe.recording.tracefile import write_parts
from moestro.text import ByteTokenizer, train_bpe

from ..probe.traces import make_trace

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)
SIZES = {
    "dim": 32,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "context": 128},
    "moe": {"hidden_dim": 32, "num_experts": 4, "top_k": 2},
}
GENERATE = ["--max-tokens", "12", "--seed", "1"]


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts of the first mixture and one of the second, whatever is asked for."""

    def fit(needs: budget.Needs, memory: int) -> budget.Budget:
        budget.fit(needs, memory)
        return budget.fit(needs, needs.fixed + 3 * max(m.slab_bytes for m in needs.mixtures))

    monkeypatch.setattr(streamed, "fit", fit)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder."""
    torch.manual_seed(0)
    with atomic_folder(tmp_path / "run/checkpoints/step-000001") as folder:
        save_model(Decoder(ModelConfig(vocab_size=257, **SIZES)).eval(), folder)
        ByteTokenizer().save(folder)
    return tmp_path / "run"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A GGUF file."""
    torch.manual_seed(0)
    tokenizer, place = train_bpe(["words to cut into tokens"] * 4, 280), tmp_path / "tokenizer"
    place.mkdir()
    tokenizer.save(place)
    cfg = ModelConfig(vocab_size=tokenizer.vocab_size, head={"tied": False}, **SIZES)
    write_gguf(Decoder(cfg), tmp_path / "a.gguf", family="mixtral", kind="q8_0", tokenizer=place)
    return tmp_path / "a.gguf"


def test_a_gguf_file_gives_the_text_that_it_gives_in_memory(
    gguf: Path, tight: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(gguf), "words", *GENERATE]) == 0
    whole = capsys.readouterr()
    assert main(["generate", str(gguf), "words", *GENERATE, "--memory", "64GiB"]) == 0
    small = capsys.readouterr()
    assert small.out == whole.out
    said = " ".join(small.err.split())
    assert "1 to 2 of 4 of each of 2 mixtures" in said
    assert "fewer experts than one token wants" in said
    assert re.search(r"measured on this model: .* tokens/s expected \(random routing", said)
    found = re.search(r"12 tokens, .*; ([\d.]+)% of the experts wanted .* waiting for them", said)
    assert found is not None
    assert float(found[1]) < 100


def test_a_trace_beside_the_checkpoint_says_what_is_hit(
    run: Path, tight: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "checkpoints/step-000001"
    words = ["generate", str(run), "words", *GENERATE, "--weights", "int8", "--memory", "64GiB"]
    trace = folder / "trace.npz"
    write_parts(trace, [make_trace(experts=4, top_k=2, layers=2, lengths=(60,))])
    assert main(words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"in memory when wanted \d+% \(simulated on trace.npz\)", said)
    assert re.search(r"[\d.,]+ tokens/s expected \(simulated on trace.npz\)", said)
    trace.unlink()
    write_parts(trace, [make_trace(experts=8, top_k=2, layers=2, lengths=(60,))])
    assert main(words) == 0
    assert "trace.npz is of another model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("1MiB", r"1 MiB is too small: the process takes [\d,]+ MiB.*give at least \d+MiB"),
        ("much", r"'much' is not a number of bytes.*24GiB.*auto or none"),
        ("-3GiB", "is not a number of bytes"),
        ("0GiB", "is not a number of bytes"),
    ],
)
def test_what_is_refused(
    run: Path, memory: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run), "a", "--weights", "int8", f"--memory={memory}"]) == 2
    told = capsys.readouterr()
    assert re.search(said, " ".join(told.err.split()))
    assert not told.out
    assert not list(run.rglob("packed-*"))  # refused before anything is written


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize(("chunk", "more"), [(None, 0), (512, 0), (600, 88), (9000, 4096 - 512)])
def test_a_longer_chunk_of_a_prompt_is_asked_for(
    command: str, chunk: int | None, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = SIZES["attention"] | {"context": 4096}
    with atomic_folder(tmp_path / "run/checkpoints/step-000001") as folder:
        cfg = ModelConfig(vocab_size=257, **SIZES | {"attention": attention})
        save_model(Decoder(cfg).eval(), folder)
        ByteTokenizer().save(folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = []

    def fit(needs: budget.Needs, memory: int) -> budget.Budget:
        found.append(needs.more)
        raise ConfigError("seen")

    monkeypatch.setattr(streamed, "fit", fit)
    words = [command, str(tmp_path / "run"), "--weights", "int8", "--memory", "64GiB"]
    words += ["--port", "0"] if command == "serve" else []
    assert main(words + ([] if chunk is None else ["--chunk", str(chunk)])) == 2
    assert set(found) == {more}


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_a_chunk_without_a_budget_is_refused(
    run: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step-000001/chat_template.jinja").write_text("{{ messages[0].content }}")
    words = [command, str(run), "--chunk", "600"]
    assert main(words + (["--port", "0"] if command == "serve" else [])) == 2
    assert "--chunk 600 is for experts" in " ".join(capsys.readouterr().err.split())


def test_weights_as_they_are_cannot_be_read_an_expert_at_a_time(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run), "a", "--memory", "64GiB"]) == 2
    assert "add --weights int8" in " ".join(capsys.readouterr().err.split())


def test_the_smallest_budget_that_is_named_works(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(run), "a", *GENERATE, "--weights", "int8", "--memory"]
    assert main([*words, "1MiB"]) == 2
    least = re.search(r"give at least (\d+MiB)", " ".join(capsys.readouterr().err.split()))
    assert least is not None
    assert main([*words, least[1]]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
@pytest.mark.parametrize(
    ("vocabulary", "tied", "dtype", "experts", "hidden"),
    [
        (257, False, torch.bfloat16, 64, 1024),
        (65536, True, torch.float16, 4, 64),
        (65536, True, torch.float32, 4, 64),
    ],
    ids=["many experts", "a tied head in fp16", "a tied head in fp32"],
)
def test_the_smallest_budget_holds_what_packing_takes(
    vocabulary: int, tied: bool, dtype: torch.dtype, experts: int, hidden: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One mixture of many experts, whose packed form is larger than what running takes; a head."""
    cfg = ModelConfig(
        vocab_size=vocabulary, dim=512, num_layers=1, attention={"context": 128},
        moe={"hidden_dim": hidden, "num_experts": experts, "top_k": 2}, head={"tied": tied},
    )  # fmt: skip
    write_pretrained(Decoder(cfg).to(dtype).eval(), tmp_path / "model", family="mixtral")
    ByteTokenizer().save(tmp_path / "model")

    def generate(memory: str) -> tuple[int, str, int]:
        words = ["generate", str(tmp_path / "model"), "a", "--weights", "int8", "--memory", memory]
        code = f"import sys; from moestro.cli.main import main; status = main({words + GENERATE})"
        code += "; print(open('/proc/self/status').read()); sys.exit(status)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
        assert peak is not None, done.stderr
        return done.returncode, " ".join(done.stderr.split()), int(peak[1]) << 10

    leasts = []
    for _ in range(2):  # the second time the packed form is there
        status, told, _ = generate("1MiB")
        least = re.search(r"give at least (\d+)MiB", told)
        assert (status, least is None) == (2, False)
        leasts.append(int(least[1]) << 20)
        status, told, peak = generate(f"{least[1]}MiB")
        assert status == 0, told
        assert peak <= 1.02 * leasts[-1]
    if tied:
        return
    assert leasts[1] < leasts[0] - (32 << 20)
    assert main(["plan", str(tmp_path / "model"), "--dtype", "int8", "--memory", "100MiB"]) == 0
    said = capsys.readouterr().out
    planned = (
        re.search(r"runs from --memory (\d+)MiB", said),
        re.search(r"takes --memory (\d+)", said),
    )
    for least, found in zip(reversed(leasts), planned, strict=True):
        assert found is not None, said
        assert abs((int(found[1]) << 20) / least - 1) < 0.15


def limited_group() -> tuple[Path, str, str]:
    """A new control group of version 1 or 2, its limit's file, and that of its most use."""
    for root, most, peak in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        ("/sys/fs/cgroup", "memory.max", "memory.peak"),
    ):
        group = Path(root, f"moestro-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            if (group / most).exists():
                return group, most, peak
            group.rmdir()
    pytest.skip("no control group of memory can be made here")


@pytest.mark.slow
def test_a_control_group_of_the_budget_kills_nobody(run: Path) -> None:
    """The smallest budget, as the limit of a group that the process is in from its start on."""
    group, most, peak = limited_group()
    program = [Path(sys.executable).with_name("moestro"), "generate", run, "a", *GENERATE]

    def generate(memory: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, "--weights", "int8", "--memory", memory],
            preexec_fn=lambda: (group / "cgroup.procs").write_text("0"),
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    try:
        least = re.search(r"give at least (\d+)MiB", " ".join(generate("1MiB").stderr.split()))
        assert least is not None
        limit = int(least[1]) << 20
        (group / most).write_text(str(limit))
        done = generate(f"{least[1]}MiB")
        assert done.returncode == 0, done.stderr
        assert int((group / peak).read_text()) <= limit
    finally:
        time.sleep(0.2)  # the group is left when its last process is gone
        group.rmdir()


def test_an_int8_cache_of_a_model_that_decodes_in_python(
    tmp_path: Path, tight: None, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = {**SIZES["attention"], "positions": {"skipped_every": 2}}
    cfg = ModelConfig(vocab_size=257, **{**SIZES, "attention": attention})
    with atomic_folder(tmp_path / "run/checkpoints/step-000001") as folder:
        save_model(Decoder(cfg).eval(), folder)
        ByteTokenizer().save(folder)
    words = ["generate", str(tmp_path / "run"), "words", *GENERATE, "--weights", "int8"]
    texts = []
    for memory in ("none", "64GiB"):
        assert main([*words, "--cache", "int8", "--memory", memory]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("room", "most"), [(1, 1), (3, 3), (9, 4)])
def test_rates_are_measured_in_what_the_budget_leaves(
    monkeypatch: pytest.MonkeyPatch, room: int, most: int
) -> None:
    """One mixture of large experts leaves room for few of them, and nothing is loaded yet."""
    slab, asked = 100 << 20, list[int]()

    def read_rate(_: Path, piece: int, threads: int = 1, seconds: float = 0) -> float:
        assert piece == slab
        asked.append(threads)
        return 1.0

    monkeypatch.setattr(streamed, "read_rate", read_rate)
    needs = budget.Needs(300 << 20, 0, 0, 0, (budget.Mixture(slab, 9, 1),))
    _rates(budget.fit(needs, (300 << 20) + room * slab), Path("file"))
    assert asked == [1, most]


def test_bench_says_what_was_hit_and_read(
    run: Path, tight: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(run), "--prompt", "8", "--tokens", "4", "--rounds", "1", "--json"]
    assert main([*words, "--weights", "int8", "--memory", "64GiB"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["hit_rate"] < 1
    assert row["file_bytes"] > 0
