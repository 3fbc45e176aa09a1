"""API keys: who may read and change which namespaces. `python -m msa_jax.serve.keys` makes and removes them.

    add FILE --name NAME (--namespace NAMESPACE ... | --all) [--write]     prints the key, once
    remove FILE NAME | list FILE

The file is JSON, `{SHA-256 of the key: {"name", "namespaces": [...] or "*", "write": true or false}}`: it holds no key.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from msa_jax.cli.base import run
from msa_jax.errors import ConfigError
from msa_jax.files import write_text
from msa_jax.serve.errors import ApiError, shown


class Entry(BaseModel):
    """What the file holds of a key."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(min_length=1)]
    namespaces: list[str] | Literal["*"]
    write: bool


_FILE = TypeAdapter(dict[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], Entry])


@dataclasses.dataclass(frozen=True)
class Access:
    """What a request may do.

    Attributes:
      name: of the key; empty without keys.
      namespaces: that it may read; None means all, and then also what is told of the server as a whole.
      write: whether it may also change documents there.
    """

    name: str = ""
    namespaces: tuple[str, ...] | None = None
    write: bool = True

    def require(self, namespace: str, param: str | None = None) -> str:
        """The namespace. What is refused does not depend on whether there is such a namespace.

        Raises:
          ApiError: 403.
        """
        if self.namespaces is not None and namespace not in self.namespaces:
            raise ApiError(403, f"This key does not reach namespace {shown(namespace)}.", param=param)
        return namespace

    def chosen(self, named: tuple[str, ...] | None, known: Sequence[str], param: str) -> tuple[str, ...] | None:
        """The namespaces a question reads: those it names, or all that the key may read; None means all there are.

        With a key of some namespaces, those without documents count as empty; `known` are those with documents.

        Raises:
          ApiError: 403 for a namespace that the key may not read, whether it is `known` or not.
        """
        if self.namespaces is None:
            return named
        chosen = self.namespaces if named is None else named
        for namespace in chosen:
            self.require(namespace, param)
        return tuple(namespace for namespace in dict.fromkeys(chosen) if namespace in known)

    def require_write(self) -> None:
        """Raises ApiError 403 for a key that may only read."""
        if not self.write:
            raise ApiError(403, "This key may read documents and not change them.")

    def require_all(self) -> None:
        """Raises ApiError 403 for a key of some namespaces."""
        if self.namespaces is not None:
            raise ApiError(403, "This needs a key of all namespaces, as it tells of the server as a whole.")


def digest_of(key: str) -> str:
    """What the file keeps of a key. Keys are drawn at random, so a plain hash cannot be undone by guessing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Keys:
    """The keys of a file."""

    def __init__(self, accesses: Mapping[str, Access]):
        """`accesses` by `digest_of` their keys."""
        self._accesses = dict(accesses)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Keys:
        """Read a file.

        Raises:
          ConfigError: no such file, or not as the module describes.
        """
        return cls({digest: _access(entry) for digest, entry in _read(path).items()})

    def access(self, authorization: str | None) -> Access:
        """What a request with that Authorization header may do. Compares with every key, in constant time each.

        Raises:
          ApiError: 401.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = digest_of(key.strip()), None
        for known, access in self._accesses.items():
            if hmac.compare_digest(known, digest):
                found = access
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(
                401, "A valid API key is needed: send it in the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return found


def _read(path: str | pathlib.Path) -> dict[str, Entry]:
    try:
        entries = _FILE.validate_json(pathlib.Path(path).read_bytes())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}: name a file that `python -m msa_jax.serve.keys add` made.") from e
    except ValidationError as e:
        raise ConfigError(f"{path}: {_what_is_wrong(e)}") from None
    names = [entry.name for entry in entries.values()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: more than one key is named {', '.join(sorted(twice))}: rename all but one.")
    return entries


def _what_is_wrong(errors: ValidationError) -> str:
    """Without what stands there: it may be a key."""
    error = errors.errors(include_url=False, include_input=False)[0]
    if error["type"] == "json_invalid":
        return f"not JSON ({error['msg']}): restore it, or make keys anew."
    if "[key]" in error["loc"] or not error["loc"]:
        return (
            "must be an object whose names are SHA-256 hashes, 64 hexadecimal digits; a key itself has no place in "
            "it: `python -m msa_jax.serve.keys add` makes one."
        )
    need = '{"name": a string, "namespaces": a list of strings or "*", "write": true or false}'
    return f"{error['loc'][0][:8]}... must be {need}; {'.'.join(map(str, error['loc'][1:2])) or 'it'} is not so."


def _access(entry: Entry) -> Access:
    spaces = None if entry.namespaces == "*" else tuple(dict.fromkeys(entry.namespaces))
    return Access(entry.name, spaces, entry.write)


def _write(path: str, entries: Mapping[str, Entry]) -> None:
    """In one step, readable by the owner alone."""
    try:
        write_text(path, _FILE.dump_json(dict(entries), indent=1).decode(), mode=0o600)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}: choose a place that can be written.") from e


def add_key(path: str, name: str, namespaces: Sequence[str] | None, write: bool) -> str:
    """Make a key, add it to a file (made if there is none) and return it. `namespaces` None means all.

    Raises:
      ConfigError: a bad file, or a name that is taken.
    """
    entries = _read(path) if os.path.exists(path) else {}
    if not name or any(entry.name == name for entry in entries.values()):
        raise ConfigError(f"{path}: the name {name!r} is empty or taken: give another one.")
    key = f"msa-{secrets.token_urlsafe(32)}"
    entry = Entry(name=name, namespaces="*" if namespaces is None else list(namespaces), write=write)
    _write(path, entries | {digest_of(key): entry})
    return key


def main(arguments: Sequence[str] | None = None) -> int:
    root = argparse.ArgumentParser(
        prog="python -m msa_jax.serve.keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True)
    add, remove, listing = (commands.add_parser(name) for name in ("add", "remove", "list"))
    for command in (add, remove, listing):
        command.add_argument("file", metavar="FILE")
    add.add_argument("--name", required=True, help="whose key it is; the log and `remove` use it")
    reach = add.add_mutually_exclusive_group(required=True)
    reach.add_argument("--namespace", action="append", help="that it may read; more than once for several")
    reach.add_argument("--all", action="store_true", help="all namespaces, and the metrics")
    add.add_argument("--write", action="store_true", help="it may change documents there too")
    remove.add_argument("name", metavar="NAME")
    options = root.parse_args(arguments)

    def work() -> None:
        if options.command == "add":
            print(add_key(options.file, options.name, options.namespace, options.write))
            return
        entries = _read(options.file)
        if options.command == "list":
            for entry in entries.values():
                print(json.dumps(dataclasses.asdict(_access(entry)), ensure_ascii=False))
            return
        kept = {digest: entry for digest, entry in entries.items() if entry.name != options.name}
        if len(kept) == len(entries):
            raise ConfigError(f"{options.file}: no key is named {options.name!r}: `list` shows those there are.")
        _write(options.file, kept)

    return run("keys", work)


if __name__ == "__main__":
    sys.exit(main())
