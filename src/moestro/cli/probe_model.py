"""The model that `moestro probe` looks into, with its tokenizer and the text to read."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moestro.cli.held_out import open_corpus
from moestro.cli.opening import open_shown
from moestro.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from moestro.probe.recording.passages import Passage
    from moestro.text import Tokenizer

# Where a model of transformers says nothing smaller.
PASSAGE = 256


class ProbedModel(NamedTuple):
    """A model to look into.

    Attributes:
        model: a Decoder, or a model of transformers.
        tokenizer: its own.
        folder: its checkpoint.
        home: its run's folder, or the checkpoint's.
        length: most tokens of a passage.
        by: where other text's labels come from.
    """

    model: nn.Module
    tokenizer: Tokenizer
    folder: Path
    home: Path
    length: int
    by: Any = "folder"

    def passages(self, sources: tuple[str, ...], tokens: int) -> list[Passage]:
        """Pieces of other sources, or of what the model's run held out.

        Raises:
            DataError: there is no text.
        """
        from moestro.probe.recording.labelled import held_out_passages, source_passages

        if sources:
            return source_passages(sources, self.tokenizer, tokens, self.length, self.by)
        with ExitStack() as stack:
            corpus = open_corpus(self.folder, self.home / "data", (), self.length, stack)
            return held_out_passages(corpus, tokens)


def open_probed(
    name: str | Path,
    transformers: bool = False,
    generate: int = 0,
    accept_fields: tuple[str, ...] = (),
) -> ProbedModel:
    """The model that a name means.

    Args:
        name: a run, a checkpoint of either layout, or `org/model`.
        transformers: run it by transformers' own code, whatever its family.
        generate: tokens that it is to write after each passage.
        accept_fields: As --accept-field takes them; transformers asks about none.

    Raises:
        MoestroError: there is no such checkpoint, an encoder-decoder, or no room to write in.
    """
    if transformers:
        return _by_transformers(name, generate)
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.models.decoder import Decoder
    from moestro.text import load_tokenizer
    from moestro.train.state import read_run_settings

    folder = find_checkpoint(name)
    home = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    model = open_shown(folder, device="auto", accept_fields=accept_fields).model
    if not isinstance(model, Decoder):
        raise ConfigError(f"{folder} is an encoder-decoder; probe reads decoders only")
    data = read_run_settings(folder).data if (folder / "run.json").exists() else None
    length = min(PASSAGE if data is None else data.seq_len, model.cfg.attention.context)
    by = "field" if data is not None and data.domains == "field" else "folder"
    return ProbedModel(model, load_tokenizer(folder), folder, home, length, by)


def _by_transformers(name: str | Path, generate: int) -> ProbedModel:
    """A causal language model of transformers, any family; only safetensors is read."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "--transformers needs transformers; install it: pip install 'moestro[hf]'"
        ) from None
    from moestro.checkpoints.hub import find_model
    from moestro.text import load_tokenizer

    folder = find_model(name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(f"transformers cannot load {folder}: {first}") from None
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = PASSAGE if context is None else min(PASSAGE, context - generate)
    if length < 1:
        raise ConfigError(
            f"--generate {generate} leaves no room for text: the model's context is {context} "
            "tokens; give less"
        )
    model.train(False)
    return ProbedModel(model, load_tokenizer(folder), folder, folder, length)
