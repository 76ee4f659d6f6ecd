"""Takes out of a bug report what could be secret."""

import re
from typing import Any

__all__ = ["HIDDEN", "scrub", "scrub_log"]

HIDDEN = "(hidden)"

_WORDS = (
    r"token|passw(?:or)?d|passphrase|secret|api[-_]?key|private[-_]?key|authorization|credential"
)
_NAME = re.compile(rf"(?i)(?:{_WORDS})")
_RULES = (
    # user:password@ in an address
    (re.compile(r"(://)[^/@\s\"']+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"',;]+"), rf"\1 {HIDDEN}"),
    # JSON Web Tokens, such as those of service accounts
    (re.compile(r"\beyJ[\w-]{8,}(?:\.[\w-]*)*"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL), HIDDEN),
    (
        re.compile(rf"(?i)((?:{_WORDS})[\w.-]*[\"']?\s*(?:=|:\s)\s*[\"']?)[^\s\"',;&}}]+"),
        rf"\1{HIDDEN}",
    ),
    # What a manifest has where something else belongs.
    (re.compile(r"\bfound .+?(, expected )", re.DOTALL), rf"found {HIDDEN}\1"),
)
_QUOTED = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"")
_MESSAGES = ("error", "warnings", "sync_error", "message", "reason")
"""Fields whose text may quote what a manifest says."""


def scrub(value: Any) -> Any:
    """Return JSON-like *value* without what looks like a secret, by its name or by its look."""
    if isinstance(value, dict):
        return {name: _field(str(name), each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(each) for each in value]
    return _text(value) if isinstance(value, str) else value


def scrub_log(text: str) -> str:
    """Return log lines without what they quote, and without what looks like a secret."""
    return _QUOTED.sub(f"'{HIDDEN}'", _text(text))


def _field(name: str, value: Any) -> Any:
    if _NAME.search(name) and isinstance(value, str | bytes) and value:
        return HIDDEN
    if name in _MESSAGES:
        if isinstance(value, str):
            return scrub_log(value)
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return [scrub_log(each) for each in value]
    return scrub(value)


def _text(text: str) -> str:
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text
