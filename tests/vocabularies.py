"""Tokenizers as published ones are built."""

import tokenizers
from tokenizers import decoders, models, normalizers

from moestro.text import SubwordTokenizer


def byte_fallback(letters: str = "abcdefghijklmnopqrstuvwxyz漢é") -> SubwordTokenizer:
    """A tokenizer as Llama 2's and Mixtral's: tokens of letters, the rest spelled in bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = [("▁", "a"), ("a", "b"), ("t", "h")]
    names += [left + right for left, right in merges]
    vocab = {name: number for number, name in enumerate(names)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return SubwordTokenizer(inner, "file", 2)
