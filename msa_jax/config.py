"""Configuration of an MSA model: frozen dataclasses that refuse a bad value where it enters.

An `MSAConfig` says what a model is; the `RuntimeConfig` that it inherits, how it runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from msa_jax import families, routing
from msa_jax.errors import ConfigError, require
from msa_jax.families.msa import TEMPLATE_LEN
from msa_jax.spec import LayerSpec, is_number, require_choices
from pallas_kernels.dispatch import Implementation

DType = Literal["float32", "bfloat16"]
# What came after banks were first written, and the value that says what those were encoded with.
_LATER = {"proportional_attention": False, "layer_specs": [{}], "embedding_scale": 1.0}


# Names of earlier versions, which saved runs have; elsewhere they are refused, as some mean something else today.
RENAMED = {"top_k": "top_k_documents"}


def of_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model as earlier versions wrote them, under the names that they have now."""
    values = {RENAMED.get(n, n): value for n, value in values.items() if n not in RENAMED or value is not None}
    method, recall = values.pop("top_k_method", None), values.pop("top_k_recall", None)
    if method == "approximate":
        values["retriever"] = method if recall is None else f"{method}:recall={recall}"
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_sizes(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(_is_int(value) and value >= 1, f"{name} must be an integer of at least 1, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a model runs, not what it is: all of it may change between a bank's encoding and its asking.

    Attributes:
      top_k_documents: k, documents that a router layer selects.
      retriever: what selects them, by name, with settings of its own as in "approximate:recall=0.9"; the names are
        those of `msa_jax.routing.RETRIEVERS`.
      router_bias_scale: multiplies the router's bias. Above 1 when a memory of many times the documents of the training
        is asked: among more documents the best scores lie closer together, and the attention reads several as one.
      implementation: of the operations on the bank, see `pallas_kernels`: None for the best of the platform, or
        "xla", "tpu", "gpu", which never falls back.
      remat: what the backward pass of a model recomputes. "none": nothing; "dots": all but matrix products; "full":
        whole layers.
    """

    top_k_documents: int = 16
    retriever: str = "exact"
    router_bias_scale: float = 1.0
    implementation: Implementation | None = None
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        require_choices(self)
        _require_sizes(self, "top_k_documents")
        routing.parse(self.retriever)
        scale = self.router_bias_scale
        require(is_number(scale) and scale > 0, f"router_bias_scale must be positive, got {scale!r}.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Its settings."""
        return tuple(field.name for field in dataclasses.fields(RuntimeConfig))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(RuntimeConfig):
    """What one attention layer needs to know; enough to embed `MemorySparseAttention` in another model.

    Dims: E `hidden_size`, H `num_heads`, K `num_kv_heads`, D `head_dim`, P `chunk_size`, k `top_k_documents`.

    Attributes:
      hidden_size: width E of the residual stream.
      num_heads: query heads H, a multiple of `num_kv_heads`.
      num_kv_heads: key/value heads K.
      head_dim: D, even (RoPE rotates pairs).
      rope_theta: base of the rotary position embedding.
      norm_eps: epsilon inside the square root of every RMSNorm.
      chunk_size: P, tokens pooled into one chunk of the memory bank.
      position_offset: position of the first token of the active context. A constant of the model (the
        published code uses template length + k in training), so that k may change at inference.
      routing_score: "cosine" (the paper, and training), or "dot" (scaled dot products), which serves
        checkpoints whose published inference code left routing vectors unnormalised.
      router_bias: add `beta * (s_d - max s)` to the logits of document d's chunks, beta learned per head.
        Not in the paper; off for parity.
      router_bias_init: initial beta.
      proportional_attention: add `log P` to the logits of chunks, so that a pooled chunk weighs as much as the P tokens
        it stands for (Token Merging, arXiv 2210.09461, section 3.2); also to a document's last chunk, which may hold
        fewer. Without it a chunk weighs as much as one token, and small models with P of 32 or 64 learned to write no
        document number (docs/results.md). Not in the paper; off for parity.
      dtype: compute dtype. Softmax, pooling, norms and scores are float32 whatever it is.
      param_dtype: dtype in which parameters are stored.
    """

    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    chunk_size: int = 64
    position_offset: int = 19
    routing_score: Literal["cosine", "dot"] = "cosine"
    router_bias: bool = False
    router_bias_init: float = 20.0
    proportional_attention: bool = False
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self):
        _require_sizes(self, "hidden_size", "num_heads", "num_kv_heads", "head_dim", "chunk_size")
        super().__post_init__()
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}).",
        )
        require(self.head_dim % 2 == 0, f"head_dim must be even for RoPE, got {self.head_dim}.")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, f"{name} must be positive, got {value!r}.")
        require(
            _is_int(self.position_offset) and self.position_offset >= 0,
            f"position_offset must be an integer of at least 0, got {self.position_offset!r}.",
        )

    @property
    def group_size(self) -> int:
        """G = H / K, query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def router_width(self) -> int:
        """M = K * D, width of a routing vector."""
        return self.num_kv_heads * self.head_dim

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def storage_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.param_dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSAConfig(AttentionConfig):
    """Configuration of an `MSATransformer` (paper section 3; the backbone is Qwen3).

    Attributes:
      vocab_size: V, rows of the embedding.
      num_layers: L.
      mlp_size: F, inner width of SwiGLU.
      router_layers: sorted indices of the layers that read the bank; `None` means the latter half, of those that have
        no window where there are any.
      tie_embeddings: use the embedding as the output projection.
      embedding_scale: multiplies embeddings where they enter the stream, rounded to `param_dtype` (Gemma).
      layer_specs: what each layer is, repeated over the layers; one of them makes all layers equal.
    """

    vocab_size: int = 4096
    num_layers: int = 4
    mlp_size: int = 256
    router_layers: tuple[int, ...] | None = None
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    layer_specs: tuple[LayerSpec, ...] = (LayerSpec(),)

    def __post_init__(self):
        super().__post_init__()
        _require_sizes(self, "vocab_size", "num_layers", "mlp_size")
        scale = self.embedding_scale
        require(is_number(scale) and scale > 0, f"embedding_scale must be positive, got {scale!r}.")
        specs = tuple(self.layer_specs)
        require(
            0 < len(specs) <= self.num_layers and all(isinstance(spec, LayerSpec) for spec in specs),
            f"layer_specs must be 1 to {self.num_layers} LayerSpec, got {self.layer_specs!r}.",
        )
        whole = [specs[i % len(specs)] for i in range(self.num_layers)]
        period = next(n for n in range(1, len(whole) + 1) if all(s == whole[i % n] for i, s in enumerate(whole)))
        object.__setattr__(self, "layer_specs", tuple(whole[:period]))  # the shortest, so that equal models are equal
        layers = self.router_layers
        if layers is None:
            half = range(self.num_layers // 2, self.num_layers)
            layers = tuple(i for i in half if self.spec_of(i).window is None) or tuple(half)
        try:
            layers = tuple(operator.index(i) for i in layers)
        except TypeError as e:
            raise ConfigError(f"router_layers must be integers, got {layers!r}.") from e
        require(
            layers == tuple(sorted(set(layers))) and len(layers) > 0,
            f"router_layers must be sorted, distinct and not empty, got {layers}.",
        )
        require(
            0 <= layers[0] and layers[-1] < self.num_layers,
            f"router_layers must lie in 0..{self.num_layers - 1} (num_layers {self.num_layers}), got {layers}.",
        )
        object.__setattr__(self, "router_layers", layers)

    @property
    def layer_groups(self) -> tuple[tuple[bool, int, int], ...]:
        """Runs of consecutive layers of one kind (spec, router or not): `(is_router, first layer, how many)`."""
        kind = lambda i: (self.spec_of(i), i in self.router_layers)  # noqa: E731
        runs = (list(run) for _, run in itertools.groupby(range(self.num_layers), kind))
        return tuple((run[0] in self.router_layers, run[0], len(run)) for run in runs)

    def spec_of(self, layer: int) -> LayerSpec:
        """What a layer is."""
        return self.layer_specs[layer % len(self.layer_specs)]

    def replace(self, **changes: Any) -> MSAConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {
            "router_layers": list(self.router_layers), "layer_specs": [spec.to_dict() for spec in self.layer_specs]
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What the model is, for fingerprints: `to_dict` without how it runs, and without what banks of old lack."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in self.names() and not (name in _LATER and _LATER[name] == value)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MSAConfig:
        """Build from `to_dict` output or a flat mapping; unknown names raise `ConfigError`."""
        values = of_today(values)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        require(not unknown, f"Unknown model settings {unknown}; known ones are {sorted(known)}.")
        if "layer_specs" in values:
            values = values | {"layer_specs": tuple(LayerSpec.from_dict(spec) for spec in values["layer_specs"])}
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MSAConfig:
        """A named size: "tiny", "small", "qwen3_0_6b" or "qwen3_4b", with `changes` on top."""
        require(name in PRESETS, f"Unknown preset {name!r}; choose one of {sorted(PRESETS)}.")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def from_checkpoint(cls, path: str | pathlib.Path, **changes: Any) -> MSAConfig:
        """Read a published `config.json` of MSA or of a family in `msa_jax.families`, given the file or its folder.

        Raises:
          ConfigError: the file is missing, is not JSON, lacks a field, or asks for something that this
            project does not compute.
        """
        path = pathlib.Path(path)
        path = path / "config.json" if path.is_dir() else path
        values = families.read_file(path)
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        require(not unknown, f"{path}: msa_config has settings unknown to this version: {unknown}.")
        try:
            config = cls(**values)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from e
        return config.replace(**changes)


_QWEN3 = dict(
    vocab_size=151_936, num_kv_heads=8, head_dim=128, chunk_size=64, top_k_documents=16,
    position_offset=TEMPLATE_LEN + 16, tie_embeddings=True, dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # Trains on two CPU cores in minutes.
    "tiny": dict(
        hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_size=256,
        vocab_size=4096, chunk_size=16,
    ),
    # An experiment on one accelerator.
    "small": dict(
        hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, mlp_size=1536,
        vocab_size=16_384, chunk_size=32,
    ),
    "qwen3_0_6b": _QWEN3 | dict(hidden_size=1024, num_layers=28, num_heads=16, mlp_size=3072, rope_theta=1e6),
    "qwen3_4b": _QWEN3 | dict(hidden_size=2560, num_layers=36, num_heads=32, mlp_size=9728, rope_theta=5e6),
}  # fmt: skip
