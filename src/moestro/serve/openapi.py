"""The routes described for programs, in OpenAPI 3.1, and for people, as a page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.metadata import version
from typing import Any, NamedTuple

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from moestro.serve.page import read_page
from moestro.serve.schema import Body

_PLACE = "#/components/schemas/"


class Described(NamedTuple):
    """A route: where, what it does, and what it takes, if anything."""

    path: str
    says: str
    body: type[Body] | None = None


def describe(routes: Iterable[Described]) -> dict[str, Any]:
    """The routes in OpenAPI's form; the schemas are those that requests are checked against."""
    routes = list(routes)
    bodies: list[tuple[type[Body], JsonSchemaMode]] = [
        (each.body, "validation") for each in routes if each.body is not None
    ]
    _, schemas = models_json_schema(bodies, ref_template=_PLACE + "{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "moestro", "version": version("moestro")},
        "paths": {each.path: _method(each) for each in routes},
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _method(route: Described) -> dict[str, Any]:
    told: dict[str, Any] = {
        "summary": route.says,
        "responses": {
            "200": {"description": "The answer."},
            "default": {"description": "An error: {error: {message, type, param, code}}."},
        },
    }
    for name in [part[1:-1] for part in route.path.split("/") if part.startswith("{")]:
        place = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        told.setdefault("parameters", []).append(place)
    if route.body is None:
        return {"get": told}
    schema = {"$ref": _PLACE + route.body.__name__}
    content = {"application/json": {"schema": schema}}
    return {"post": {**told, "requestBody": {"required": True, "content": content}}}


def page_of(described: dict[str, Any]) -> str:
    """The same for a person."""
    parts, schemas = [], described["components"]["schemas"]
    for path, methods in described["paths"].items():
        ((method, told),) = methods.items()
        parts.append(
            f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>"
            f"<p>{escape(told['summary'])}</p>"
        )
        if "requestBody" in told:
            name = told["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            parts.append(_table(schemas[name.removeprefix(_PLACE)]))
        parts.append("</section>")
    inner = [
        f"<h2>Parts of requests</h2>{''.join(_part(*each) for each in sorted(schemas.items()))}"
    ]
    return read_page("reference.html").replace("<!-- routes -->", "".join(parts + inner))


def _part(name: str, schema: dict[str, Any]) -> str:
    says = escape(schema.get("description", "")).partition("\n")[0]
    head = f'<section id="{escape(name)}"><h3>{escape(name)}</h3><p>{says}</p>'
    return f"{head}{_table(schema)}</section>"


def _table(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td>{_kind(own)}</td></tr>"
        for name, own in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field</th><th>value</th></tr>{rows}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """What a field takes, in few words."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(_PLACE))
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        kinds = [_kind(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in schema or "const" in schema:
        return ", ".join(escape(repr(each)) for each in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    limits = {
        "minimum": "≥", "maximum": "≤", "exclusiveMinimum": "&gt;", "exclusiveMaximum": "&lt;",
    }  # fmt: skip
    told = [f"{sign} {schema[name]}" for name, sign in limits.items() if name in schema]
    return " ".join((escape(str(schema.get("type", "anything"))), *told))
