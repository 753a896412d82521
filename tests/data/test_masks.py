import itertools
from pathlib import Path

import pytest
import tokenizers

from moestro.chat import ChatTemplate
from moestro.config import ChatConfig
from moestro.data.chats import Chat
from moestro.data.masks import Labelled, label
from moestro.errors import DataError
from moestro.text import SubwordTokenizer

from .messages import ANSWER, ASK, CALL, SYSTEM, THOUGHT, TOOL

TEMPLATES = Path(__file__).parent.parent / "templates"
SPECIALS = (
    "<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>", "<|im_start|>", "<|im_end|>",
    "<|channel|>", "<|message|>", "<|return|>",
)  # fmt: skip
ENDS = ("</s>", "<|eot|>", "<|im_end|>", "<|return|>")


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with merges, and special tokens; blanks at the ends of words are trimmed
    from its offsets, as in Llama 3's and GPT-2's."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    text = ["Who is it? Be short. Me. assistant user system\n\n think </think>\n\n Ünn é"] * 9
    inner.train_from_iterator(text, trainer)
    inner.add_special_tokens(list(SPECIALS))
    ends = [inner.token_to_id(name) for name in ENDS]
    return SubwordTokenizer(inner, "file", ends[0], ends)


def template(name):
    source = (TEMPLATES / f"{name}.jinja").read_text()
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


# (template, messages, passages: those between « and » are learned).
CASES = [
    (
        "headers", [SYSTEM, ASK, ANSWER, ASK, THOUGHT],
        "<s><|start|>system<|end|>\n\nBe short.<|eot|><|start|>user<|end|>\n\nWho is it?<|eot|>"
        "<|start|>assistant<|end|>\n\n«Ünn é<|eot|>»<|start|>user<|end|>\n\nWho is it?<|eot|>"
        "<|start|>assistant<|end|>\n\n«Me.<|eot|>»",
    ),
    (
        "chatml", [ASK, CALL, TOOL, THOUGHT],
        "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\n"
        '<tool_call>{"name": "sky", "arguments": {"at": "Bonn"}}</tool_call><|im_end|>»\n'
        "<|im_start|>user\n12 °C<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nMe."
        "<|im_end|>»\n",
    ),
    (
        "marked", [ASK, ANSWER, ASK, THOUGHT],
        "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n« Ünn é <|im_end|>»\n"
        "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n«Me.<|im_end|>»\n",
    ),
    (
        "instruct", [ASK, ANSWER, ASK, THOUGHT],
        "<s>[INST] Who is it? [/INST]«  Ünn é </s>»[INST] Who is it? [/INST]« Me.</s>»",
    ),
    (
        "channels", [ASK, THOUGHT],
        "<|start|>user<|message|>Who is it?<|end|><|start|>assistant«<|channel|>analysis<|message|>"
        "hm<|end|><|start|>assistant<|channel|>final<|message|>Me.<|return|>»",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "messages", "passages"), CASES, ids=[case[0] for case in CASES])
def test_each_token_is_a_label_where_the_assistant_wrote_it(name, messages, passages, tokenizer):
    (found,) = label(Chat("x", tuple(messages)), tokenizer, template(name), ChatConfig())
    whole, learned = "", []
    for number, passage in enumerate(passages.replace("»", "«").split("«")):
        whole += passage
        learned += [number % 2 == 1] * len(passage)
    assert found.tokens == tokenizer.encode_prompt(whole, templated=True)
    spelled = b""
    for token, own in zip(found.tokens, found.labels, strict=True):
        spelled += as_bytes(tokenizer, token)
        # The character that the token's last byte belongs to.
        last = len(spelled.decode(errors="ignore")) - (spelled == whole_bytes(spelled))
        assert own == learned[last], (spelled, token)
    assert spelled.decode() == whole


def whole_bytes(raw):
    """The characters of bytes that are complete."""
    return raw.decode(errors="ignore").encode()


def as_bytes(tokenizer, token):
    """What a token spells, by the byte-level alphabet: printable bytes as themselves."""
    if token in tokenizer.specials:
        return tokenizer.specials[token].encode()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + place): byte for place, byte in enumerate(others)}
    return bytes(alphabet[letter] for letter in tokenizer._inner.id_to_token(token))


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("chatml", [ASK, THOUGHT, ASK, THOUGHT]),
        ("instruct", [SYSTEM, ASK, ANSWER, ASK, ANSWER]),
        ("channels", [ASK, THOUGHT, ASK, THOUGHT]),
    ],
)
def test_a_template_that_rewrites_turns_is_refused_or_learned_turn_by_turn(
    name, messages, tokenizer
):
    chat = Chat("f, line 3", tuple(messages))
    with pytest.raises(DataError, match=r"f, line 3: .*message \d.*turns=each"):
        list(label(chat, tokenizer, template(name), ChatConfig()))
    found = list(label(chat, tokenizer, template(name), ChatConfig(turns="each")))
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found) == len(turns)
    for document, turn in zip(found, turns, strict=True):
        before = template(name).render(messages[:turn])
        alone = template(name).render(messages[: turn + 1], reply=False)
        prompt = tokenizer.encode_prompt(before, templated=True)
        assert document.tokens == tokenizer.encode_prompt(alone, templated=True)
        first = document.labels.index(True)
        assert (document.tokens[:first], any(document.labels[:first])) == (prompt, False)


