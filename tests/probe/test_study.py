import json

import numpy as np
import pytest
import torch

from moestro.errors import DataError, MoestroError
from moestro.probe.recording.passages import Passage
from moestro.probe.study import halves, read_study, record_study, same_tokens
from moestro.text import ByteTokenizer

from .deciders import decoder


def texts(documents=4):
    torch.manual_seed(0)
    return [
        Passage(torch.randint(20 * place, 20 * place + 20, (12,)), domain, f"{domain}/{number}")
        for place, domain in enumerate(("code", "prose"))
        for number in range(documents)
    ]


def test_a_model_is_recorded_asked_and_saved(tmp_path):
    file, folder = tmp_path / "trace.npz", tmp_path / "out"
    folder.mkdir()
    study = record_study(decoder(), ByteTokenizer(), texts(), name="mine", generate=3, keep=file)
    assert study.trace.generated_T.sum() == 24
    assert not study.read.generated_T.any()
    answers = study.measure(seed=1)
    answers = answers._replace(
        ablations=study.ablate(1, seed=1),
        saturation=study.saturation([decoder(seed=1), study.model], [10, 20]),
    )
    assert answers.written.tokens == (96, 24)
    assert answers.saturation.mean_J[-1] == 1
    names = study.save(answers, folder, sources=["here"], seed=1)
    assert names[-1] == "probe.json"
    assert {path.name for path in folder.iterdir()} == set(names)
    found = json.loads((folder / "probe.json").read_text())
    assert (found["sources"], found["seed"], found["model"]) == (["here"], 1, "mine")
    assert found["summary"] == answers.summary
    assert len(found["ablations"]["rows"]) == 2
    study.write_page(answers, folder / "page.html")
    assert (folder / "page.html").read_text().startswith("<!doctype html>")

    again = read_study(file)
    np.testing.assert_array_equal(again.trace.experts_TLK, study.trace.experts_TLK)
    with pytest.raises(MoestroError, match="read from a trace"):
        again.ablate(1)
    with pytest.raises(DataError, match="tokenizer of this trace's model, mine, is not there"):
        again.write_page(answers, folder / "page.html")


def test_halves_have_every_other_document_of_each_domain():
    trace = record_study(decoder(), ByteTokenizer(), texts(3), name="").trace
    first, second = halves(trace)
    assert first == {"code/0", "code/2", "prose/0", "prose/2"}
    assert second == {"code/1", "prose/1"}
    alone = record_study(decoder(), ByteTokenizer(), texts(1), name="").trace
    with pytest.raises(DataError, match="two documents each"):
        halves(alone)


def test_tokenizers_are_the_same_if_every_id_has_the_same_text():
    class Shifted(ByteTokenizer):
        def decode(self, ids):
            return super().decode([token ^ 1 for token in ids])

    assert same_tokens(ByteTokenizer(), ByteTokenizer())
    assert not same_tokens(ByteTokenizer(), Shifted())
