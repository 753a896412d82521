"""Families that decode in Python, as folders: chats, experts shown, probes, cut prompts."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch

from moestro.checkpoints.opening import open_checkpoint
from moestro.cli.main import main
from moestro.infer.decoding import decoding_of
from moestro.infer.native_decoder import supports
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record

from ..checkpoints.families import tiny

FAMILIES = {
    "lfm2_moe": ("short convolutions", [1, 2, 3]),
    "lfm2_moe_plain": ("short convolutions", [0, 1, 2, 3]),
    "llama4": ("layers without positions", [1, 3]),
    "llama4_plain": ("layers without positions", [0, 1, 2]),
    "deepseek_v32": ("an indexer of positions", [1, 2]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, published, tmp_path_factory):
    """A tiny model of transformers with the vocabulary, tokenizer and template of `published`."""
    place = tmp_path_factory.mktemp(request.param)
    kind, own = tiny.TINY[request.param]
    ends = json.loads((published / "config.json").read_text())
    own = {**own, "vocab_size": 260, **{k: ends[k] for k in ("bos_token_id", "eos_token_id")}}
    try:
        tiny.TINY["spoken"] = (kind, own)
        tiny.save(tiny.build("spoken"), place)
    finally:
        del tiny.TINY["spoken"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(published / name, place / name)
    return place, request.param


def loaded(place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.load(place)


def test_a_chat_is_that_of_transformers(folder, capsys):
    place, name = folder
    model = loaded(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(place)
    ids_BS = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where does it go?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=False,
    )  # fmt: skip
    made = []
    with torch.no_grad():
        while len(made) < 12 and not (made and made[-1] in (257, 258)):
            text_BS = torch.cat([ids_BS, torch.tensor([made], dtype=torch.int64)], dim=1)
            made.append(int(model(text_BS).logits[0, -1].argmax()))
    words = ["generate", str(place), "Where does it go?", "--chat", "--temperature", "0"]
    assert main([*words, "--max-tokens", "12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] == made
    assert answer["layers"] == FAMILIES[name][1]


def test_experts_are_shown(folder, capsys):
    place, name = folder
    words = ["generate", str(place), "hello", "--show-experts", "--max-tokens", "6"]
    assert main([*words, "--temperature", "0"]) == 0
    found = re.search(r"first expert in layer (\d+)", capsys.readouterr().out)
    assert int(found[1]) in FAMILIES[name][1]


def test_what_is_recorded_is_what_transformers_routes(folder):
    """Texts of unlike lengths, padded: both models' routing by the same recorder."""
    place, _ = folder
    generator = torch.Generator().manual_seed(4)
    texts = [Passage(torch.randint(0, 256, (n,), generator=generator)) for n in (21, 9)]
    ours, theirs = (record(each, texts) for each in (open_checkpoint(place).model, loaded(place)))
    assert (np.sort(ours.experts_TLK, -1) == np.sort(theirs.experts_TLK, -1)).all()
    assert len(np.unique(ours.experts_TLK)) > 1


@pytest.mark.slow  # draws figures; what it reads is recorded above
def test_probed(folder, tmp_path, capsys):
    place, name = folder
    (tmp_path / "one.txt").write_text("who goes where, and why not there? " * 40)
    probe = ["probe", str(place), "--source", str(tmp_path), "--out", str(tmp_path / "probe")]
    assert main([*probe, "--tokens", "300", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["moe_layers"] == FAMILIES[name][1]


@torch.no_grad()
def test_batches_and_cut_prompts_say_what_the_whole_says(folder):
    """Several texts side by side, each read in pieces of its own, and then token by token."""
    place, name = folder
    model = open_checkpoint(place).model.eval()
    assert FAMILIES[name][0] in supports(model)
    way, generator = decoding_of(model), torch.Generator().manual_seed(3)
    lengths, pasts = (23, 17, 30), []
    texts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    for text, cuts in zip(texts, ((5, 5), (1, 12), (9, 2)), strict=True):
        past, start = way.new(), 0
        for size in cuts:
            way.read(past, text[start : start + size])
            start += size
        pasts.append((past, start))
    told = [[] for _ in texts]
    while any(start < len(text) for (_, start), text in zip(pasts, texts, strict=True)):
        going = [n for n, (_, start) in enumerate(pasts) if start < len(texts[n])]
        steps = [[texts[n][pasts[n][1]]] for n in going]
        for n, passed in zip(going, way.step(steps, [pasts[n][0] for n in going]), strict=True):
            told[n].append(passed.logits_NV[-1])
            pasts[n] = (pasts[n][0], pasts[n][1] + 1)
    for text, found in zip(texts, told, strict=True):
        whole_SV = model(torch.tensor([text])).logits[0]
        expected = whole_SV[len(text) - len(found) :]
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.stack(found) / scale, expected / scale, rtol=0, atol=1e-5)
