"""Splits long texts into blocks of whole sentences, each short enough to be a document of its own."""

import re

import numpy as np

from msa_jax.data.tokenizer import Tokenizer
from msa_jax.errors import DataError

# A sentence ends after its closing punctuation and the white space behind it, or after an empty line.
_END = re.compile(r"""[.!?]["')\]]*\s+(?=["'(\[]?[A-Z0-9])|\n[^\S\n]*\n\s*""")

# One character is at most four bytes, so four tokens, and a text is encoded with a space before it.
_MIN_TOKENS = 5
_SLACK = 3


def sentences(text: str) -> list[str]:
    """The sentences of a text, with the white space that follows them: joined, they are the text."""
    ends = [match.end() for match in _END.finditer(text)]
    bounds = [0, *(end for end in ends if end < len(text)), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def split_text(text: str, tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """Blocks of at most `max_tokens` tokens each, encoded as a document's text is; joined, they are the text.

    Blocks hold as many whole sentences as fit; a sentence that does not fit alone is cut between tokens.
    Raises DataError when `max_tokens` could not hold every single character.
    """
    if max_tokens < _MIN_TOKENS:
        raise DataError(f"max_tokens must be at least {_MIN_TOKENS}, got {max_tokens}")

    def fits(block: str) -> bool:
        return len(tokenizer.encode(" " + block)) <= max_tokens

    parts = sentences(text)
    starts = np.array([start - 1 for start, _ in tokenizer.offsets(" " + text)])
    ends = np.cumsum([len(part) for part in parts])
    tokens_before = np.searchsorted(starts, [0, *ends])  # tokens of the text up to each sentence
    blocks: list[str] = []
    first = 0
    while first < len(parts):
        # Alone, a block may take a token or two more or less than within the text: try one that may just fit.
        limit = tokens_before[first] + max_tokens + _SLACK
        last = max(first + 1, int(np.searchsorted(tokens_before, limit, "right")) - 1)
        while last > first + 1 and not fits("".join(parts[first:last])):
            last -= 1
        block = "".join(parts[first:last])
        blocks += [block] if last > first + 1 or fits(block) else _cut(block, tokenizer, max_tokens)
        first = last
    return blocks


def _cut(sentence: str, tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    pieces = []
    while sentence:
        starts = [start for start, _ in tokenizer.offsets(" " + sentence)]
        end = len(sentence) if len(starts) <= max_tokens else starts[max_tokens] - 1
        # A cut may change how the last word is spelt in tokens, or fall into a character: step back.
        while end > 1 and len(tokenizer.encode(" " + sentence[:end])) > max_tokens:
            end -= 1
        end = max(end, 1)
        pieces.append(sentence[:end])
        sentence = sentence[end:]
    return pieces
