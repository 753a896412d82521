"""Several processes that run the same code, as torchrun would start them.

Importing torch and moestro takes longer than most of what they do, so one process has imported
both, and each rank is a fork of it: "the nursery", which lives as long as the tests.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_S = 100


class Pair:
    """Ranks that have begun; any number of them."""

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.pids, self._folder, self._codes = pids, folder, None

    def send(self, rank: int, number: int) -> None:
        """A signal to one of them."""
        os.kill(self.pids[rank], number)

    def ended(self, timeout_s: float = LONGEST_S) -> list[int]:
        """Their exit codes, minus the signal where one ended them; what hangs is killed."""
        if self._codes is None:
            self._codes = _ask({"wait": self.pids, "timeout_s": timeout_s})
        return self._codes

    def printed(self, rank: int, stream: str = "out") -> str:
        """What one of them wrote."""
        return (self._folder / f"{rank}.{stream}").read_text()


def run_two_ranks(code: str, *arguments: object) -> list[str]:
    """What each of two ranks printed; both must end well."""
    return run_ranks(2, code, *arguments)


def run_ranks(number: int, code: str, *arguments: object) -> list[str]:
    """What each rank printed; all must end well."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_ranks(number, code, Path(folder), *arguments)
        bad = any(ranks.ended())
        assert not bad, "\n".join(ranks.printed(rank, "err") for rank in range(number))
        return [ranks.printed(rank) for rank in range(number)]


def start_ranks(
    number: int, code: str, folder: Path, *arguments: object, restarts: int = 0, **more: object
) -> Pair:
    """Begin them; what they print goes into `folder`. `more`: environment of all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        **{name: str(value) for name, value in more.items()},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    request = {"code": code, "folder": str(folder), "arguments": list(map(str, arguments))}
    return Pair(_ask({**request, "shared": shared, "number": number}), folder)


def _ask(request: dict) -> list[int]:
    nursery = _nursery()
    nursery.stdin.write(json.dumps(request) + "\n")
    nursery.stdin.flush()
    return json.loads(nursery.stdout.readline())


@functools.cache
def _nursery() -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.ranks"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(child.communicate)  # closes its input, at which it ends
    return child


def _serve() -> None:
    """Fork ranks and wait for them, as asked by lines of JSON."""
    # Late, so that the tests' own process need not; the first is what torch imports late itself.
    for module in ("torch._dynamo", "moestro.cli.train", "moestro.train.loop"):
        import_module(module)

    children = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout_s"])
            children -= set(request["wait"])
        else:
            answer = [_fork(rank, request) for rank in range(request["number"])]
            children |= set(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _wait(pids: list[int], timeout_s: float) -> list[int]:
    codes, until = {}, time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _fork(rank: int, request: dict) -> int:
    """Start one rank; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(request["shared"], RANK=str(rank), LOCAL_RANK=str(rank))
        for stream, place in ((0, os.devnull), (1, f"{rank}.out"), (2, f"{rank}.err")):
            path = Path(request["folder"]) / place  # an absolute place stands for itself
            flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, flags), stream)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.argv = ["rank", *request["arguments"]]
        exec(compile(request["code"], "rank", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
