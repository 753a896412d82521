"""Options of several verbs that mean the same in each; those of models are in opening.py."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
# Of held-out text.
HeldOutTokens = Annotated[
    int, typer.Option(min=1, help="Most held-out tokens to read, shared evenly by the domains.")
]
HeldOutSource = Annotated[
    list[str] | None,
    typer.Option(
        help="Other text than the run's: file, folder, glob or 'builtin'; may be repeated. "
        "Domains are the sub-folders, or the files' names."
    ),
]
# Of text that is written.
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0: always the most likely token; 1: the model's own distribution; default 0.8."
    ),
]
TopK = Annotated[int | None, typer.Option(help="Only the K most likely tokens; default all.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Only the most likely tokens whose probabilities sum to this; default 1.0."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Only tokens at least this many times as likely as the most likely one; default 0.0."
    ),
]
Repetition = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        help="Above 1, tokens of the prompt and the text so far become less likely; default 1.0.",
    ),
]
Presence = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        help="Subtracted from the logit of each token generated before; default 0.0.",
    ),
]
Frequency = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        help="Subtracted from a token's logit each time it was generated; default 0.0.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text; default 0.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")]
