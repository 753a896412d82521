"""/tokenize and /detokenize, answered as vLLM and llama.cpp do."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moestro.errors import DataError
from moestro.serve import errors
from moestro.serve.events import whole
from moestro.serve.schema import DetokenizeRequest, TokenizeRequest
from moestro.serve.served import Served
from moestro.serve.state import State
from moestro.serve.turns import rendered


async def tokenize(_: Request, state: State, wanted: TokenizeRequest) -> Response:
    """The tokens that a prompt has, however many."""
    served = state.served
    served.check_name(wanted.model)
    text, templated = wanted.prompt if wanted.content is None else wanted.content, False
    if wanted.messages is not None:
        variables = wanted.chat_template_kwargs or {}
        text, templated = await rendered(
            served, wanted.messages, variables, wanted.tools, reply=wanted.add_generation_prompt
        ), True  # fmt: skip

    def found() -> dict[str, Any]:
        tokens = _encode(served, text or "", templated, wanted.add_special_tokens)
        return {"count": len(tokens), "max_model_len": served.context, "tokens": tokens}

    return await whole(found)


def _encode(served: Served, text: str, templated: bool, specials: bool) -> list[int]:
    return served.tokenizer.encode_prompt(text, templated=templated or not specials)


async def detokenize(_: Request, state: State, wanted: DetokenizeRequest) -> Response:
    """The text of tokens, special ones left out."""
    served = state.served
    served.check_name(wanted.model)
    try:
        text = await asyncio.to_thread(served.tokenizer.decode, wanted.tokens)
    except DataError as error:
        raise errors.refused(str(error), "tokens") from None
    return JSONResponse({"prompt": text, "content": text})
