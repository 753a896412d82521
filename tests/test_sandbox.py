"""Templates in a process of their own: whatever takes too much ends, and the next one renders."""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moestro import sandbox
from moestro.errors import DataError
from moestro.sandbox import RefusedError, render
from moestro.worker import KEPT_VARIABLES

# Two equal values of 60 small parts each, which take 2**60 steps to print, compare or hash.
LISTS = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}"
    "{% endfor %}{% set a, b = ns.a, ns.b %}"
)
TUPLES = LISTS.replace("[", "(").replace("]", ",)")
DICTS = LISTS.replace("[1]", "{}").replace("[ns.a, ns.a]", "{1: ns.a, 2: ns.a}")
DICTS = DICTS.replace("[ns.b, ns.b]", "{1: ns.b, 2: ns.b}")
BOMBS = {
    LISTS: [
        "{{ a }}", "{{ a|string|length }}", "{{ a ~ '' }}", "{{ '%s' % a }}", "{{ a|pprint }}",
        "{{ '{}'.format(a) }}", "{{ a|tojson }}", "{{ raise_exception(a) }}", "{{ [a]|join }}",
        "{% set x %}{{ a }}{% endset %}", "{{ a == b }}", "{{ a != b }}", "{{ a < b }}",
        "{{ a in [b] }}", "{{ [a].index(b) }}", "{{ [a].count(b) }}", "{{ [a, b]|sort }}",
        "{{ [a]|select('eq', b)|list }}", "{{ [a, b]|max }}",
    ],
    TUPLES: [
        "{{ {}[a] }}", "{% set d = {a: 1} %}", "{{ {}.get(a) }}", "{{ given[a] }}", "{{ a in {} }}",
        "{{ [a, b]|unique|list }}", "{{ dict([(a, 1)]) }}", "{{ [(a, 1)]|groupby(0) }}",
    ],
    DICTS: ["{{ a == b }}", "{{ a }}", "{{ a|tojson }}", "{{ a|dictsort|string }}"],
}  # fmt: skip


def alone(code: str, *arguments: str) -> str:
    """What another Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def gone(pid: int, orphan: bool = False) -> bool:
    """Whether a process ends soon, and was waited for by its parent; an orphan may not be."""
    for _ in range(1000):
        try:
            os.kill(pid, 0)
            if orphan and ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("bomb", [start + end for start in BOMBS for end in BOMBS[start]])
def test_small_values_that_are_large_when_read(bomb, monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "MOST_MEMORY", 2**26)
    with pytest.raises(DataError, match=r"not safe to run: it takes more than (0\.1 s|64 MiB)"):
        render(bomb, {"given": {}})
    assert render("{{ given }}", {"given": "the next"}) == "the next"


def test_each_limit_is_named(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_WRITTEN", 1000)
    with pytest.raises(DataError, match="it writes more than 1,000 characters"):
        render("{{ 'x' * 1001 }}", {})
    assert render("{{ 'x' * 1000 }}", {}) == "x" * 1000
    with pytest.raises(DataError, match="takes more than 1,024 MiB of memory"):
        render("{{ 'x' * 2**31 }}", {})
    monkeypatch.setattr(sandbox, "MOST_GIVEN", 1000)
    with pytest.raises(DataError, match=r"at most 1,000 are rendered in one call: give fewer"):
        render("", {"given": "x" * 1000})
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "LONGEST_WAIT_S", 0.2)
    with pytest.raises(DataError, match=r"takes longer than 0\.2 s"):
        render("{{ 9 ** (9 ** 9) }}", {})


def test_a_process_is_kept_and_replaced_when_it_is_gone():
    render("", {})
    (pid,) = {worker._process.pid for worker in sandbox._idle[-1:]}
    for number in range(3):
        assert render("{{ n }}", {"n": number}) == str(number)
        assert sandbox._idle[-1]._process.pid == pid
    os.kill(pid, signal.SIGKILL)
    sandbox._idle[-1]._process.wait()
    assert render("{{ 'again' }}", {}) == "again"
    assert gone(pid)


def test_what_a_template_makes_is_not_there_for_the_next():
    with pytest.raises(RefusedError, match="no"):
        render("{% set x = 1 %}{% macro m() %}{% endmacro %}{{ raise_exception('no') }}", {"y": 1})
    assert render("{{ x is defined }} {{ y is defined }} {{ m is defined }}", {}) == (
        "False False False"
    )


def test_threads_get_their_own_text():
    def one(number: int) -> bool:
        return (
            render("{% for i in range(n) %}{{ i }},{% endfor %}", {"n": number}).count(",")
            == number
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(100)))


def test_an_interruption_ends_the_process():
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    render("", {})
    pid = sandbox._idle[-1]._process.pid
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            render("{{ 9 ** (9 ** 9) }}", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert gone(pid)
    assert render("{{ 'again' }}", {}) == "again"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="asks Linux about another process")
def test_the_process_has_nothing():
    render("", {})
    pid = sandbox._idle[-1]._process.pid
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (3, 3)
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
    assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == sandbox.MOST_MEMORY
    kept = Path(f"/proc/{pid}/environ").read_text()
    assert not kept or kept.startswith(KEPT_VARIABLES)
    with pytest.raises(DataError, match="Too many open files"):
        render("{{ 'x'.encode('cp1252') }}", {})
    # What jinja2 and Python load when first used was loaded before.
    text = render("{{ 'a <b>\\n'|wordwrap|striptags|urlize }}{{ strftime_now('%Y') }}", {})
    assert text.startswith("a20")


def test_the_process_is_light():
    heavy = "{'moestro.sandbox', 'torch', 'numpy', 'pydantic'}"
    alone(f"import sys, moestro.templates; assert not {heavy} & set(sys.modules)")
    assert alone("import sys, moestro.chat; print({'jinja2', 'torch'} & set(sys.modules))") == (
        "set()\n"
    )


RENDERS = """
import os, signal, sys
from moestro import sandbox
sandbox.render("", {})
print(sandbox._idle[0]._process.pid, flush=True)
"""


@pytest.mark.parametrize("end", ["", "os._exit(0)", "signal.raise_signal(signal.SIGKILL)", "1 / 0"])
def test_the_process_ends_with_its_parent(end):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RENDERS + end], capture_output=True, text=True
    )
    orphan = end.startswith(("os", "signal"))
    assert gone(int(done.stdout), orphan)
    assert "Warning" not in done.stderr


def test_a_fork_has_its_own():
    out = alone(
        RENDERS
        + """
child = os.fork()
text = sandbox.render("{{ 'child' if child else 'parent' }}", {"child": not child})
print(text, sandbox._idle[-1]._process.pid, flush=True)
if not child:
    sys.exit()
os.waitpid(child, 0)
print(sandbox.render("{{ 'parent' }}", {}), sandbox._idle[-1]._process.pid)
"""
    ).split()
    first, said = out[0], dict(zip(out[1::2], out[2::2], strict=True))
    assert said["parent"] == first
    assert said["child"] != first
    assert out.count("parent") == 2
    assert gone(int(said["child"]))
    assert gone(int(first), orphan=True)
