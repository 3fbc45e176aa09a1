"""The tokenizer: a Hugging Face `tokenizers` model, the template's special tokens, and document numbers."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from msa_jax.data.templates import Template
from msa_jax.errors import DataError
from msa_jax.files import write_text

_MODEL_FILE, _TEMPLATE_FILE = "tokenizer.json", "msa_template.json"


class Tokenizer:
    """Text to token ids and back.

    `encode` treats its text as plain text: a special string inside it stays ordinary characters, so that a
    document can never forge the end of itself. Special tokens are placed by id (`token_id`, or
    `encode_frame`).
    """

    def __init__(self, inner: tokenizers.Tokenizer, template: Template):
        """Raises DataError naming every special string of the template that is not a token of `inner`."""
        missing = [s for s in template.special_tokens if inner.token_to_id(s) is None]
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise DataError(
                f"the tokenizer has no token for {shown}; give a template ({_TEMPLATE_FILE}) that names "
                "tokens it has, or load it with add_missing=True (the model's vocabulary must have room "
                "for them)"
            )
        inner.encode_special_tokens = True  # special strings within text are text
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.template = template
        self._frame_pieces = re.compile("(" + "|".join(map(re.escape, template.frame_specials)) + ")")
        self.pad_id = self.token_id(template.pad)
        digits = template.id_digits
        if template.numbers == "place":
            table = [[self.token_id(template.place_token(p, d)) for d in range(10)] for p in range(digits)]
            self._places = np.asarray(table, np.int32)
            self._brackets = self._single("["), self._single("]")
            one = "".join(rf"<\|{p}:(\d)\|>" for p in range(digits))
        else:
            one = rf"(\d{{1,{digits}}})"
        self._number = re.compile(r"\[" + one + r"\]")

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, template: Template | None = None, *, word_pattern: str | None = None
    ) -> "Tokenizer":
        """Trains byte-level BPE on `texts`, each digit its own token; `vocab_size` includes special tokens.

        `word_pattern`: regular expression (Oniguruma's) of the pieces that tokens lie within; by default GPT-2's words
        with every digit alone. The default template is `Template.compact()`. The same texts give the same tokenizer.
        Raises DataError when `vocab_size` cannot hold the 256 bytes and the special tokens.
        """
        template = template or Template.compact()
        floor = 256 + len(template.special_tokens)
        if vocab_size < floor:
            raise DataError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone take {floor}")
        inner = tokenizers.Tokenizer(models.BPE())
        words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if word_pattern:
            split = pre_tokenizers.Split(Regex(word_pattern), "isolated")
            words = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        inner.pre_tokenizer = pre_tokenizers.Sequence(words)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(template.special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, template)

    @classmethod
    def load(cls, folder: str | Path, template: Template | None = None, *, add_missing: bool = False) -> "Tokenizer":
        """Reads `tokenizer.json` and, unless `template` is given, `msa_template.json` (absent: the paper's).

        Works on a published checkpoint's folder too. `add_missing` appends special tokens that are missing.
        Raises DataError when a file is missing or damaged, or special tokens are missing.
        """
        path = Path(folder) / _MODEL_FILE
        if not path.is_file():
            raise DataError(f"{path} does not exist; give the folder that Tokenizer.save wrote, or a checkpoint's")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every kind of damage
            raise DataError(f"{path} is not a tokenizer: {error}") from error
        frames = Path(folder) / _TEMPLATE_FILE
        if template is None and frames.is_file():
            template = Template.load(frames)
        template = template or Template.paper()
        if add_missing:
            added = [tokenizers.AddedToken(s, special=True) for s in template.special_tokens]
            inner.add_special_tokens([token for token in added if inner.token_to_id(token.content) is None])
        return cls(inner, template)

    def save(self, folder: str | Path) -> None:
        """Writes both files into `folder`, each in one step: a crash leaves the old file or the new one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _TEMPLATE_FILE, self.template.to_json())
        write_text(folder / _MODEL_FILE, self._inner.to_str())

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included: what an embedding needs rows for."""
        return self._inner.get_vocab_size()

    @property
    def document_fingerprint(self) -> str:
        """Hex digest of all that makes tokens of documents and their numbers: equal ones make equal tokens."""
        template = self.template
        frame = [template.document, template.numbers, template.id_digits, template.frame_specials]
        return hashlib.sha256(json.dumps([self._inner.to_str(), frame]).encode()).hexdigest()

    def token_id(self, token: str) -> int:
        """Id of a token, given as the vocabulary spells it; raises DataError if there is none."""
        found = self._inner.token_to_id(token)
        if found is None:
            raise DataError(f"the tokenizer has no token {token!r}")
        return found

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id (a leading space is written as the byte-level letter U+0120)."""
        return self._inner.id_to_token(token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; special strings in it are ordinary characters."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """First character and end of each token of `encode(text)`; the tokens of one character share it."""
        return self._inner.encode(text, add_special_tokens=False).offsets

    def encode_frame(self, frame: str) -> list[int]:
        """Token ids of trusted template text, in which the template's special strings become their tokens."""
        ids: list[int] = []
        for special, piece in self.split_frame(frame):
            ids += [self.token_id(piece)] if special else self.encode(piece)
        return ids

    def split_frame(self, frame: str) -> list[tuple[bool, str]]:
        """The frame's pieces in order: (True, a special string) and (False, the text between)."""
        pieces = self._frame_pieces.split(frame)
        return [(bool(i % 2), piece) for i, piece in enumerate(pieces) if piece]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; special tokens are spelt out unless `skip_special`."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_batch(self, ids: Sequence[Sequence[int]], *, skip_special: bool = False) -> list[str]:
        """`decode` of many lists, in parallel."""
        return self._inner.decode_batch([list(map(int, i)) for i in ids], skip_special_tokens=skip_special)

    def format_number(self, number: int) -> str:
        """How the template spells a document number, brackets included."""
        limit = 10**self.template.id_digits
        if not 0 <= number < limit:
            raise DataError(f"document number {number} is not in 0..{limit - 1}; raise id_digits")
        if self.template.numbers == "plain":
            return f"[{number}]"
        digits = f"{number:0{self.template.id_digits}d}"
        return "[" + "".join(self.template.place_token(p, int(d)) for p, d in enumerate(digits)) + "]"

    def number_ids(self, number: int) -> list[int]:
        """Token ids of `format_number(number)`."""
        spelt = self.format_number(number)
        if self.template.numbers == "plain":
            return self.encode(spelt)
        digits = f"{number:0{self.template.id_digits}d}"
        places = (int(self._places[p, int(d)]) for p, d in enumerate(digits))
        return [self._brackets[0], *places, self._brackets[1]]

    @property
    def max_number_len(self) -> int:
        """Tokens of the longest document number."""
        return len(self.number_ids(10**self.template.id_digits - 1))

    def parse_numbers(self, ids: Iterable[int]) -> list[int]:
        """The document numbers that are spelt out whole in `ids`, in order; anything else is passed over."""
        numbers: list[int] = []
        known: list[int] = []
        size = self.vocab_size
        for token in [*map(int, ids), size]:
            # A padded vocabulary has ids that no token has: they part what stands around them.
            if 0 <= token < size:
                known.append(token)
            elif known:
                numbers += [int("".join(m)) for m in map(re.Match.groups, self._number.finditer(self.decode(known)))]
                known = []
        return numbers

    def _single(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1:
            raise DataError(f"the tokenizer must have one token for {text!r}: document numbers are built with it")
        return ids[0]
