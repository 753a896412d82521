from collections import defaultdict

import pytest
import torch
from torch import nn

from moestro.config import EncDecConfig
from moestro.errors import DataError, MoestroError
from moestro.infer.decoding import decoding_of
from moestro.infer.engine import generate_batch, stream
from moestro.infer.prompts import encode_source, gap_tokens
from moestro.infer.sampling import SamplingConfig, new_generator, next_tokens
from moestro.models.cache import CrossSource, KVCache
from moestro.models.encdec import START_TOKEN, EncDec, Encoded
from moestro.models.network import ModelOutput
from moestro.text import ByteTokenizer

BYTES = ByteTokenizer()
VOCAB = 256 + 3  # three gaps: 258, 257, 256
GREEDY = SamplingConfig(temperature=0.0)


POSITIONS = {
    "positions": {"kind": "relative", "shared": True, "buckets": 8, "max_distance": 12},
}


def settings(**changes) -> EncDecConfig:
    """Of a small model with a mixture in each layer."""
    values = {
        "vocab_size": VOCAB,
        "dim": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "attention": {"num_heads": 2, "context": 12, **POSITIONS},
        "moe": {"hidden_dim": 16, "num_experts": 4, "top_k": 2},
        "head": {"tied": False},
    }
    return EncDecConfig(**(values | changes))


class Cacheless(nn.Module):
    def new_cache(self) -> KVCache:
        return KVCache(())


