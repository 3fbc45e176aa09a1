"""Uuids as text: drawing them, and cutting them into tokens that are alike in every uuid."""

import itertools

import numpy as np

_SHAPE = "hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh"
# GPT-2's words, with every digit alone.
_WORDS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def word_pattern() -> str:
    """Regular expression (Oniguruma's) of the pieces that byte-level BPE may merge within.

    They are GPT-2's words, except that every digit is alone, and so is every pair of hexadecimal digits of a uuid,
    counted from the uuid's start, and the space before one. Left to BPE, a uuid falls apart into tokens of one to
    several letters: longer, and of a symbol set in which single digits are shared by all uuids.
    """
    pairs = []
    for i in range(len(_SHAPE)):
        if _SHAPE[i] == "h" and _SHAPE[:i].count("h") % 2 == 0:
            before, after = _expression(_SHAPE[:i]), _expression(_SHAPE[i + 2 :])
            pairs.append((before and f"(?<={before})") + "[0-9a-f]{2}" + (after and f"(?={after})"))
    return f"{'|'.join(pairs)}| (?={_expression(_SHAPE)})|{_WORDS}"


def _expression(shape: str) -> str:
    groups = ((kind, len(list(group))) for kind, group in itertools.groupby(shape))
    return "".join(f"[0-9a-f]{{{n}}}" if kind == "h" else "-" for kind, n in groups)


def draw_uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Random uuids of version 4 (RFC 9562)."""
    raw = np.frombuffer(rng.bytes(16 * count), np.uint8).reshape(count, 16).copy()
    raw[:, 6] = raw[:, 6] & 0x0F | 0x40
    raw[:, 8] = raw[:, 8] & 0x3F | 0x80
    digits = (row.tobytes().hex() for row in raw)
    return [f"{d[:8]}-{d[8:12]}-{d[12:16]}-{d[16:20]}-{d[20:]}" for d in digits]
