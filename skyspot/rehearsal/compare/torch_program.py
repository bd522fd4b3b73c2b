"""Writes what a torch file holds to stdout: a JSON line that lists it, then the tensors' bytes.

The task's Python runs this as a script, with the file as its argument. It loads weights only: no pickle is executed.
It ends with its standard input: the program that reads it has ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

PIECE = 1 << 24


def main(path: str) -> str | None:
    """List and write the file's contents; returns the reason if it cannot be read."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Only we write to stdout.
    sys.path.pop(0)  # The folder of this script.
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        entries = sorted(_leaves(held, (), torch.Tensor), key=lambda entry: [str(key) for key in entry[0]])
        entries = [(where, _flat(value) if isinstance(value, torch.Tensor) else value) for where, value in entries]
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        told = re.search(r"Unsupported \w+: \w+ [\w.]+", text)
        return f"torch.load(weights_only=True): {told[0] if told else text.splitlines()[0][:200]}"
    listed = []
    for where, value in entries:
        if isinstance(value, torch.Tensor):
            dtype, size = str(value.dtype).removeprefix("torch."), value.numel() * value.element_size()
            listed.append({"path": where, "dtype": dtype, "shape": list(value.shape), "bytes": size})
        else:
            known = value is None or isinstance(value, (bool, int, float, str))
            listed.append({"path": where, "value": value if known else repr(value)})
    out.write(json.dumps({"order": "<" if sys.byteorder == "little" else ">", "entries": listed}).encode() + b"\n")
    for _, value in entries:
        if isinstance(value, torch.Tensor):
            _write(value, out)
    out.flush()
    return None


def _end_with_stdin() -> None:
    os.read(0, 1)
    os._exit(1)


def _leaves(value: Any, path: tuple[Any, ...], tensor: type) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The tensors and other values within dicts and lists."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key if isinstance(key, int) else str(key)), tensor)
    elif isinstance(value, (list, tuple)) and value:
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, number), tensor)
    else:
        yield path, value


def _flat(tensor: Any) -> Any:
    """The same tensor with its elements in order. A tensor of another layout becomes dense.

    Raises:
        RuntimeError: it has no elements in order.
    """
    return tensor.detach().to_dense().resolve_conj().resolve_neg().contiguous()


def _write(tensor: Any, out: Any) -> None:
    size = tensor.numel() * tensor.element_size()
    for start in range(0, size, PIECE):
        out.write(ctypes.string_at(tensor.data_ptr() + start, min(PIECE, size - start)))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except BrokenPipeError:  # Nobody reads on.
        os._exit(0)
