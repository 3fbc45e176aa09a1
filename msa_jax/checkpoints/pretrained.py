"""Load and save checkpoints in the published layout: `config.json` and safetensors files."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from msa_jax.checkpoints.published import (
    PublishedTensor,
    published_config,
    published_tensors,
    published_value,
    skeleton,
)
from msa_jax.config import MSAConfig
from msa_jax.errors import CheckpointError
from msa_jax.model import MSATransformer
from msa_jax.sharding import Shardings, put

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Present in published checkpoints, not parameters of the model.
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IGNORED = re.compile(r"(model\.)?temperature|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROUTER = (".router_q_proj.0.weight", ".router_k_proj.0.weight", ".router_beta")

_log = logging.getLogger(__name__)


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e}).") from e


def _shards(path: pathlib.Path) -> dict[str, Collection[str] | None]:
    """The safetensors files of a checkpoint folder, and what each holds; None for all that is in it.

    As transformers has it: a single file comes before an index, and an index says which file a tensor is read from.
    """
    if (path / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not (path / INDEX_FILE).is_file():
        raise CheckpointError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a checkpoint folder.")
    index = _read_json(path / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items() if isinstance(weight_map, dict) else [("", None)]:
        # A file elsewhere is no part of this checkpoint.
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise CheckpointError(f"{path / INDEX_FILE}: weight_map must map tensors to files of this folder.")
        shards.setdefault(name, set()).add(tensor)
    return shards


def _open_shards(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
    """A way to read every tensor, by name; only headers are read yet. Names are those with the prefix `model.`."""
    files: dict[str, Any] = {}
    for name, tensors in _shards(path).items():
        try:
            shard = stack.enter_context(safe_open(path / name, framework="np"))
        except FileNotFoundError as e:
            raise CheckpointError(f"{path / name}: no such file, and {INDEX_FILE} names it.") from e
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{path / name}: not a readable safetensors file ({e}).") from e
        held = set(shard.keys())
        absent = sorted((tensors or set()) - held)
        if absent:
            raise CheckpointError(f"{path / name}: lacks what {INDEX_FILE} says it holds: {_few(absent)}.")
        for tensor in held if tensors is None else tensors:
            files[tensor] = functools.partial(shard.get_slice, tensor)
    # What was saved of a model without its head has names without the prefix (Qwen3-Embedding).
    if not any(name.startswith("model.") for name in files):
        files = {name if name == "lm_head.weight" else f"model.{name}": read for name, read in files.items()}
    return files


def _few(names: Sequence[str]) -> str:
    """At most three of them, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)})" if len(names) > 3 else "")


def _check(path: pathlib.Path, config: MSAConfig, files: Mapping[str, Callable[[], Any]]) -> tuple[str, ...]:
    """Names of tensors to draw afresh; one error for all that is wrong."""
    expected = {tensor.name: tensor for tensor in published_tensors(config)}
    fresh: list[str] = []
    # A plain backbone has no router at all; half a router is a mistake.
    for suffixes in (_ROUTER[:2], _ROUTER[2:]):
        names = [name for name in expected if name.endswith(suffixes)]
        fresh += [] if any(name in files for name in names) else names
    missing = [name for name in expected if name not in files and name not in fresh]
    ignored = {name for name in files if IGNORED.fullmatch(name)}
    if config.tie_embeddings:
        ignored.add(HEAD)
    unexpected = sorted(set(files) - set(expected) - ignored)
    wrong = []
    for name in sorted(set(files) & set(expected)):
        header = files[name]()
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != expected[name].shape:
            wrong.append(f"{name} is {list(shape)} where the config needs {list(expected[name].shape)}")
        if dtype not in _FLOATS:
            wrong.append(f"{name} is {dtype} and only {', '.join(_FLOATS)} are read")
    faults = [
        f"{what}: {_few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("unfit", wrong))
        if names
    ]
    if HEAD in missing:
        faults.append("if its output is its embedding, load it with tie_embeddings=True")
    if faults:
        raise CheckpointError(f"{path}: its tensors do not fit its config.json; {'; '.join(faults)}.")
    return tuple(fresh)


def _warn_of_another_head(path: pathlib.Path, files: Mapping[str, Callable[[], Any]]) -> None:
    """Tied embeddings win over a head that is stored too, as in transformers; where it differs, say so."""
    if HEAD in files and not np.array_equal(files[HEAD]()[:], files[EMBEDDING]()[:]):
        _log.warning(
            "%s: %s differs from the embedding and is not read, as config.json ties them; tie_embeddings=False "
            "reads it.", path, HEAD,
        )  # fmt: skip


