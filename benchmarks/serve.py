"""`moestro serve` beside other servers of one model file, by turns, under one load.

    python benchmarks/serve.py FILE.gguf --compare llama.cpp=/path/llama-server \
        --compare 'ik=/path/llama-server -rtr -fmoe'

Every server is started here with the model, 16 slots and the same context; a COMMAND that is an
address is a server that runs already. Four parts, each a table and a JSON file:

    clients   tokens/s and first tokens with 1, 4 and 16 clients, every prompt new
    beside    the worst gap of four streams, and of /health, while a prompt of 4096 tokens arrives
    shared    first tokens of prompts that share 1000 tokens, the first of them and the later ones
    grammar   tokens/s of a reply that a schema holds, beside one that is free (moestro alone)

The servers take turns, one at a time under load. `--quick` does all of it smaller, to see that it
runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure
import serve_load

PARTS = ("clients", "beside", "shared", "grammar")
QUICK = {
    "clients": [1, 4], "texts": 1, "prompt": [64, 192], "tokens": 16, "rounds": 1, "long": 1024,
    "system": 500,
}  # fmt: skip
SCHEMA = {
    "type": "array", "minItems": 500, "items": {
        "type": "object", "required": ["name", "count"], "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
    },
}  # fmt: skip
Measure = Callable[[str, random.Random], Coroutine[Any, Any, dict[str, float]]]


def by_turns(
    servers: dict[str, str], rounds: int, first: int, part: Measure
) -> list[dict[str, Any]]:
    """A row for each server: the medians of its rounds, prompts the same for all of a round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for number in range(rounds):
        for name, url in servers.items():
            found[name].append(asyncio.run(part(url, random.Random(first + number))))
    return [
        {"server": name, **{key: statistics.median(one[key] for one in each) for key in each[0]}}
        for name, each in found.items()
    ]


def clients_part(given: argparse.Namespace, servers: dict[str, str], first: int) -> list[Any]:
    """Of each number of clients."""
    rows = []
    for clients in given.clients:

        async def part(url: str, rng: random.Random, clients: int = clients) -> dict[str, float]:
            prompts = [
                serve_load.draw(rng, rng.randint(*given.prompt), given.vocab)
                for _ in range(clients * given.texts)
            ]
            return await serve_load.load(url, clients, prompts, given.tokens)

        turns = by_turns(servers, given.rounds, first + 1000 * clients, part)
        rows += [{"clients": clients, **row} for row in turns]
    return rows


def beside_part(given: argparse.Namespace, servers: dict[str, str], first: int) -> list[Any]:
    """A long prompt beside four streams."""

    async def part(url: str, rng: random.Random) -> dict[str, float]:
        prompts = [serve_load.draw(rng, 64, given.vocab) for _ in range(4)]
        long = serve_load.draw(rng, given.long, given.vocab)
        return await serve_load.beside(url, prompts, long, given.context - 64 - 1)

    return by_turns(servers, given.rounds, first + 10**6, part)


def shared_part(given: argparse.Namespace, servers: dict[str, str], first: int) -> list[Any]:
    """One beginning, several ends."""

    async def part(url: str, rng: random.Random) -> dict[str, float]:
        system = serve_load.draw(rng, given.system, given.vocab)
        ends = [serve_load.draw(rng, 24, given.vocab) for _ in range(5)]
        return await serve_load.shared(url, system, ends, 4)

    return by_turns(servers, given.rounds, first + 2 * 10**6, part)


def grammar_part(given: argparse.Namespace, servers: dict[str, str], _: int) -> list[Any]:
    """Tokens per second of a reply with and without a schema, by turns."""
    url = servers["moestro"]
    message = "List the towns of a country, each with its inhabitants, as JSON."
    schema = {"type": "json_schema", "json_schema": {"name": "towns", "schema": SCHEMA}}
    # A temperature at which hardly any text ends by itself, so that both are as long.
    body = {"messages": [{"role": "user", "content": message}], "temperature": 2.0}
    body["max_tokens"] = 4 * given.tokens
    forms: dict[str, dict[str, Any]] = {"free": {}, "schema": {"response_format": schema}}
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(given.rounds * 3 + 1):
        for name, form in forms.items():
            asked = {**body, **form, "seed": number}
            text = asyncio.run(serve_load.ask(url, asked, "/v1/chat/completions"))
            if number and text.tokens > 1:  # the first one reads the tokenizer
                rates[name].append(text.rate)
    free, held = (statistics.median(rates[name]) for name in forms)
    cost = 100 * (1 - held / free)
    return [{"free_tokens_per_s": free, "schema_tokens_per_s": held, "cost_percent": cost}]


def parsed() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file that all servers open")
    parser.add_argument("--compare", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--moestro", default=serve_load.own_command(), metavar="COMMAND",
                        help="our server, with options such as --weights int4")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--grammar", action="store_true", help="that part alone")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=5120, help="of each text")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--texts", type=int, default=2, help="of each client in a round")
    parser.add_argument(
        "--prompt", type=int, nargs=2, default=[64, 1024], metavar=("LEAST", "MOST")
    )
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--system", type=int, default=1000)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="", help="suffix of the result files")
    given = parser.parse_args()
    if given.quick:
        vars(given).update(QUICK)
    if given.grammar:
        given.parts, given.compare = ["grammar"], []
    if given.long >= given.context:
        parser.error(f"--long {given.long} needs a longer --context than {given.context}")
    return given


def main() -> None:
    given = parsed()
    commands = {"moestro": given.moestro, **dict(each.split("=", 1) for each in given.compare)}
    parts = {
        "clients": clients_part, "beside": beside_part, "shared": shared_part,
        "grammar": grammar_part,
    }  # fmt: skip
    first = time.time_ns() % 10**12  # no server has seen these prompts before
    settings = {
        name: getattr(given, name)
        for name in ("threads", "slots", "context", "prompt", "tokens", "long", "system", "rounds")
    }
    settings |= {"model": given.model.name, "commands": json.dumps(_named(commands))}
    with ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            words = serve_load.words_of(
                name, given.model, given.context, given.slots, given.threads
            )
            servers[name] = stack.enter_context(serve_load.started(command, words, given.threads))
        for part in given.parts:
            print(f"\n{part}", flush=True)
            rows = parts[part](given, servers, first)
            measure.report(f"serve-{part}{given.name}", rows, settings)


def _named(commands: dict[str, str]) -> dict[str, str]:
    """The commands without the places of their programs."""
    return {
        name: " ".join([Path(command.split()[0]).name, *command.split()[1:]])
        for name, command in commands.items()
    }


if __name__ == "__main__":
    main()
