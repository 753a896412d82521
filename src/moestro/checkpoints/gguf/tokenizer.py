"""The tokenizer of a GGUF file as the files of Hugging Face's layout: tokenizer.json and more.

Byte-level BPE is told by `tokenizer.ggml.pre`, the name of the rule by which a text is cut before
merging; an unknown name is refused, since another rule gives other tokens and worse text.
SentencePiece's BPE has scores instead of merges, from which the merges follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from moestro.checkpoints.gguf.fields import flag, given, numbers, text, texts, whole
from moestro.checkpoints.gguf.header import Header
from moestro.errors import ConfigError

_KEY = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

# The rules that published tokenizer.json files state, by llama.cpp's names for them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_AFTER}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_AFTER}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DIGITS = "digits"  # each digit alone, then GPT-2's rule
_GPT2 = "gpt2"
RULES: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jais", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), _QWEN2),
    "qwen35": _QWEN35,
    **dict.fromkeys(("gpt-4o", "minimax-m2"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
}
# Files of these rules whose texts are brought into one form of each letter first.
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "qwen35")
# Whose whole words are taken as they are, merged or not; and begin with a mark unless it is said.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
# What llama.cpp takes for the end of a text beside those stated, if it is a control token.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")
_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(header: Header) -> dict[str, Any]:
    """tokenizer.json and the files beside it, by name, each an object or a text.

    Raises:
        ConfigError: it is one that is not read, or a field of it is; says what to do.
    """
    tokens = texts(header, f"{_KEY}tokens")
    if not tokens:
        return {}
    made = _tokenizer(header, tokens)
    names = {name: _token(header, tokens, key) for name, key in _IDS.items()}
    settings: dict[str, Any] = {name: token for name, token in names.items() if token is not None}
    ends = _ends(header, tokens)
    files: dict[str, Any] = {
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": settings | {"tokenizer_class": "PreTrainedTokenizerFast"},
        "generation_config.json": {"eos_token_id": ends},
    }
    template = text(header, "tokenizer.chat_template")
    if template is not None:
        files["chat_template.jinja"] = template
    return files


def _tokenizer(header: Header, tokens: Sequence[str]) -> Tokenizer:
    model = text(header, f"{_KEY}model")
    if model == "gpt2":
        made = _byte_level(header, tokens)
    elif model == "llama":
        made = _sentencepiece(header, tokens)
    else:
        raise ConfigError(
            f"{header.file}: its tokenizer is {model!r:.80}; read are gpt2 (BPE) and llama "
            f"(SentencePiece). {_instead(header)}"
        )
    _add_tokens(made, header, tokens)
    first = _token(header, tokens, "bos")
    if first is not None and _begins(header, model):
        number = whole(header, f"{_KEY}bos_token_id")
        # By a name of our own: of a token's text, "$A" and ":1" would have a meaning.
        mark = {"id": "bos", "ids": [number], "tokens": [first]}
        made.post_processor = TemplateProcessing(
            single="bos $A", pair="bos $A bos $B", special_tokens=[mark]
        )
    return made


def _instead(header: Header) -> str:
    return (
        f"Put the model's own tokenizer.json into {header.file}.moestro, or give the model in "
        "Hugging Face's layout"
    )


def _begins(header: Header, model: str) -> bool:
    """Whether a text begins with a mark, where the file does not say by llama.cpp's defaults."""
    usual = model == "llama" or text(header, f"{_KEY}pre") in _WHOLE_WORDS
    return flag(header, f"{_KEY}add_bos_token", usual)


