"""A conversation with a model: messages in turn, each answer streamed.

Every turn writes the whole conversation in the model's chat template, so that the model sees it as
it was trained to. What was read before is not computed again where steps are native.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from moestro.chat import ChatTemplate
from moestro.errors import DataError
from moestro.files import write_json
from moestro.infer.channels import FINAL
from moestro.infer.engine import Session
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Piece
from moestro.models.build import Model
from moestro.text import Tokenizer

# For the pasts of earlier turns: one conversation fills it with its own only.
CACHE_BYTES = 1 << 31


class Conversation:
    """Messages of a person and a model.

    Args:
        model: In eval mode.
        tokenizer: The one that the model was trained with.
        template: The model's chat template.
        sampling: How to choose tokens and when an answer stops.
        system: What the model is told before the first message.
        cache_bytes: Memory for what was computed of earlier messages.

    Attributes:
        messages: As the template takes them: `role` and `content`.
        system: See the argument; may be changed between turns.
        sampling: See the argument; may be changed between turns.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: SamplingConfig,
        system: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.messages: list[dict[str, str]] = []
        self.system, self.sampling = system, sampling
        self._tokenizer, self._template, self._context = (
            tokenizer, template, model.cfg.attention.context,
        )  # fmt: skip
        self._session = Session(model, tokenizer, cache_bytes=cache_bytes)

    def ask(self, text: str) -> Generator[Piece]:
        """Say something; the answer comes piece by piece.

        Whoever leaves the loop early keeps what came until then as the answer.

        Raises:
            DataError: the template refuses the conversation, it is longer than the model's
                context, or has tokens that the model does not know; the message is then taken back.
            MoestroError: the logits allow no choice.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            number = self._session.add(self._tokens(), self.sampling)
        except DataError:
            self.messages.pop()
            raise
        answer = ""
        try:
            while self._session.live:
                for _, piece in self._session.step():
                    answer += piece.text if piece.channel == FINAL else ""
                    yield piece
                for error in self._session.failed.values():
                    raise error
        finally:
            self._session.failed.clear()
            self._session.drop(number)
            self.messages.append({"role": "assistant", "content": answer})

    def reset(self) -> None:
        """Forget all messages; the system message stays."""
        self.messages.clear()

    def save(self, path: Path) -> None:
        """Write the conversation as JSON: {"messages": [...]}.

        Raises:
            OSError: the place cannot be written.
        """
        write_json(path, {"messages": self._all()})

    def _all(self) -> list[dict[str, str]]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.messages]

    def _tokens(self) -> list[int]:
        text = self._template.render(self._all())
        tokens = self._tokenizer.encode_prompt(text, templated=True)
        if len(tokens) >= self._context:
            raise DataError(
                f"the conversation is {len(tokens)} tokens long, and the model's context "
                f"{self._context}; begin a new one"
            )
        return tokens
