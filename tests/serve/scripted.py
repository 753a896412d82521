"""A model that counts on from the last byte, and does as badly as a test wants; or recites."""

import threading

import torch
from torch import Tensor, nn

from moestro.chat import ChatTemplate
from moestro.config import ModelConfig
from moestro.models.network import ModelOutput
from moestro.serve.running import bind, run
from moestro.serve.served import Served
from moestro.serve.settings import ServeSettings
from moestro.serve.state import State, new_state
from moestro.text import ByteTokenizer

# Whoever's prompt has one of these gets logits of NaN, or an error for everybody.
NAN, FAIL = "\x01", "\x02"
# After this a `Reciting` recites.
BEGIN = "\x03"


class Counting(nn.Module):
    """After byte b comes b + 1; a step begins only while `go` is set.

    Attributes:
        go: cleared, the next step waits.
        steps: how many have begun.
    """

    moe_layers = ()

    def __init__(self, context: int = 4096) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.cfg = ModelConfig(vocab_size=256, attention={"context": context})
        self.go, self.steps = threading.Event(), 0
        self.go.set()
        self.eval()

    def new_cache(self, batch: int) -> list[int]:
        return []

    def forward(self, tokens_BS: Tensor, *, cache: list[int]) -> ModelOutput:
        self.steps += 1
        assert self.go.wait(30)
        cache += tokens_BS[0].tolist()
        if ord(FAIL) in cache:
            raise RuntimeError("as the test wants it")
        logits_BSV = torch.zeros(1, tokens_BS.shape[1], 256)
        logits_BSV[0, -1, self.after(cache)] = 1e4
        return ModelOutput(logits_BSV * (float("nan") if ord(NAN) in cache else 1.0), ())

    def after(self, tokens: list[int]) -> int:
        """The token that comes next."""
        return (tokens[-1] - 96) % 26 + 97


class Reciting(Counting):
    """Says a text after BEGIN, whatever came before it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._bytes = [*text.encode(), ByteTokenizer.end_of_text]

    def after(self, tokens: list[int]) -> int:
        """The next byte of the text."""
        said = len(tokens) - 1 - tokens.index(ord(BEGIN))
        return self._bytes[min(said, len(self._bytes) - 1)]


def counting(**settings: object) -> tuple[Counting, State]:
    """The model, and what serves it."""
    model = Counting()
    return model, _state(model, None, ServeSettings(**settings))


def reciting(text: str) -> State:
    """What serves a model that says a text, thinks and calls tools as Qwen's do."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{# tools <tool_call> </think> #}"
    return _state(Reciting(text), ChatTemplate(source + BEGIN, {}), ServeSettings())


def _state(model: Counting, template: ChatTemplate | None, settings: ServeSettings) -> State:
    tokenizer = ByteTokenizer()
    served = Served("counting", model, tokenizer, template, {}, 4096, 0)  # type: ignore[arg-type]
    return new_state(served, settings)


def main() -> None:
    """Serve it from a process of its own; the first line says at which port."""
    _, state = counting(max_live=16, max_waiting=1000)
    bound = bind("127.0.0.1", 0)
    run(state, bound, lambda: print(bound.getsockname()[1], flush=True))


if __name__ == "__main__":
    main()
