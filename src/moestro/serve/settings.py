"""How a server behaves, and the limits that it keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moestro.settings import Settings

Seconds = Annotated[float, Field(gt=0.0)]


class ServeSettings(Settings):
    """What a server allows, and how long it waits."""

    max_live: Annotated[int, Field(ge=1, le=1024)] = Field(
        16, description="Requests that are answered at once."
    )
    max_waiting: Annotated[int, Field(ge=0)] = Field(
        64, description="Requests that wait for their turn; one more is refused with 429."
    )
    context: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Most tokens of a prompt and its answer; default the model's."
    )
    cache_bytes: Annotated[int, Field(ge=0)] = Field(
        2 * 2**30, description="Memory for beginnings of earlier texts, computed once; 0: none."
    )
    api_keys: tuple[str, ...] = Field((), repr=False, description="Without one, none is asked for.")
    body_limit: Annotated[int, Field(ge=1)] = Field(
        8 * 2**20, description="Most bytes of a request."
    )
    stall_s: Seconds = Field(60.0, description="/health is 503 once a step takes longer than this.")
    drain_s: Seconds = Field(
        30.0, description="After SIGTERM, how long requests that run may take to finish."
    )
    ping_s: Seconds = Field(
        15.0, description="A stream that is silent for this long sends a comment."
    )
    any_host: bool = Field(True, description="Answer whatever name a request calls this server by.")
