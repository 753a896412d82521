"""`moestro probe`: which expert does what over labelled text, told only as far as noise allows."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moestro.cli.held_out import open_corpus
from moestro.cli.opening import ModelName, open_shown, pick_device
from moestro.errors import ConfigError, MoestroError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from moestro.probe.measure import Findings, Floats, Repetition, Specialisation

Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the figures and probe.json; default: probe in the run folder, "
        "probe-NAME here for a published model."
    ),
]
Tokens = Annotated[
    int, typer.Option(min=1, help="Most held-out tokens to read, shared evenly by the domains.")
]
Source = Annotated[
    list[str] | None,
    typer.Option(
        help="Other text than the run's: file, folder, glob or 'builtin'; may be repeated. "
        "Domains are the sub-folders, or the files' names."
    ),
]
Layer = Annotated[
    int | None,
    typer.Option(help="Layer, from 0, whose experts to show by domain; default the last mixture."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, the content of probe.json.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws behind the sampling noise.")]

# Many layer-domain pairs are looked at in one sentence; at 2 errors some would pass by chance.
ERRORS_TO_CLAIM = 3.0
MOST_COLUMNS = 8
# Times as much text is looked at as is used, to see where documents end between the windows.
POOL = 64


class Probed(NamedTuple):
    """What one call measured.

    Attributes:
        findings: The measures.
        checkpoint: The checkpoint folder that was read.
        tokens: Tokens that went through the model.
        folder: Where the figures and probe.json were written.
        figures: The figures' file names.
    """

    findings: Findings
    checkpoint: Path
    tokens: int
    folder: Path
    figures: tuple[str, ...]


def probe(
    path: ModelName,
    out: Out = None,
    tokens: Tokens = 65_536,
    source: Source = None,
    layer: Layer = None,
    as_json: AsJson = False,
    seed: Seed = 0,
) -> None:
    """Measure which expert does what, over labelled held-out text.

    Load by layer and expert, use of experts by domain, how far domains differ beside what chance
    alone would give, entropy of the router, and how often neighbouring tokens share an expert.
    Figures (PNG) and probe.json go to the folder --out.
    """
    probed = run(path, out, tokens, tuple(source or ()), layer, seed)
    if as_json:
        typer.echo((probed.folder / "probe.json").read_text(encoding="utf-8").rstrip())
    else:
        _print(probed, layer)


def run(
    path: str | Path,
    out: Path | None = None,
    tokens: int = 65_536,
    sources: tuple[str, ...] = (),
    layer: int | None = None,
    seed: int = 0,
) -> Probed:
    """Probe the checkpoint that `path` means, and write figures and probe.json.

    Raises:
        MoestroError: no checkpoint or text, a dense model, a layer that is no mixture, or a
            folder that cannot be written.
    """
    from rich.console import Console

    from moestro.models.decoder import Decoder
    from moestro.models.hub import find_checkpoint
    from moestro.models.pretrained import is_pretrained
    from moestro.probe.figures import layer_index, save_figures
    from moestro.probe.measure import measure, to_json
    from moestro.probe.record import record

    checkpoint = find_checkpoint(path)
    home = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    # A published checkpoint is not ours to write into; it may lie in a cache.
    beside = Path(f"probe-{Path(path).name}") if is_pretrained(checkpoint) else home / "probe"
    folder = _make_folder(out or beside)
    model = open_shown(checkpoint, pick_device("auto")).model
    if not isinstance(model, Decoder):
        raise ConfigError(f"{checkpoint} is an encoder-decoder; probe reads decoders only")
    windows, blocks = _text(checkpoint, home, sources, tokens, model.cfg.attention.context)
    with Console(stderr=True).status("probing held-out text"):
        findings = measure(record(model, windows, blocks=blocks), seed=seed)
    if layer is not None:
        layer_index(findings, layer)
    figures = tuple(file.name for file in save_figures(findings, folder, layer))
    num_tokens = sum(text.numel() for text in windows.values())
    probed = Probed(findings, checkpoint, num_tokens, folder, figures)
    content = {
        "checkpoint": str(checkpoint),
        "sources": list(sources) or None,
        "tokens": num_tokens,
        "seed": seed,
        "summary": summary(findings),
        "figures": list(figures),
        **to_json(findings),
    }
    _write(folder / "probe.json", json.dumps(content, indent=1) + "\n")
    return probed


def summary(findings: Findings) -> str:
    """One paragraph of what the findings support, sampling noise considered."""
    layers, load = findings.moe_layers, findings.load
    worst = int(load.imbalance_L.argmax())
    dead = sum(map(len, load.dead_L))
    sentences = [
        _told_apart(findings),
        f"The busiest expert, in layer {layers[worst]}, took {load.imbalance_L[worst]:.2f} times "
        f"an equal share; {dead or 'none'} of the {len(layers) * findings.num_experts} experts "
        "received nothing.",
    ]
    if findings.repetition is not None:
        sentences.append(_repeated(findings.repetition))
    return " ".join(sentences)


def _told_apart(findings: Findings) -> str:
    """Whether the layers use experts differently by domain."""
    found, layers = findings.specialisation, findings.moe_layers
    if found is None:
        return "All text has one label, so nothing can be said about domains."
    single = [name for name, size in zip(findings.domains, found.blocks_M, strict=True) if size < 2]
    many = f"{int(found.supported_L.sum())} of {len(layers)} mixture layers"
    if not found.supported_L.any():
        sentence = (
            f"{many} use experts differently by domain beyond sampling noise: "
            "differences between the domains here may be chance."
        )
    else:
        excess_L = (found.mean_L - found.mean_chance_L) * found.supported_L
        most = int(excess_L.argmax())
        sentence = (
            f"{many} use experts differently by domain beyond sampling noise; most in layer "
            f"{layers[most]}, where domains lie {found.mean_L[most]:.3f} from their average (0 to "
            f"1) and chance would give {found.mean_chance_L[most]:.3f}."
        )
    if single:
        sentence += (
            f" Of {_listed(single)} only one document was read, which says nothing about how such "
            "text varies; more --tokens or more documents would."
        )
    return sentence


def _listed(names: list[str]) -> str:
    """The names, or the first few of many."""
    more = len(names) - MOST_COLUMNS
    return ", ".join(names[:MOST_COLUMNS]) + (f" and {more} more" if more > 0 else "")


def _repeated(found: Repetition) -> str:
    """Whether neighbouring tokens share their first choice more often than shuffled ones."""
    excess_LM = found.first_LM - found.first_shuffled_LM
    more = int((excess_LM > ERRORS_TO_CLAIM * found.first_error_LM).sum())
    fewer = int((excess_LM < -ERRORS_TO_CLAIM * found.first_error_LM).sum())
    return (
        f"A token and the next have the same first choice in {found.first_LM.mean():.0%} of pairs "
        f"({found.first_shuffled_LM.mean():.0%} with the same tokens shuffled); beyond "
        f"{ERRORS_TO_CLAIM:g} standard errors, that is more than shuffled in {more} and less in "
        f"{fewer} of {excess_LM.size} combinations of layer and domain."
    )


def _text(
    checkpoint: Path, home: Path, sources: tuple[str, ...], tokens: int, context: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Held-out windows by domain, and for each window the number of its document."""
    import torch

    from moestro.probe.record import document_blocks

    with ExitStack() as stack:
        corpus = open_corpus(checkpoint, home / "data", sources, context, stack)
        pool = corpus.held_out(POOL * tokens)
        wanted = max(1, tokens // len(pool) // corpus.seq_len)
        windows, blocks = {}, {}
        for domain, (tokens_NS, _) in pool.items():
            there = len(tokens_NS)
            chosen = torch.arange(min(wanted, there)) * there // max(1, min(wanted, there))
            # Where documents end shows only in text that lies together, so all of it is numbered.
            # A window's last token is the next one's first: leaving out the first counts each once.
            document_N = document_blocks(tokens_NS[:, 1:], corpus.tokenizer.end_of_text)
            windows[domain], blocks[domain] = tokens_NS[chosen, :-1], document_N[chosen]
    return windows, blocks


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> MoestroError:
    reason = error.strerror or error
    return MoestroError(f"cannot write to {path}: {reason}; choose another folder with --out")


def _print(probed: Probed, layer: int | None) -> None:
    """The tables and the paragraph, for a person."""
    from rich.console import Console

    findings, console = probed.findings, Console(highlight=False)
    domains = len(findings.domains)
    console.print(
        f"{probed.checkpoint}: {probed.tokens:,} tokens of {domains} "
        f"{'domain' if domains == 1 else 'domains'}",
        markup=False,
        soft_wrap=True,
    )
    tables = [_load_table(findings)]
    if findings.specialisation is not None:
        tables.append(_specialisation_table(findings, findings.specialisation))
    tables.append(_expert_table(findings, layer))
    if findings.repetition is not None:
        tables += _repetition_tables(findings, findings.repetition)
    for table in tables:
        # Not as the table's own title, which would be folded to the width of its columns.
        title, table.title = table.title, None
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(table)
    if domains > MOST_COLUMNS:
        console.print(f"{domains - MOST_COLUMNS} more domains are in probe.json.\n")
    console.print(summary(findings), markup=False)
    names = ", ".join((*probed.figures, "probe.json"))
    console.print(f"\nwritten to {probed.folder}: {names}", markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    """An empty table: the first column a name, the others numbers."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index else "left")
    return table


def _load_table(findings: Findings) -> Table:
    load, entropy = findings.load, findings.entropy
    table = _table(
        "Load, and entropy of the router (1 = spread over all experts)",
        "layer", "max / mean", "CV", "dead", "dropped", "entropy overall", "per token",
    )  # fmt: skip
    for index, layer in enumerate(findings.moe_layers):
        table.add_row(
            str(layer),
            f"{load.imbalance_L[index]:.2f}",
            f"{load.variation_L[index]:.2f}",
            str(len(load.dead_L[index])),
            f"{load.dropped_L[index]:.1%}",
            f"{entropy.balance_L[index]:.3f}",
            f"{entropy.spread_L[index]:.3f}",
        )
    return table


def _specialisation_table(findings: Findings, found: Specialisation) -> Table:
    pieces = _listed([str(size) for size in found.blocks_M])
    table = _table(
        "Specialisation: distance of a domain's use of experts from the average (0 to 1); chance "
        f"deals the pieces of text ({pieces}) to the domains at random",
        "layer", "mean", "chance", "95 % of chance", "p", "beyond noise",
        *findings.domains[:MOST_COLUMNS],
    )  # fmt: skip
    for index, layer in enumerate(findings.moe_layers):
        table.add_row(
            str(layer),
            f"{found.mean_L[index]:.3f}",
            f"{found.mean_chance_L[index]:.3f}",
            f"{found.mean_chance_high_L[index]:.3f}",
            f"{found.p_value_L[index]:.3f}",
            "yes" if found.supported_L[index] else "no",
            *(f"{distance:.3f}" for distance in found.distance_LM[index, :MOST_COLUMNS]),
        )
    return table


def _expert_table(findings: Findings, layer: int | None) -> Table:
    from moestro.probe.figures import layer_index

    index = len(findings.moe_layers) - 1 if layer is None else layer_index(findings, layer)
    table = _table(
        f"Layer {findings.moe_layers[index]}: share of each domain's assignments by expert "
        f"(equal share {1 / findings.num_experts:.1%})",
        "expert", *findings.domains[:MOST_COLUMNS],
    )  # fmt: skip
    for expert, shares_M in enumerate(findings.table_LME[index].T):
        table.add_row(str(expert), *(f"{share:.1%}" for share in shares_M[:MOST_COLUMNS]))
    return table


def _repetition_table(
    findings: Findings, title: str, rate_LM: Floats, shuffled_LM: Floats, uniform: float
) -> Table:
    table = _table(
        f"Repetition: {title} in neighbouring tokens (in brackets: the same tokens shuffled; "
        f"uniform routing: {uniform:.1%})",
        "layer",
        *findings.domains[:MOST_COLUMNS],
    )
    for layer, rate_M, shuffled_M in zip(findings.moe_layers, rate_LM, shuffled_LM, strict=True):
        pairs = list(zip(rate_M, shuffled_M, strict=True))[:MOST_COLUMNS]
        table.add_row(str(layer), *(f"{rate:.1%} ({null:.1%})" for rate, null in pairs))
    return table


def _repetition_tables(findings: Findings, found: Repetition) -> list[Table]:
    """One table for the first choices, and one for all K where there are several."""
    first = ("the same first choice", found.first_LM, found.first_shuffled_LM, found.first_uniform)
    shared = (
        f"any of {findings.top_k} choices shared",
        found.any_LM, found.any_shuffled_LM, found.any_uniform,
    )  # fmt: skip
    kinds = [first] if findings.top_k == 1 else [first, shared]
    return [_repetition_table(findings, *kind) for kind in kinds]
