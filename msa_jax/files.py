"""Files that are there whole or not at all."""

import os
import pathlib


def write_text(path: str | pathlib.Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file as UTF-8 in one step: a crash leaves the old file or the new one.

    `mode`: its permissions, of which the process's umask takes its part.
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, path)
