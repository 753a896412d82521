"""An option of several verbs has one help text, unless it is known to mean something else there."""

from collections import defaultdict

import typer

from moestro.cli.main import VERBS, _app

# Each of these says of what it is, verb by verb.
DIFFERENT = {
    "--adapter", "--compare", "--context", "--device", "--dtype", "--experts", "--family",
    "--granularity", "--json", "--layer", "--list", "--max-tokens", "--memory", "--method",
    "--out", "--report", "--resume", "--seed", "--source", "--system", "--tokens", "--top-k",
    "--weights",
}  # fmt: skip
# Where a verb computes with a model, these mean the same in all of them.
RUNNING = ("generate", "chat", "serve")
SAME_THERE = ("--device", "--dtype", "--weights", "--packed", "--memory", "--accept-field")


def helps() -> dict[str, dict[str, list[str]]]:
    """Option → help text → verbs."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for verb in VERBS:
        command = typer.main.get_command(_app([verb])).commands[verb]  # type: ignore[attr-defined]
        for parameter in command.params:
            name = max(parameter.opts, key=len)
            if name.startswith("--"):
                found[name][parameter.help].append(verb)
    return found


def test_help_texts_agree() -> None:
    found = helps()
    several = {name for name, texts in found.items() if len(texts) > 1}
    assert several == DIFFERENT
    for name in SAME_THERE:
        assert any(set(RUNNING) <= set(verbs) for verbs in found[name].values()), name
    (most,) = [verbs for verbs in found["--json"].values() if "eval" in verbs]
    assert {"generate", "eval", "bench", "probe", "plan", "doctor", "check"} <= set(most)
