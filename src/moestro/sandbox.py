"""Runs a jinja2 template that came from someone else: sandboxed, and counted so that it ends.

jinja2's immutable sandbox gives no attribute that leads to Python, and nothing that the template
is given can be changed. It sets no bound to time or memory, so the template is rewritten before it
runs: each turn of a loop, each text that is compared, joined or written, and what filters and
methods can make of what they are given is counted in characters, and too much of it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# Characters that a template may write, and look at or make on the way; and for how many of them a
# step counts, such as a call or a turn of a loop.
MOST_WRITTEN = 2**24
MOST_WORK = 2**29
STEP = 400
# The largest width, count or power that it may ask for, and bits of a whole number.
LARGEST_NUMBER = 10_000
# What makes much of little when it is given a large number.
GROWING = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes",
    "indent", "batch", "slice", "round", "tojson",
}  # fmt: skip
# Filters that take a list as it is, and tests that compare; all other tests look at a type only.
SHALLOW = {
    "length", "count", "first", "last", "default", "d", "list", "reverse", "items", "attr",
    "map", "select", "reject", "selectattr", "rejectattr", "batch", "slice",
}  # fmt: skip
COMPARING = {
    "==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le",
    ">", "gt", "greaterthan", ">=", "ge", "in",
}  # fmt: skip

# What compiled templates hand to every call on the side.
SCOPES = {"_loop_vars", "_block_vars"}


class RefusedError(Exception):
    """The template called `raise_exception`."""


def pieces(source: str, variables: Mapping[str, Any]) -> Iterator[str]:
    """What a template writes, bit by bit.

    Args:
        source: The template.
        variables: What it is given; plain data, as in JSON.

    Raises:
        RefusedError: it does not want what it is given, and says why.
        SecurityError: it does what is not allowed, or too much.
        Exception: any other, as programs do.
    """
    written = 0
    for piece in _Sandbox().build(source).generate(variables):
        written += len(piece)
        if written > MOST_WRITTEN:
            raise SecurityError(f"it writes more than {MOST_WRITTEN:,} characters")
        yield piece


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Fields(Namespace):
    """A namespace that takes no name beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it names a field {name!r}; no name may begin with an underscore")


