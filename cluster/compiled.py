"""Keeps compiled code true to its source.

Numba compiles a function again when its own file has changed, not when a file has that it takes functions or constants from. So a
folder of compiled code is stamped with all its sources, and what was compiled of others is forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import xxhash

STAMP = "compiled.stamp"


def forget_stale(sources: Iterable[str]) -> None:
    """Call it before the first compiled function of these files is made. sources: paths of Python files."""
    paths = sorted(Path(source) for source in sources)
    digest = xxhash.xxh3_64_hexdigest(b"\0".join(path.read_bytes() for path in paths))
    for folder in {path.parent / "__pycache__" for path in paths}:
        stamp = folder / STAMP
        with contextlib.suppress(OSError):  # A read-only installation is written anew as a whole.
            if stamp.exists() and stamp.read_text() == digest:
                continue
            for path in paths:
                for compiled in folder.glob(f"{path.stem}.*.nb[ic]"):
                    compiled.unlink(missing_ok=True)
            folder.mkdir(exist_ok=True)
            stamp.write_text(digest)
