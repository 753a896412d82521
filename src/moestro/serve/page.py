"""The page at /: playground.html, and a policy under which it can load nothing else."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from importlib.resources import files

PAGE = files("moestro.serve").joinpath("playground.html").read_text(encoding="utf-8")


def _hash(element: str) -> str:
    """What a policy allows an element of the page by."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