class _Counted(NodeTransformer):
    """Puts the counting into a template: each turn of a loop, each text that is joined or read."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
            literal = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            turn = _call("turn", [nodes.Const(literal)], node.lineno)
            node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        elif isinstance(node, nodes.Concat):
            return _call("joined", node.nodes, node.lineno)
        elif isinstance(node, nodes.Compare):
            node.expr = _call("measured", [node.expr], node.lineno)
            for operand in node.ops:
                operand.expr = _call("measured", [operand.expr], node.lineno)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node.node = _call("touched", [node.node], node.lineno)
        return node


def _call(method: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    """A call of one of the sandbox's own methods, which no name of a template can hide."""
    function = nodes.EnvironmentAttribute(method, lineno=lineno)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox of one rendering, and its count of characters."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self._left = MOST_WORK
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self.written,
            optimized=False,  # what can be counted is counted when it runs
        )
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            weigh = self.touched if name in SHALLOW else self.measured
            self.filters[name] = self._counted(name, function, weigh)
        for name in COMPARING:
            self.tests[name] = self._counted(name, self.tests[name], self.measured)
        del self.globals["lipsum"]
        self.globals |= {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Fields,
            "raise_exception": _raise,
            "strftime_now": _now,
        }

    def build(self, source: str) -> Any:
        """The template that counts what it does."""
        counted = _Counted().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(counted), self.make_globals(None))

    def spend(self, characters: int) -> None:
        """Take from what is left of the work."""
        self._left -= characters
        if self._left < 0:
            raise SecurityError(f"it handles more than {MOST_WORK:,} characters")

    def turn(self, literal: int) -> None:
        """One turn of a loop, or one call of a macro, that writes up to `literal` characters."""
        self.spend(STEP + literal)

    def touched(self, value: Any) -> Any:
        """The same value, its characters or entries counted."""
        if isinstance(value, int):
            _check_size(value.bit_length())
        sized = isinstance(value, str | bytes | list | tuple | dict)
        self.spend(STEP + (len(value) if sized else 0))
        return value

    def measured(self, value: Any) -> Any:
        """The same value, all within it counted as often as it can be reached."""
        self.touched(value)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                self.measured(key)
                self.measured(inner)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in value:
                self.measured(inner)
        return value

    def joined(self, *parts: Any) -> str:
        """What `~` does."""
        return "".join([str(self.measured(part)) for part in parts])

    @pass_context
    def written(self, _: Context, value: Any) -> Any:
        """What `{{ }}` writes; into the prompt, or into a text that the template keeps."""
        return self.measured(value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result can be larger than what it is given."""
        self.touched(left)
        self.touched(right)
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                    self.spend(len(text) * max(times, 0))
        elif operator == "**":
            _check_size(right if isinstance(right, int) else 0)
        elif operator == "%" and isinstance(left, str | bytes):
            self.measured(right)
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function or a method, after a look at how large its result can be."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        named = {key: value for key, value in kwargs.items() if key not in SCOPES}
        if owner is self:
            return function(*args, **named)
        self.spend(STEP)
        if isinstance(owner, str | bytes | int):
            if name == "join":
                args = tuple(map(_list, args))
            self._weigh(name, [owner, *args, *named.values()])
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, after a look at its widths."""
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None

        def counted(*args: Any, **kwargs: Any) -> str:
            _check_widths(value.__self__)
            self.measured([*args, kwargs])
            return str(wrapper(*args, **kwargs))

        return counted

    def _counted(self, name: str, function: Any, weigh: Callable[[Any], Any]) -> Callable[..., Any]:
        """A filter or test that is weighed before it runs."""
        passed = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "join":
                args = (*args[:passed], _list(args[passed]), *args[passed + 1 :])
            self.spend(STEP)
            self._weigh(name, [*args[passed:], *kwargs.values()], weigh)
            return function(*args, **kwargs)

        return counted

    def _weigh(
        self, name: str, given: list[Any], weigh: Callable[[Any], Any] | None = None
    ) -> None:
        """Count what a call is given, and what it can make of that."""
        for value in given:
            (weigh or self.measured)(value)
        texts = [value for value in given if isinstance(value, str | bytes)]
        longest = max(map(len, texts), default=1)
        if name == "replace" and len(texts) == 3:
            # All str or all bytes: a mixture of the two fails here as `replace` itself would.
            self.spend((texts[0].count(texts[1]) + 1) * len(texts[2]))  # type: ignore[arg-type]
        elif name == "join":
            entries = max((len(value) for value in given if isinstance(value, list)), default=0)
            self.spend(entries * longest)
        elif name == "format":
            _check_widths(str(given[0]))
        elif name in GROWING:
            for number in given[1:]:
                if isinstance(number, int):
                    _check_size(number)
                    self.spend(max(number, 0) * longest)
        elif name in ("translate", "maketrans"):
            raise SecurityError(f"it calls str.{name}")


def _list(value: Any) -> Any:
    """What can be read only once, as a list."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _check_size(number: int) -> None:
    if abs(number) > LARGEST_NUMBER:
        raise SecurityError(f"it asks for a width, count or power beyond {LARGEST_NUMBER:,}")


def _check_widths(text: str | bytes) -> None:
    """Refuse format strings that make much of little: `%999999999d`, `{:{width}}`, `%*d`."""
    form = text.decode("latin-1") if isinstance(text, bytes) else text
    if re.search(r"\d{5}|%[^%a-zA-Z]*\*|\{[^{}]+\{", form):
        raise SecurityError("it formats text with a width that is large or comes from elsewhere")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that HTML would need."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: object) -> None:
    raise RefusedError(str(message))


def _now(form: str) -> str:
    _check_widths(form)
    return datetime.now().strftime(form)
