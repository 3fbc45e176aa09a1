"""Files that are there whole or not at all."""

import os
import pathlib


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Write a file as UTF-8 in one step: a crash leaves the old file or the new one."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, "utf-8")
    os.replace(part, path)