def _fresh_layer(tensor: PublishedTensor, config: MSAConfig, key: jax.Array, dtype) -> np.ndarray:
    if tensor.path[-1] == "router_beta":
        return np.full(tensor.shape, config.router_bias_init, dtype)
    return np.asarray(nnx.initializers.lecun_normal()(key, tensor.shape[::-1], dtype))


def load_model(
    path: str | os.PathLike,
    config: MSAConfig | None = None,
    *,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings = Shardings(),  # noqa: B008
    **config_changes: Any,
) -> MSATransformer:
    """Load a published checkpoint, MSA or of a family in `msa_jax.families`, in one file or sharded.

    Parameters are read one at a time and put on the default device, so that host memory holds one stacked
    parameter beside the model. Tensors are cast to `config.param_dtype`. A checkpoint without any router
    weights (a plain backbone) gets fresh ones, as `nnx.Linear` draws them, and the log says so.

    Args:
      path: folder with `config.json` and `model.safetensors` or `model.safetensors.index.json`.
      config: used instead of the folder's `config.json`.
      seed: of the fresh router weights.
      mesh: devices over which parameters are spread, never whole on one of them, as `shardings` says.
      **config_changes: fields of `MSAConfig` to replace, such as `dtype="float32"`.

    Raises:
      ConfigError: `config.json` is missing or unfit.
      CheckpointError: files are missing or unreadable, or tensors are missing, unexpected or of the wrong
        shape or dtype; found from the files' headers, and one message tells of all of them.
    """
    path = pathlib.Path(path)
    if config is None:
        config = MSAConfig.from_checkpoint(path, **config_changes)
    else:
        config = config.replace(**config_changes)
    with contextlib.ExitStack() as stack:
        files = _open_shards(path, stack)
        fresh = _check(path, config, files)
        if fresh:
            _log.warning(
                "%s has no router: drew %s from seed %d; what it selects means nothing until it is trained.",
                path, _few(fresh), seed,
            )  # fmt: skip
        if config.tie_embeddings:
            _warn_of_another_head(path, files)
        by_path: dict[tuple, list[PublishedTensor]] = {}
        for tensor in published_tensors(config):
            by_path.setdefault(tensor.path, []).append(tensor)
        key = jax.random.key(seed)
        graphdef, parameters = skeleton(config, shardings)
        loaded = []
        for number, (leaf_path, variable) in enumerate(parameters):
            buffer = np.empty(variable.shape, variable.dtype)
            for tensor in by_path[leaf_path]:
                place = buffer if tensor.index is None else buffer[tensor.index]
                if tensor.name in fresh:
                    draw = jax.random.fold_in(jax.random.fold_in(key, number), tensor.index)
                    place[...] = _fresh_layer(tensor, config, draw, variable.dtype)
                else:
                    value = files[tensor.name]()[:]
                    place[...] = value.T if tensor.transposed else value
            # Waited for, or the host would hold every parameter that is still on its way.
            if mesh:
                spec = shardings.parameter(leaf_path, buffer.ndim)
                value = put(buffer, jax.NamedSharding(mesh, spec))
            else:
                value = jax.device_put(buffer)
            loaded.append((leaf_path, variable.replace(jax.block_until_ready(value))))
            del buffer, place
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save_model(model: MSATransformer, path: str | os.PathLike, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Save in the published layout, in one file or, above `max_shard_bytes`, in several and an index.

    All is written beside `path` and renamed into place: `path` is whole or absent. Host memory holds one
    shard beside the model.

    Args:
      model: parameters are saved in the dtype they are stored in.
      path: the folder to make; it must not exist, or be empty.
      max_shard_bytes: the most bytes of tensors in a file; a single larger tensor gets a file of its own.

    Raises:
      CheckpointError: `path` exists and is not an empty folder.
    """
    path = pathlib.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path}: exists; remove it or give another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    shards: list[list[PublishedTensor]] = []
    room = 0
    for tensor in published_tensors(model.config):
        size = int(np.prod(tensor.shape)) * flat[tensor.path].dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        _write(temporary, model.config, flat, shards)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(
    folder: pathlib.Path,
    config: MSAConfig,
    flat: Mapping[tuple, nnx.Variable],
    shards: list[list[PublishedTensor]],
) -> None:
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # One layer leaves the device at a time; safetensors writes memory as it lies.
        values = {
            tensor.name: np.ascontiguousarray(published_value(flat[tensor.path][...], tensor))
            for tensor in shard
        }
        save_file(values, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, name)
        total += sum(value.nbytes for value in values.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(published_config(config), indent=2))
    for file in folder.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
