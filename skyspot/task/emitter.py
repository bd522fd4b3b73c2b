"""The emitter of YAML text: user values as double-quoted scalars, structures in a readable form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from skyspot.errors import UsageError, shown

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""The booleans of YAML 1.1, in lower case."""
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def refuse_unwritable(what: str, value: str) -> str:
    """Return the value if YAML and an environment variable can hold it.

    Raises:
        UsageError: it contains a NUL or half of a surrogate pair.
    """
    if "\0" in value:
        raise UsageError(f"{what}: the value contains a NUL character: {shown(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UsageError(f"{what}: the value contains half of a surrogate pair: {shown(value)}")
    return value


def quoted(value: Any) -> str:
    """Write a string as a double-quoted scalar: ASCII, one line, valid in YAML 1.1 and 1.2."""
    text = refuse_unwritable("a value", str(value))
    return '"' + "".join(_ESCAPES.get(c) or (c if " " <= c <= "~" else _escape(ord(c))) for c in text) + '"'


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def scalar(value: Any) -> str:
    """Write a scalar: strings quoted; numbers, booleans and null bare."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 reads 1e-07 as text: a decimal point is needed.
        if value.is_integer() and abs(value) < 1e15:
            return repr(int(value))
        from decimal import Decimal  # Rarely needed, and the import costs every render a millisecond.

        return format(Decimal(repr(value)), "f")
    return str(value) if isinstance(value, int) else quoted(value)


# SkyPilot's own keywords, which read better without quotes. User values are always quoted: a bare NULL would be null.
_OURS = ("MOUNT", "COPY", "MOUNT_CACHED", "FAILOVER", "EAGER_NEXT_REGION")


def flow(value: Any) -> str:
    """Write a structure on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key(name)}: {flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if value in _OURS:
        return str(value)
    return scalar(value)


_BARE = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_KEY = re.compile(r"[A-Za-z/~][A-Za-z0-9._/~-]*")
# Words that YAML 1.1, which SkyPilot's loader uses, reads as a boolean or null.
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"}


def plain(value: str) -> str:
    """Write a name, bare if YAML reads it as a string, else quoted."""
    return value if _BARE.fullmatch(value) and value.lower() not in _WORDS else quoted(value)


def key(name: str) -> str:
    """Write a key, bare if YAML reads it as a string; an environment variable may be named NO."""
    return name if _KEY.fullmatch(name) and name.lower() not in _WORDS else quoted(name)


def section(value: Mapping[str, Any], name: str) -> str:
    """Write a section of a task YAML with a blank line after it; nothing if it would be empty."""
    return f"{name}:\n{block(value, 2)}\n\n" if value else ""


def entry(value: str, name: str) -> str:
    """Write an entry of a task YAML with a blank line after it; nothing if the value is empty."""
    return f"{name}: {plain(value)}\n\n" if value else ""


def block(value: Mapping[str, Any], indent: int) -> str:
    """Write a mapping in lines: one level of keys, lists with one rung per line, all else in flow style."""
    pad, lines = " " * indent, []
    for name, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], Mapping):
            lines += [f"{pad}{key(name)}:", *(f"{pad}  - {flow(part)}" for part in item)]
        else:
            lines.append(f"{pad}{key(name)}: {flow(item)}")
    return "\n".join(lines)
