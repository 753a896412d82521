"""A model of bytes is tuned by the chat template beside it, which no tokenizer's folder holds."""

import json
import shutil

from moestro.cli.main import main
from moestro.text import ByteTokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SETS = [
    "data.seq_len=32", "data.held_out=0.5", "train.batch_size=2", "train.eval_tokens=64",
    "train.runtime.device=cpu",
]  # fmt: skip


def test_the_template_beside_a_model_of_bytes_is_read(published, tmp_path, capsys):
    base = shutil.copytree(published, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    ByteTokenizer().save(base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    chats, run = tmp_path / "chats.jsonl", tmp_path / "run"
    turns = [
        [{"role": "user", "content": letter}, {"role": "assistant", "content": letter * 3}]
        for letter in "abcdef"
    ]
    chats.write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    words = ["tune", str(base), "--data", str(chats)]
    assert main([*words, "--show", "1"]) == 0
    assert "u:a\na:«aaa\n»" in capsys.readouterr().out
    sets = [word for each in SETS for word in ("--set", each)]
    assert main([*words, "--out", str(run), "--steps", "1", *sets]) == 0
    shutil.rmtree(base)
    for again in (["tune", "--resume", "--out", str(run)], ["eval", str(run)]):
        shutil.rmtree(run / "data")  # prepared again, and found to be the same
        assert main(again) == 0, capsys.readouterr().err
