"""Pages for a browser, each with a policy: it can load nothing but answers of this server."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib.resources import files

_COLOURS = files("moestro").joinpath("colours.css").read_text(encoding="utf-8")
_MARK = "/* colours */\n"


def read_page(name: str) -> str:
    """A page of this package, with the colours of all pages."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8").replace(_MARK, _COLOURS)


def headers_of(page: str, *, styled: bool = False) -> dict[str, str]:
    """The headers of a page.

    Args:
        page: all of it; its own scripts and styles may run, and no others.
        styled: allow elements with a style of their own, too; such a page is of somebody else's
            making, and its scripts reach neither this server nor what the browser keeps of it.
    """
    scripts = _hashes(page, "script")
    styles = "'unsafe-inline'" if styled else _hashes(page, "style")
    return {
        "content-security-policy": (
            f"default-src 'none'; script-src {scripts}; "
            f"style-src {styles}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'self'" + ("; sandbox allow-scripts" if styled else "")
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hashes(page: str, element: str) -> str:
    """What a policy allows the elements of a page by."""
    found = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", page, re.DOTALL)
    hashes = (b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found)
    return " ".join(f"'sha256-{each}'" for each in hashes) or "'none'"
