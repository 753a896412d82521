"""One text as it is written: special tokens, channels, characters in bytes, stop strings."""

from collections.abc import Sequence

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moestro.infer.sampling import SamplingConfig, next_tokens
from moestro.infer.writing import Piece, Writer, masked, restricted
from moestro.text import SubwordTokenizer

MARKS = ("<|endoftext|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<x>")


def tokenizer_of(*specials: str) -> SubwordTokenizer:
    """Bytes and these special tokens, of which the first two end a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({sign: n for n, sign in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(specials))
    return SubwordTokenizer(inner, "file", 256, [257])


HARMONY = tokenizer_of(*MARKS)
REPLY = (
    "<|channel|>analysis<|message|>they greet 👋<|end|><|start|>assistant"
    "<|channel|>final<|message|>hello\n<|end|><|start|>assistant<|message|>again<|return|>"
)


def written(
    text: str | Sequence[int],
    tokenizer: SubwordTokenizer = HARMONY,
    prompt: str = "",
    special: bool = False,
    **sampling: object,
) -> list[Piece]:
    """What a Writer makes of a model that says `text`."""
    ids = tokenizer.encode_prompt(text) if isinstance(text, str) else text
    writer = Writer(
        tokenizer,
        SamplingConfig(**{"temperature": 0.0, "max_tokens": 10_000, **sampling}),
        tokenizer.specials if special else None,
        tokenizer.encode_prompt(prompt),
    )
    pieces: list[Piece] = []
    for token in ids:
        pieces += writer.choose(torch.nn.functional.one_hot(torch.tensor([token]), 300).float())
        if not writer.done:
            pieces += writer.passed(())
        if writer.done:
            break
    return pieces


def joined(pieces: Sequence[Piece], channel: str | None = None) -> str:
    return "".join(each.text for each in pieces if channel in (None, each.channel))


def test_special_tokens_are_breaks() -> None:
    assert joined(written(REPLY)) == (
        "analysis\nthey greet 👋\nassistant\nfinal\nhello\nassistant\nagain"
    )
    assert joined(written("<x><x>one<x><x>two<x>")) == "one\ntwo\n"
    assert joined(written("one\n<x>two")) == "one\ntwo"


def test_special_tokens_are_spelled_where_that_is_asked_for() -> None:
    assert joined(written(REPLY, special=True)) == REPLY.removesuffix("<|return|>")
    stopped = written(REPLY, special=True, stop=("<|end|>",))
    assert joined(stopped) == "<|channel|>analysis<|message|>they greet 👋"
    assert stopped[-1].finish == "stop"


def test_half_a_character_comes_out_before_a_special_token() -> None:
    lead = HARMONY.encode("é")[0]
    ids = [lead, *HARMONY.encode_prompt("<x>a")]
    assert joined(written(ids)) == "\ufffd\na"
    assert joined(written(ids, special=True)) == "\ufffd<x>a"


def test_each_text_is_in_its_channel() -> None:
    pieces = written(REPLY)
    assert joined(pieces, "analysis") == "they greet 👋\n"
    assert joined(pieces, "final") == "hello\nagain"
    assert {piece.channel for piece in pieces} == {"analysis", "final", ""}
    assert pieces[-1] == Piece("", 257, (), "end_of_text", "final")


def test_a_prompt_may_begin_a_channel() -> None:
    start = "<|start|>user<|message|>hi<|end|><|start|>assistant"
    assert joined(written("<|message|>ok", prompt=start), "final") == "ok"
    begun = f"{start}<|channel|>commentary to=functions.f <x>json<|message|>"
    addressed = f"{start} to=functions.f<|channel|>commentary <x>json<|message|>"
    for prompt in (begun, addressed):
        pieces = written("{}<|end|>", prompt=prompt)
        assert joined(pieces, "commentary to=functions.f") == "{}\n"
    assert joined(written("lysis<|message|>a", prompt=f"{start}<|channel|>ana"), "analysis") == "a"


def test_without_channels_all_is_final() -> None:
    plain = tokenizer_of("<|endoftext|>", "</s>", "<|channel|>")
    assert {piece.channel for piece in written("a<|channel|>b", plain)} == {"final"}


@pytest.mark.parametrize("special", [False, True])
@given(
    data=st.lists(st.integers(0, 255) | st.integers(0xC0, 0xF4) | st.just(262), max_size=60),
    stop=st.sampled_from([(), ("a",), ("\n",)]),
)
def test_nothing_is_lost(special: bool, data: list[int], stop: tuple[str, ...]) -> None:
    """Of any tokens, between special ones, the text is what `decode` gives for each run."""
    runs: list[list[int]] = [[]]
    for token in data:
        runs = [*runs, []] if token == 262 else [*runs[:-1], [*runs[-1], token]]
    texts = [HARMONY.decode(run) for run in runs]
    want = "<x>".join(texts) if special else texts[0]
    for text in texts[1:] if not special else []:
        want += ("" if want.endswith("\n") or not want else "\n") + text
    for each in stop:
        want = want.split(each)[0]
    assert joined(written(data, special=special, stop=stop, max_tokens=len(data) or 1)) == want


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("count", [1, 5, 32, 33, 200, 256])
def test_few_allowed_tokens_are_chosen_as_by_the_mask(count: int, temperature: float) -> None:
    """256 tokens, of which the last 6 have no place in the constraint."""
    generator = torch.Generator().manual_seed(count)
    settings = SamplingConfig(temperature=temperature, top_k=40, top_p=0.95)
    for seed in range(20):
        logits_1V = torch.randn(1, 256, generator=generator)
        allowed_N = torch.zeros(250, dtype=torch.bool)
        allowed_N[torch.randperm(250, generator=generator)[:count]] = True
        draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
        want = int(next_tokens(masked(logits_1V, allowed_N), settings, draws[:1]))
        few_1N, ids_N = restricted(logits_1V, allowed_N)
        assert (ids_N is not None) == (count <= 32)
        found = int(next_tokens(few_1N, settings, draws[1:]))
        assert allowed_N[want]
        assert (found if ids_N is None else int(ids_N[found])) == want


def test_nothing_allowed_is_for_the_sampler_to_refuse() -> None:
    logits_1V, ids_N = restricted(torch.zeros(1, 16), torch.zeros(16, dtype=torch.bool))
    assert ids_N is None
    assert logits_1V.isneginf().all()