class Scripted(nn.Module):
    """An encoder-decoder that says given tokens in order."""

    def __init__(self, *says: int, context: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(1, 1)
        self.cfg = settings(vocab_size=VOCAB, attention={"context": context, **POSITIONS})
        self.decoder = Cacheless()
        self.says = says
        self.sources: list[list[int]] = []
        self.calls: list[list[int]] = []
        self.eval()

    def encode(self, source_BS: torch.Tensor) -> Encoded:
        self.sources.append(source_BS[0].tolist())
        return Encoded(source_BS, ())

    def look(self, memory: torch.Tensor) -> CrossSource:
        return CrossSource((), None)

    def decode(self, tokens_BT: torch.Tensor, cache: object) -> ModelOutput:
        self.calls.append(tokens_BT[0].tolist())
        logits_BTV = torch.zeros(1, tokens_BT.shape[1], VOCAB)
        said = len(self.calls) - 1
        logits_BTV[0, -1, self.says[said] if said < len(self.says) else 0] = 9.0
        return ModelOutput(logits_BTV, ())


def tiny(**changes) -> EncDec:
    """A model with weights that make it say various things."""
    torch.manual_seed(0)
    model = EncDec(settings(**changes)).eval()
    nn.init.normal_(model.decoder.relative.weight)
    return model


def joined(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def test_text_tokens_and_finish():
    model = Scripted(*b"hello")
    pieces = list(stream(model, BYTES, "source", GREEDY))
    assert joined(pieces) == "hello"
    assert [piece.finish for piece in pieces] == [None] * 5 + ["end_of_text"]
    assert model.sources == [[*b"source", 0]]
    assert model.calls == [[START_TOKEN], *([byte] for byte in b"hello")]


def test_length_and_stop_strings_end_the_text():
    sampling = SamplingConfig(temperature=0.0, max_tokens=3)
    pieces = list(stream(Scripted(*b"hello"), BYTES, "x", sampling))
    assert (joined(pieces), pieces[-1].finish) == ("hel", "length")
    sampling = SamplingConfig(temperature=0.0, stop=("lo",))
    pieces = list(stream(Scripted(*b"hello there"), BYTES, "x", sampling))
    assert (joined(pieces), pieces[-1].finish) == ("hel", "stop")


def test_gaps_are_read_and_written_as_text():
    assert gap_tokens(BYTES, VOCAB) == {f"<extra_id_{n}>": 258 - n for n in range(3)}
    model = Scripted(258, *b"ca", 257, *"é".encode())
    pieces = list(stream(model, BYTES, "the <extra_id_0>t s<extra_id_1>t <extra_id_7>", GREEDY))
    assert model.sources == [[*b"the ", 258, *b"t s", 257, *b"t <extra_id_7>", 0]]
    assert joined(pieces) == "<extra_id_0>ca<extra_id_1>é"
    assert pieces[0].token == 258


def test_half_a_character_before_a_gap_comes_out_before_it():
    pieces = list(stream(Scripted("é".encode()[0], 258), BYTES, "x", GREEDY))
    assert joined(pieces) == "\ufffd<extra_id_0>"


class Known(ByteTokenizer):
    """Bytes, and a gap of its own as T5's tokenizer has; it ends a prompt itself."""

    vocab_size = 257

    def encode_prompt(self, text: str, *, templated: bool = False) -> list[int]:
        return [256] if text == "<extra_id_0>" else [*text.encode(), 0]


def test_a_tokenizer_that_knows_gaps_and_ends_is_left_to_it():
    assert gap_tokens(Known(), 257) == {"<extra_id_0>": 256}
    assert encode_source(Known(), "ab", 64, 257) == ([97, 98, 0], 0)


def test_without_gaps_ids_beyond_the_tokenizer_are_never_said():
    class NoRoom(ByteTokenizer):
        vocab_size = 259

    assert gap_tokens(NoRoom(), VOCAB) == {}
    many = Scripted(100)
    many.cfg = settings(vocab_size=500)  # more than there are gaps
    logits_BTV = torch.zeros(1, 1, 500)
    logits_BTV[..., 300], logits_BTV[..., 100] = 9.0, 8.0
    many.decode = lambda tokens_BT, cache: ModelOutput(logits_BTV, ())
    sampling = SamplingConfig(temperature=0.0, max_tokens=1)
    assert [piece.token for piece in stream(many, BYTES, "x", sampling)] == [100]


def test_a_long_source_keeps_its_beginning_and_an_end():
    assert encode_source(BYTES, "abcdef", 4, 256) == ([*b"abc", 0], 3)
    assert encode_source(BYTES, "abc", 4, 256) == ([*b"abc", 0], 0)
    assert encode_source(BYTES, "", 4, 256) == ([0], 0)
    assert encode_source(BYTES, [5, 6, 0], 4, 256) == ([5, 6, 0], 0)
    for wrong in (256, -1, 2.0, [3]):
        with pytest.raises(DataError, match="the model's vocabulary"):
            encode_source(BYTES, [5, wrong], 4, 256)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_nothing(temperature):
    model = tiny()
    sampling = SamplingConfig(temperature=temperature, max_tokens=24, seed=3)
    pieces = list(stream(model, BYTES, "a source", sampling))
    source_BS, said = torch.tensor([[*b"a source", 0]]), [START_TOKEN]
    generator = new_generator(sampling)
    for piece in pieces:
        with torch.inference_mode():
            output = model(source_BS, torch.tensor([said]))
        assert piece.token == int(next_tokens(output.logits[:, -1], sampling, [generator]))
        said.append(piece.token)
    assert len(pieces) > 8
    with torch.inference_mode():
        routings = model(source_BS, torch.tensor([said])).routings
    assert len(routings) == 5
    for place, routing in enumerate(routings[2:]):
        firsts = routing.experts_TK()[1:, 0].tolist()
        got = [piece.experts[place] for piece in pieces if piece.experts]
        assert got == firsts[: len(got)]


def test_a_seed_gives_the_same_text():
    texts = [
        joined(stream(tiny(), BYTES, "a", SamplingConfig(temperature=1.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_training_mode_and_a_token_that_the_model_does_not_know_are_refused():
    with pytest.raises(MoestroError, match=r"model\.eval"):
        next(stream(tiny().train(), BYTES, "a", SamplingConfig()))
    small = tiny(vocab_size=100)
    pieces = list(stream(small, BYTES, "A", SamplingConfig(temperature=9.0, max_tokens=50)))
    assert max(piece.token for piece in pieces) < 100
    with pytest.raises(DataError, match=r"the source has token 122, 'z', but .* 0 to 99"):
        next(stream(small, BYTES, "az", SamplingConfig()))


def test_the_decoders_start_counts_for_the_repetition_penalty():
    logits_BTV = torch.zeros(1, 1, VOCAB)
    logits_BTV[..., START_TOKEN], logits_BTV[..., 65] = 9.0, 8.0
    model = Scripted()
    model.decode = lambda tokens_BT, cache: ModelOutput(logits_BTV, ())
    sampling = SamplingConfig(temperature=0.0, max_tokens=1, repetition_penalty=2.0)
    assert [piece.token for piece in stream(model, BYTES, "x", sampling)] == [65]


def test_requests_written_together_get_what_they_would_get_alone():
    model = tiny()
    prompts = ["a source", "another, much longer than the context", "", "a source"]
    samplings = [SamplingConfig(seed=seed, max_tokens=5 + seed) for seed in range(4)]
    together = defaultdict(list)
    for number, piece in generate_batch(model, BYTES, prompts, samplings):
        together[number].append(piece)
    for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        assert together[number] == list(stream(model, BYTES, prompt, sampling))


def test_a_source_is_read_once_and_forks_go_their_own_way():
    model = tiny()
    decoding = decoding_of(model)
    past = decoding.new()
    first = decoding.read(past, [*b"a source", 0])
    twin = past.fork()
    (one,), (other,) = decoding.step([[7]], [past]), decoding.step([[9]], [twin])
    with torch.inference_mode():
        for passed, said in ((first, []), (one, [7]), (other, [9])):
            target_BT = torch.tensor([[START_TOKEN, *said]])
            output = model(torch.tensor([[*b"a source", 0]]), target_BT)
            torch.testing.assert_close(passed.logits_NV, output.logits[:, -1])
    together = decoding.step([[5], [6]], [past, twin])
    longer = decoding.read(past, [6, 7])
    assert past.position == 5
    assert twin.position == 3
    assert len(together[0].experts) == len(longer.experts) == 3
