"""The chat page: one HTML file, and the headers that keep a browser from running or loading anything that is not in it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources


def load_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    text = resources.files("dsv3_jax.serve").joinpath("page.html").read_text("utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(text, "script"),
        "style-src": _hash(text, "style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _hash(text: str, tag: str) -> str:
    """The page's only script or style, by its hash."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
