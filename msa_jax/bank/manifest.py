"""What a bank on disk says of itself: the manifest, the model it belongs to, and the errors of using it wrongly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import BankError
from msa_jax.model import MSATransformer

FORMAT = 2
# Elements of each parameter that its fingerprint looks at: enough that no training step leaves it as it was.
_SAMPLED = 1024


@dataclasses.dataclass(frozen=True)
class BankSpec:
    """What the arrays of a bank look like, and the model and tokenizer whose they are.

    Attributes:
      fingerprint: of the model, see `fingerprint_of`.
      text: of how documents become tokens, see `Tokenizer.document_fingerprint`.
      chunk_size: P, tokens a chunk.
      layers: L_r, router layers.
      width: M of a routing key.
      kv_heads, head_dim: K, D of the content.
      dtype: of keys and content.
    """

    fingerprint: str
    text: str
    chunk_size: int
    layers: int
    width: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def bytes_per_chunk(self) -> int:
        """Of routing key and content in all router layers."""
        elements = self.layers * (self.width + 2 * self.kv_heads * self.head_dim)
        return elements * jnp.dtype(self.dtype).itemsize

    @classmethod
    def of(cls, model: MSATransformer, tokenizer: Tokenizer) -> BankSpec:
        """The spec of banks that `model` encodes with `tokenizer`, in its compute dtype."""
        c = model.config
        return cls(
            fingerprint=fingerprint_of(model),
            text=tokenizer.document_fingerprint,
            chunk_size=c.chunk_size,
            layers=len(c.router_layers),
            width=c.router_width,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            dtype=c.dtype,
        )

    def require_same(self, other: BankSpec, where: str) -> None:
        """Raise BankError unless the bank at `where`, of this spec, was made by the model and tokenizer of `other`."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        different = [f"{name} {mine[name]} here, {others[name]} there" for name in mine if mine[name] != others[name]]
        if list(name for name in mine if mine[name] != others[name]) == ["text"]:
            raise BankError(
                f"{where}: this bank was made with another tokenizer or document frame ({different[0]}): open it with "
                "the tokenizer and template that made it, or encode the documents anew with `create` and `add`."
            )
        if different:
            raise BankError(
                f"{where}: this bank was made by another model ({'; '.join(different)}): open it with the checkpoint "
                "that made it, or encode the documents anew with `create` and `add`."
            )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The state of a bank at one version.

    Attributes:
      spec: what the arrays look like.
      version: counts the commits from 1 on.
      chunks: C, chunks written, those of deleted documents included.
      rows: N, documents written, deleted ones included.
      documents, tokens: live documents, and tokens of theirs.
      namespaces: names, in the order of the numbers that rows carry.
      next_text: one more than the largest ordinal that a text of the bank has had; see `numbers`.
      operation: what the commit did, and when, for `versions`.
    """

    spec: BankSpec
    version: int
    chunks: int = 0
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    namespaces: tuple[str, ...] = ()
    next_text: int = 1
    operation: str = "create"
    time: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self)).encode()

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Read what `to_bytes` wrote.

        Raises:
          BankError: not a manifest, or of a format that this version does not know.
        """
        try:
            values: dict[str, Any] = json.loads(raw)
            form = values.pop("format")
        except (ValueError, KeyError, AttributeError) as e:
            raise BankError(f"{where}: the manifest is damaged ({e}): restore the folder from a copy.") from e
        if form != FORMAT:
            how = "encode the documents anew" if form in range(FORMAT) else "update the package"
            raise BankError(f"{where}: a bank of format {form}, and this version reads {FORMAT}: {how}.")
        try:
            spec = BankSpec(**values.pop("spec"))
            return cls(spec=spec, **values | {"namespaces": tuple(values["namespaces"])})
        except (TypeError, KeyError) as e:
            raise BankError(f"{where}: the manifest is damaged ({e}): restore the folder from a copy.") from e


def fingerprint_of(model: MSATransformer) -> str:
    """Hex digest of what the model is and of elements spread over every parameter: equal models have equal ones.

    What only steers how a model runs does not count.
    """
    digest = hashlib.sha256(json.dumps(model.config.identity(), sort_keys=True).encode())
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable[...]
        step = max(1, value.size // _SAMPLED)
        sampled = np.asarray(jax.device_get(value.reshape(-1)[::step]))
        digest.update(f"{path}{value.shape}{value.dtype}".encode())
        digest.update(sampled.tobytes())
    return digest.hexdigest()
