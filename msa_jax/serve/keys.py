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
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from msa_jax.errors import ConfigError
from msa_jax.serve.errors import ApiError, shown

_DIGEST = re.compile(r"[0-9a-f]{64}")


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
        return cls({digest: _access(value, str(path)) for digest, value in _read(path).items()})

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


def _read(path: str | pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(pathlib.Path(path).read_text("utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}: name a file that `python -m msa_jax.serve.keys add` made.") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not JSON ({e}): restore it, or make keys anew.") from e
    if not isinstance(values, dict) or not all(map(_DIGEST.fullmatch, values)):
        raise ConfigError(
            f"{path}: must be an object whose names are SHA-256 hashes, 64 hexadecimal digits; a key itself has no "
            "place in it: `python -m msa_jax.serve.keys add` makes one."
        )
    names = [_access(value, f"{path}, {digest[:8]}...").name for digest, value in values.items()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: more than one key is named {', '.join(sorted(twice))}: rename all but one.")
    return values


def _access(value: Any, where: str) -> Access:
    need = '{"name": a string, "namespaces": a list of strings or "*", "write": true or false}'
    good = isinstance(value, dict) and value.keys() == {"name", "namespaces", "write"}
    good = good and isinstance(value["name"], str) and value["name"] and isinstance(value["write"], bool)
    spaces = value["namespaces"] if good else None
    if not good or not (spaces == "*" or (isinstance(spaces, list) and all(isinstance(s, str) for s in spaces))):
        raise ConfigError(f"{where}: must be {need}, got {shown(value)}.")
    return Access(value["name"], None if spaces == "*" else tuple(dict.fromkeys(spaces)), value["write"])


def _write(path: str, values: Mapping[str, Any]) -> None:
    """In one step, readable by the owner alone."""
    aside = f"{path}.{os.getpid()}.new"
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1, ensure_ascii=False)
        os.replace(aside, path)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}: choose a place that can be written.") from e


def add_key(path: str, name: str, namespaces: Sequence[str] | None, write: bool) -> str:
    """Make a key, add it to a file (made if there is none) and return it. `namespaces` None means all.

    Raises:
      ConfigError: a bad file, or a name that is taken.
    """
    values = _read(path) if os.path.exists(path) else {}
    if not name or any(value["name"] == name for value in values.values()):
        raise ConfigError(f"{path}: the name {name!r} is empty or taken: give another one.")
    key = f"msa-{secrets.token_urlsafe(32)}"
    spaces = "*" if namespaces is None else list(namespaces)
    _write(path, values | {digest_of(key): {"name": name, "namespaces": spaces, "write": write}})
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
    try:
        if options.command == "add":
            print(add_key(options.file, options.name, options.namespace, options.write))
            return 0
        values = _read(options.file)
        if options.command == "list":
            for access in (_access(value, options.file) for value in values.values()):
                print(json.dumps(dataclasses.asdict(access), ensure_ascii=False))
            return 0
        kept = {digest: value for digest, value in values.items() if value["name"] != options.name}
        if len(kept) == len(values):
            raise ConfigError(f"{options.file}: no key is named {options.name!r}: `list` shows those there are.")
        _write(options.file, kept)
    except ConfigError as e:
        print(f"keys: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