def _byte_level(header: Header, tokens: Sequence[str]) -> Tokenizer:
    name, merges = text(header, f"{_KEY}pre"), texts(header, f"{_KEY}merges")
    if name is None or name not in RULES:
        raise ConfigError(
            f"{header.file}: its tokenizer cuts texts by the rule {name!r:.80}, which is not known "
            f"here; known are {', '.join(sorted(RULES))}. {_instead(header)}"
        )
    if merges is None:
        raise ConfigError(f"{header.file} has tokens but no {_KEY}merges. {_instead(header)}")
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    vocab = _vocabulary(header, tokens)
    wrong = [p for p in pairs if len(p) != 2 or not {*p, p[0] + p[-1]} <= vocab.keys()]
    if wrong:
        raise ConfigError(f"{header.file}: its tokenizer merges {wrong[0]}, which are no tokens")
    model = models.BPE(vocab, pairs, ignore_merges=name in _WHOLE_WORDS)
    made = Tokenizer(model)
    rule = RULES[name]
    steps: list[Any] = []
    if rule == _DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif rule != _GPT2:
        patterns = (rule,) if isinstance(rule, str) else rule
        steps += [pre_tokenizers.Split(Regex(each), "isolated") for each in patterns]
    steps.append(pre_tokenizers.ByteLevel(False, use_regex=rule in (_DIGITS, _GPT2)))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    if name in _COMPOSED:
        made.normalizer = normalizers.NFC()
    return made


def rule_of(tokenizer_json: Mapping[str, Any]) -> str | None:
    """The name of the rule by which a tokenizer.json cuts texts, if it is a known one."""
    given = tokenizer_json.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    patterns = tuple(step["pattern"].get("Regex") for step in steps if step.get("type") == "Split")
    digits = any(step.get("type") == "Digits" for step in steps)
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    wanted: Any = patterns if len(patterns) > 1 else patterns[0] if patterns else None
    if wanted is None:
        wanted = _DIGITS if digits else _GPT2
    whole = tokenizer_json.get("model", {}).get("ignore_merges") is True
    names = [name for name, rule in RULES.items() if rule == wanted]
    return next((name for name in names if (name in _WHOLE_WORDS) == whole), None)


def _sentencepiece(header: Header, tokens: Sequence[str]) -> Tokenizer:
    vocab = _vocabulary(header, tokens)
    stated = numbers(header, f"{_KEY}scores")
    scores = np.zeros(len(tokens)) if stated is None else stated.astype(np.float64)
    if len(scores) != len(tokens):
        raise ConfigError(f"{header.file} has {len(scores)} scores for {len(tokens)} tokens")
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        for cut in range(1, min(len(token), 64)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((score, vocab[left], vocab[right], left, right))
    # The best score first; of equal ones, as transformers' converter orders them.
    merges.sort(key=lambda each: (-each[0], each[1], each[2]))
    unknown = _token(header, tokens, "unknown")
    pairs = [(left, right) for *_, left, right in merges]
    made = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    after: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if flag(header, f"{_KEY}add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    made.normalizer, made.decoder = normalizers.Sequence(steps), decoders.Sequence(after)
    return made


def _vocabulary(header: Header, tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ConfigError(f"{header.file}: two of its tokens are spelled the same")
    return vocab


def _add_tokens(made: Tokenizer, header: Header, tokens: Sequence[str]) -> None:
    """Control tokens are special; tokens that users defined stay whole and are shown."""
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [tokens[number] for number in _of_kind(header, tokens, kind)]
        added = [AddedToken(name, normalized=False, special=special) for name in found if name]
        (made.add_special_tokens if special else made.add_tokens)(added)


def _of_kind(header: Header, tokens: Sequence[str], kind: int) -> list[int]:
    """The numbers of the tokens of a kind; of a file that says no kinds, none."""
    kinds = numbers(header, f"{_KEY}token_type")
    if kinds is None or not len(kinds):
        return []
    if len(kinds) != len(tokens):
        raise ConfigError(f"{header.file} has {len(kinds)} kinds for {len(tokens)} tokens")
    return np.flatnonzero(kinds == kind).tolist()


def _token(header: Header, tokens: Sequence[str], key: str) -> str | None:
    """The token that a file states for a use; a number of no token states none, as in llama.cpp."""
    number = given(header, f"{_KEY}{key}_token_id", whole)
    return None if number is None or not 0 <= number < len(tokens) else tokens[number]


def _ends(header: Header, tokens: Sequence[str]) -> list[int]:
    keys = [f"{_KEY}{key}_token_id" for key in ("eos", "eot", "eom")]
    stated = [given(header, key, whole) for key in keys]
    control = {tokens[number]: number for number in _of_kind(header, tokens, _CONTROL)}
    known = [control[name] for name in _ENDS if name in control]
    found = [each for each in stated if each is not None and 0 <= each < len(tokens)]
    return list(dict.fromkeys(found + known))
