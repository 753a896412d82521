"""What is served: a model's name, words and defaults, and what a request becomes for the engine."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moestro.chat import ChatTemplate, load_chat
from moestro.errors import ConfigError, DataError
from moestro.infer.prompts import encode
from moestro.infer.sampling import SamplingConfig, stated_sampling
from moestro.models.build import Model
from moestro.serve import errors
from moestro.serve.engine import Ask
from moestro.serve.schema import Generation
from moestro.text import Tokenizer, load_tokenizer

# What a request may set as SamplingConfig names it.
_SAME = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


class Served(NamedTuple):
    """A model as clients see it.

    Attributes:
        name: What requests call it.
        model: In eval mode.
        tokenizer: Its own.
        template: How it writes conversations; None for a model that knows none.
        defaults: Sampling settings that its makers state.
        context: Most tokens of a prompt and its answer.
        created: When it was opened, in seconds since 1970.
        adapted: The model with adapters, by what requests call it.
    """

    name: str
    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: Mapping[str, Any]
    context: int
    created: int
    adapted: Mapping[str, Model] = MappingProxyType({})

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call for: the model, and it with each of its adapters."""
        return (self.name, *self.adapted)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layer numbers of the mixtures that tokens meet: a decoder's own."""
        encoder_layers = sum(len(stack.layers) for stack in self.model.cfg.stacks()[:-1])
        return tuple(n for n in self.model.moe_layers if n >= encoder_layers)

    def check_name(self, name: str | None) -> str:
        """Refuse a request for another model; one that names none is for this one."""
        if name is not None and name not in self.names:
            raise errors.unknown_model(name, self.names)
        return name or self.name

    def chat(self) -> ChatTemplate:
        """The template of conversations.

        Raises:
            ApiError: this model has none.
        """
        if self.template is None:
            raise errors.refused(
                f"the model {self.name} has no chat template, so it knows no conversations; "
                "continue a text with /v1/completions"
            )
        return self.template

    def encode(
        self, prompt: str | Sequence[int], *, templated: bool = False, room: int = 1
    ) -> list[int]:
        """What the model reads, all of it.

        Args:
            prompt: text, or tokens.
            templated: see `Tokenizer.encode_prompt`.
            room: tokens that the context must have left for an answer.

        Raises:
            ApiError: it is too long.
            DataError: it cannot be read.
        """
        if templated and isinstance(prompt, str):
            prompt = self.tokenizer.encode_prompt(prompt, templated=True)
        tokens, dropped = encode(self.model.cfg, self.tokenizer, prompt)
        room = 0 if self.model.cfg.has_encoder else room
        if dropped or len(tokens) + room > self.context:
            raise errors.too_long(len(tokens) + dropped, self.context, room)
        return tokens

    def sampling(self, wanted: Generation, most: int | None, room: int) -> SamplingConfig:
        """How to choose tokens: what is asked for, else what the model's makers state.

        Args:
            wanted: the request.
            most: tokens of the answer; None: as many as there is room for.
            room: tokens that the context has left.
        """
        given = {n: value for n in _SAME if (value := getattr(wanted, n)) is not None}
        if wanted.top_k is not None:
            given["top_k"] = wanted.top_k if wanted.top_k > 0 else None
        seed = wanted.seed % 2**63 if wanted.seed is not None else secrets.randbits(62)
        most = room if most is None else min(most, room)
        given["logit_bias"] = self._biases(wanted)
        values = {**self.defaults, **given, "seed": seed, "max_tokens": most}
        try:
            return SamplingConfig(**values, stop=wanted.stops)
        except ConfigError as error:
            raise errors.refused(str(error)) from None

    def _biases(self, wanted: Generation) -> tuple[tuple[int, float], ...]:
        """What is added to logits, by token."""
        found, last = [], self.model.cfg.vocab_size - 1
        for name, bias in (wanted.logit_bias or {}).items():
            if not (name.isascii() and name.isdecimal() and len(name) < 12 and int(name) <= last):
                raise errors.refused(
                    f"logit_bias names token {name[:40]!r}; tokens are numbers from 0 to {last}",
                    "logit_bias",
                )
            if not -100 <= bias <= 100:
                raise errors.refused(
                    f"logit_bias of token {name} is {bias}; biases are from -100 to 100",
                    "logit_bias",
                )
            found.append((int(name), bias))
        return tuple(found)

    def asks(
        self, wanted: Generation, prompts: Sequence[Sequence[int]], most: int | None
    ) -> list[Ask]:
        """A request for each text: `n` of the first prompt, then `n` of the second, and so on.

        The texts of one prompt have the request's seed, and those that follow it.
        """
        if most == 0:
            raise errors.refused(
                "max_tokens = 0 gives no text; ask for at least 1, or for echo", "max_tokens"
            )
        if wanted.routed and len(prompts) > 1:
            raise errors.refused(
                "return_routed_experts takes one prompt at a time", "return_routed_experts"
            )
        if wanted.routed and self.model.cfg.has_encoder:
            raise errors.refused(
                "return_routed_experts is for decoders; this model has an encoder, whose tokens "
                "are others than its text's",
                "return_routed_experts",
            )
        found = []
        for tokens in prompts:
            own = 0 if self.model.cfg.has_encoder else len(tokens)
            # The engine writes at least one, also where it is left out of the answer.
            sampling = self.sampling(wanted, most, max(1, self.context - own))
            found += [
                Ask(
                    tokens,
                    sampling.model_copy(update={"seed": (sampling.seed + i) % 2**63}),
                    routed=wanted.routed,
                    top=wanted.top,
                    prompt_scored=wanted.prompt_scored,
                    adapter=wanted.model if wanted.model in self.adapted else None,
                )
                for i in range(wanted.count)
            ]
        return found


def serve_model(
    name: str,
    model: Model,
    folder: Path,
    context: int | None = None,
    adapted: Mapping[str, Model] = MappingProxyType({}),
) -> Served:
    """What a checkpoint's folder says of its model.

    Raises:
        ConfigError: the context is longer than the model's.
    """
    most = model.cfg.attention.context
    if context is not None and context > most:
        raise ConfigError(f"--context {context} is more than the model's context, {most} tokens")
    try:
        template = load_chat(folder)
    except DataError:
        template = None
    return Served(
        name, model, load_tokenizer(folder), template, stated_sampling(folder),
        context or most, int(time.time()), adapted,
    )  # fmt: skip


async def encode_all(
    served: Served,
    prompts: Sequence[str | Sequence[int]],
    *,
    templated: bool = False,
    room: int = 1,
) -> list[list[int]]:
    """`Served.encode` of each, in a thread, so that others' streams go on."""

    def all_of_them() -> list[list[int]]:
        return [served.encode(each, templated=templated, room=room) for each in prompts]

    return await asyncio.to_thread(all_of_them)