def test_a_text_is_learned_whole_and_a_prompt_not_at_all(tokenizer):
    cfg, end = ChatConfig(), tokenizer.end_of_text
    (text,) = label(Chat("x", completion="Who is it?"), tokenizer, None, cfg)
    assert text.tokens == [*tokenizer.encode("Who is it?"), end]
    assert all(text.labels)
    (pair,) = label(Chat("x", prompt="Who", completion=" is it?"), tokenizer, None, cfg)
    assert pair.tokens == text.tokens
    learned = [token for token, own in zip(*pair, strict=True) if own]
    assert learned == [*tokenizer.encode(" is it?"), end]


def test_a_text_without_a_token_gives_only_its_end():
    """As of blanks, where the tokenizer strips them."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, unk_token="</s>"))
    inner.normalizer = tokenizers.normalizers.Strip()
    stripping = SubwordTokenizer(inner, "file", 0)
    for chat in (Chat("x", prompt=" ", completion=" "), Chat("x", completion=" ")):
        assert list(label(chat, stripping, None, ChatConfig())) == [([0], [True])]


def test_the_end_that_a_tokenizer_adds_is_learned():
    """It stands for no text, so its place in the text says nothing."""
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    ending = SubwordTokenizer(inner, "file", 1, [1])
    (pair,) = label(Chat("x", prompt="a ", completion="b"), ending, None, ChatConfig())
    assert pair == ([0, 2, 3, 1], [False, False, True, True])


WEIGHED = [ASK, {**THOUGHT, "weight": 0}, ASK, {**ANSWER, "weight": 1}, ASK, THOUGHT]


@pytest.mark.parametrize("name", ["marked", "headers"])
@pytest.mark.parametrize("turns", ["all", "each"])
def test_turns_of_weight_0_are_not_learned(name, turns, tokenizer):
    """The tokens are the same, and the labels those of the other turns, token by token."""
    chat = Chat("x", tuple(WEIGHED))
    assert chat.turns == [3, 5]
    cfg = ChatConfig(turns=turns)
    found = list(label(chat, tokenizer, template(name), cfg))
    plain = tuple({k: v for k, v in each.items() if k != "weight"} for each in WEIGHED)
    if turns == "each":
        assert found == list(label(Chat("x", plain), tokenizer, template(name), cfg))[1:]
        return
    (whole,) = label(Chat("x", plain), tokenizer, template(name), cfg)
    (later,) = label(Chat("x", plain, first=2), tokenizer, template(name), cfg)
    assert found == [Labelled(whole.tokens, later.labels)]
    runs = [own for own, _ in itertools.groupby(whole.labels)]
    assert runs.count(True) == 3
    first = whole.labels.index(True)
    end = whole.labels.index(False, first)
    assert later.labels == [own and not first <= n < end for n, own in enumerate(whole.labels)]


def test_what_cannot_be_marked_is_refused(tokenizer):
    cfg, chat = ChatConfig(), Chat("x", (ASK, ANSWER))
    with pytest.raises(DataError, match="no chat template"):
        list(label(chat, tokenizer, None, cfg))
    source = (
        "{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    with pytest.raises(DataError, match="begins a reply otherwise"):
        list(label(chat, tokenizer, ChatTemplate(source, {}), cfg))
    all_marked = ChatTemplate(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", {}
    )
    with pytest.raises(DataError, match="marks 2 passages"):
        list(label(chat, tokenizer, all_marked, cfg))
    hidden = Chat("x", (ASK, {"role": "assistant", "content": "\ufdd0"}))
    with pytest.raises(DataError, match=r"U\+FDD0"):
        list(label(hidden, tokenizer, all_marked, cfg))


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_turn_is_refused_as_such_or_learned_to_its_end(content, tokenizer):
    empty = {"role": "assistant", "content": content}
    source = (
        "{% for m in messages %}<|start|>{{ m.role }}<|end|>"
        "{{ m.content | string | trim(' \n') }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
    )
    with pytest.raises(DataError, match=r"message 1\) is empty.*weight"):
        list(label(Chat("x", (ASK, empty)), tokenizer, ChatTemplate(source, {}), ChatConfig()))
    ending = source.replace("{% endfor %}", "<|eot|>{% endfor %}")
    chat = Chat("x", (ASK, empty))
    (found,) = label(chat, tokenizer, ChatTemplate(ending, {}), ChatConfig())
    learned = [token for token, own in zip(*found, strict=True) if own]
    assert [tokenizer.specials[token] for token in learned] == ["<|eot|>"]
