"""What is asked for: a model, a bank, sizes of batches; and how it is laid out on a machine."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re

import jax

from msa_jax.config import PRESETS, MSAConfig
from msa_jax.errors import ConfigError, require
from msa_jax.memory.places import capacity_for
from msa_jax.sharding import AXES, MeshConfig, check_model

PROGRAMS = ("question", "decode", "encode", "train")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
TIERS = ("device", "host", "disk")
DTYPES = ("bfloat16", "int8")


def parse_tokens(text: str, flag: str = "--tokens") -> int:
    """ "100M" is 100,000,000, "64Ki" is 65,536.

    Raises:
      ConfigError: no number with K, M, G, Ki, Mi, Gi or nothing behind it, or less than 1.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?", text.strip().lower())
    count = round(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if not 1 <= count <= 10**12:
        raise ConfigError(
            f"{flag} {text!r} is no number of tokens from 1 to 1000G: write one such as 100M (K, M, G are thousands, "
            "millions and thousands of millions, Ki, Mi, Gi powers of 1,024)."
        )
    return count


def parse_mesh(text: str, chips: int) -> MeshConfig:
    """ "data=1,memory=4,model=4"; an axis left out is 1, data what is left.

    Raises:
      ConfigError: another axis, no number, or sizes that do not make up the number of chips.
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in AXES or not size.isdecimal() or not int(size) or name in sizes:
            raise ConfigError(f"--mesh {text!r}: write sizes of data, memory and model such as memory=4,model=4.")
        sizes[name] = int(size)
    rest = sizes.get("memory", 1) * sizes.get("model", 1)
    sizes.setdefault("data", max(1, chips // rest))
    if sizes["data"] * rest != chips:
        raise ConfigError(
            f"--mesh {text!r} has {sizes['data'] * rest} devices and the machine {chips}: choose sizes whose product "
            f"is {chips}."
        )
    return MeshConfig(**sizes)


def load_config(name: str) -> MSAConfig:
    """Of a preset, or of a checkpoint's folder.

    Raises:
      ConfigError: neither.
    """
    if name in PRESETS:
        return MSAConfig.preset(name)
    if not pathlib.Path(name).exists():
        raise ConfigError(
            f"--model {name!r} is neither a preset ({', '.join(sorted(PRESETS))}) nor a folder with a config.json."
        )
    return MSAConfig.from_checkpoint(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What programs are compiled for.

    Attributes:
      tokens: of the bank.
      document_tokens: of a document, on average: documents are tokens / document_tokens.
      longest_tokens: of the longest document of the bank.
      batch: questions at once. question_tokens: T of each. cache_tokens: slots of a decoder's cache.
      row_tokens: W of rows that are encoded. rows: of a chip; None: as many as fit.
      train_tokens: memory of a training batch. train_row_tokens: W of its rows. train_batch: its questions.
      train_question_tokens: T of each with its reply.
    """

    tokens: int = 10**8
    document_tokens: int = 1024
    longest_tokens: int = 4096
    batch: int = 8
    question_tokens: int = 64
    cache_tokens: int = 1024
    row_tokens: int = 2048
    rows: int | None = None
    train_tokens: int = 65_536
    train_row_tokens: int = 1024
    train_batch: int = 64
    train_question_tokens: int = 128

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value is None or value >= 1, f"{field.name} must be at least 1, got {value}.")

    def check(self, config: MSAConfig) -> None:
        """Raises ConfigError unless rows hold whole chunks of the model's."""
        for name in ("row_tokens", "train_row_tokens"):
            require(
                getattr(self, name) % config.chunk_size == 0,
                f"{name} {getattr(self, name)} is no multiple of the model's chunk size {config.chunk_size}.",
            )

    def chunks(self, config: MSAConfig, ways: int) -> int:
        """Capacity for the bank's chunks, as banks are padded, in equal parts for `ways` devices."""
        return capacity_for(-(-self.tokens // config.chunk_size), multiple=math.lcm(128, 128 * ways))

    def documents(self, ways: int) -> int:
        return capacity_for(-(-self.tokens // self.document_tokens), multiple=math.lcm(128, ways))

    def longest(self, config: MSAConfig) -> int:
        """Chunks of the longest document."""
        return max(1, -(-min(self.longest_tokens, self.tokens) // config.chunk_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """Dtypes of a bank and where its content lies.

    Attributes:
      keys, content: "bfloat16" or "int8".
      tier: of the content: "device", "host" or "disk".
    """

    keys: str = "bfloat16"
    content: str = "bfloat16"
    tier: str = "device"

    def __str__(self) -> str:
        return f"keys {self.keys}, content {self.content} on {'the ' * (self.tier != 'disk')}{self.tier}"


# From the best to the smallest. Content first, as the dtype of keys changes what is selected; off the device last, as
# every question then waits for a bus.
BANKS = (
    Bank(),
    Bank(content="int8"),
    Bank(keys="int8", content="int8"),
    Bank(keys="int8", tier="host"),
    Bank(keys="int8", content="int8", tier="host"),
    Bank(keys="int8", tier="disk"),
)


def parse_banks(keys: str | None, content: str | None) -> tuple[Bank, ...]:
    """Those of `BANKS` that flags allow, or the one that they spell out.

    Args:
      keys: "bfloat16" or "int8"; None leaves it open.
      content: a dtype, a tier, or both with a comma between them; None leaves both open.

    Raises:
      ConfigError: another word.
    """
    words = [] if content is None else [word.strip() for word in content.split(",")]
    dtypes, tiers = [w for w in words if w in DTYPES], [w for w in words if w in TIERS]
    if len(dtypes) + len(tiers) != len(words) or max(len(dtypes), len(tiers)) > 1:
        raise ConfigError(f"--content {content!r}: write a dtype (bfloat16, int8), device, host or disk, or int8,host.")
    if keys is not None and keys not in DTYPES:
        raise ConfigError(f"--keys {keys!r}: write bfloat16 or int8.")
    allowed = [
        Bank(keys=k, content=c, tier=t)
        for t in TIERS for k in DTYPES for c in DTYPES
        if k == (keys or k) and c in (dtypes or [c]) and t in (tiers or [t])
    ]  # fmt: skip
    preferred = tuple(bank for bank in BANKS if bank in allowed)
    return preferred or tuple(allowed[:1])


def serving_meshes(config: MSAConfig, chips: int) -> list[MeshConfig]:
    """For questions, the best first: parameters over as many chips as divide the heads, at most 8, the rest for memory.

    A step reads every parameter and every routing key, so both are spread over all chips; "data" would copy the bank.
    """
    return [MeshConfig(data=1, memory=chips // n, model=n) for n in _tensor_ways(config, chips)]


def training_meshes(config: MSAConfig, chips: int) -> list[MeshConfig]:
    """For training, the best first: documents and questions over all chips, else over fewer and heads over the rest.

    Documents need no communication to be encoded, heads do; but parameters are gathered over chips that share none.
    """
    return [MeshConfig(data=chips // n, model=n, fsdp=True) for n in reversed(_tensor_ways(config, chips))]


def _tensor_ways(config, chips):
    names = ("num_heads", "num_kv_heads", "mlp_size", "vocab_size")
    return [n for n in (8, 4, 2, 1) if chips % n == 0 and not any(getattr(config, name) % n for name in names)]


def check_mesh(config: MSAConfig, mesh: MeshConfig, sizes: Sizes, name: str) -> None:
    """Refuse a mesh that the model or a batch of questions (`name` of `sizes`) does not divide into.

    Raises:
      ConfigError: says which, and what to choose.
    """
    check_model(config, jax.sharding.AbstractMesh((mesh.data, mesh.memory, mesh.model), AXES))
    batch = getattr(sizes, name)
    require(batch % mesh.data == 0, f"mesh.data {mesh.data} does not divide {name} {batch}: choose a multiple of it.")
