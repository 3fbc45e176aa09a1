"""The strings that frame documents, questions and replies: data, read from a file beside the tokenizer."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from msa_jax.errors import DataError

Numbers = Literal["plain", "place"]
FIELD = re.compile(r"\{(id|text|question|answer)\}")
_ANY_FIELD = re.compile(r"\{(\w+)\}")  # misspelt ones included

_GOLDEN = 618_033_988_749_894_848  # of 10**18

_FIELDS = {
    "prefix": (),
    "document": ("id", "text", "id"),
    "question": ("question",),
    "reply_head": (),
    "reference": ("id",),
    "restated": ("question",),
    "reply_answer": ("answer",),
    "not_found": (),
}


@dataclass(frozen=True)
class Template:
    """Frames with the fields `{id}`, `{text}`, `{question}`, `{answer}`, and the special tokens they use.

    The active context is `question`, `reply_head`, then for each document found `reference` and `appended`,
    then `end_of_retrieve`, `restated`, `reply_answer`. `prefix` stands before everything and is encoded once.
    `not_found` is no frame but the answer to a question that is taken for one that the memory cannot answer.
    `numbers` says how a document's number is spelt: "plain" is `[4]`, digits as text; "place" is `[`, one
    special token for each of the `id_digits` positions and digits, `]`: a small model learns those far
    sooner.
    Raises DataError when a frame lacks its fields, or the special strings are empty or not distinct.
    """

    start: str = "<|im_start|>"
    end: str = "<|im_end|>"
    reference_end: str = "<|object_ref_end|>"
    end_of_retrieve: str = "<End-of-Retrieve>"
    pad: str = "<|pad|>"
    prefix: str = "<|im_start|>user\n"
    document: str = "<|im_start|>{id}. {text}{id}<|im_end|>"
    question: str = (
        "\nPlease answer the question based on the above historical document information\n\n{question}\n"
        "Please return all documents related to the question\n"
    )
    reply_head: str = "<|im_end|>\n<|im_start|>assistant\n<|im_start|>"
    reference: str = "{id}<|object_ref_end|>"
    appended: str = "{id}. {text}\n<|object_ref_end|>"
    restated: str = "<|im_start|>The user's question is: {question}\n<|object_ref_end|>"
    reply_answer: str = "The answer to the question is: {answer}<|im_end|>"
    not_found: str = "The memory holds no answer to this question."
    numbers: Numbers = "plain"
    id_digits: int = 7

    def __post_init__(self):
        specials = self.frame_specials
        if "" in specials or len(set(specials)) != len(specials):
            raise DataError(f"the template's special strings must be distinct and not empty, got {specials}")
        for name, wanted in _FIELDS.items():
            self._check_frame(name, (wanted,))
        self._check_frame("appended", (("id", "text"), ("id", "text", "id")))
        if self.numbers not in get_args(Numbers):
            raise DataError(f'the template\'s numbers must be "plain" or "place", got {self.numbers!r}')
        if not 1 <= self.id_digits <= 18:
            raise DataError(f"the template's id_digits must be in 1..18, got {self.id_digits}")
        if not self.reference.endswith(self.reference_end):
            raise DataError(f"the template's reference must end with {self.reference_end!r}: the engine stops there")
        if not self.reply_answer.endswith(self.end):
            raise DataError(f"the template's reply_answer must end with {self.end!r}: the engine stops there")
        if not self.not_found.strip():
            raise DataError("the template's not_found must say that there is no answer, it is empty")

    def _check_frame(self, name: str, choices: tuple[tuple[str, ...], ...]) -> None:
        found = tuple(_ANY_FIELD.findall(getattr(self, name)))
        if found not in choices:
            wanted = " or ".join(" ".join(f"{{{f}}}" for f in choice) or "no fields" for choice in choices)
            raise DataError(f"the template's {name} must hold {wanted}, in this order, got {getattr(self, name)!r}")

    @property
    def frame_specials(self) -> tuple[str, ...]:
        """The special strings that frames are made of, and the padding."""
        return (self.start, self.end, self.reference_end, self.end_of_retrieve, self.pad)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Every string that must be one token: the frames', and the place-value digits where used."""
        if self.numbers == "plain":
            return self.frame_specials
        places = (self.place_token(p, d) for p in range(self.id_digits) for d in range(10))
        return self.frame_specials + tuple(places)

    def number(self, ordinal: int) -> int:
        """The number of a bank's n-th text, from 1 on; no two have the same.

        "plain" numbers count up; "place" ones are spread over all digits, as those are that the model learns from.
        Raises DataError when numbers of `id_digits` digits have run out.
        """
        limit = 10**self.id_digits
        if not 1 <= ordinal < limit:
            raise DataError(
                f"text {ordinal} of a bank cannot have a number: id_digits {self.id_digits} of the template allows "
                f"1 to {limit - 1}; use a model whose template has more, or begin another bank"
            )
        # Prime to 10, so that no two ordinals meet, and near the golden section, so that neighbours are far apart.
        stride = _GOLDEN // 10 ** (18 - self.id_digits)
        stride += next(i for i in range(4) if math.gcd(stride + i, 10) == 1)
        return ordinal if self.numbers == "plain" else ordinal * stride % limit

    @staticmethod
    def place_token(position: int, digit: int) -> str:
        """The token of `digit` at `position`, counted from the most significant digit."""
        return f"<|{position}:{digit}|>"

    @classmethod
    def paper(cls, **changes) -> "Template":
        """The paper's frames, for checkpoints trained with them; their tokenizer pads with end-of-text."""
        return cls(**{"pad": "<|endoftext|>", **changes})

    @classmethod
    def compact(cls, **changes) -> "Template":
        """Short frames for small models: place-value ids, and quoted documents keep their trailing id."""
        frames = {
            "prefix": "<|im_start|>",
            "question": "{question}\n",
            "reply_head": "<|im_start|>",
            "appended": "{id}. {text}{id}\n<|object_ref_end|>",
            "restated": "<|im_start|>{question}\n<|object_ref_end|>",
            "reply_answer": "{answer}<|im_end|>",
            "numbers": "place",
        }
        return cls(**{**frames, **changes})

    @classmethod
    def chinese(cls, **changes) -> "Template":
        """Chinese frames with the paper's special tokens, for checkpoints whose tokenizer knows Chinese."""
        frames = {
            "question": "\n请根据以上历史文档回答问题。\n\n{question}\n请先列出与该问题有关的全部文档。\n",
            "restated": "<|im_start|>用户的问题是：{question}\n<|object_ref_end|>",
            "reply_answer": "该问题的答案是：{answer}<|im_end|>",
            "not_found": "记忆中没有这个问题的答案。",
        }
        return cls.paper(**{**frames, **changes})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "template") -> "Template":
        """The inverse of `to_json`; `where` names the file in errors. Raises DataError on a bad template."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); write it with Template.to_json") from error
        kinds = {f.name: int if f.name == "id_digits" else str for f in dataclasses.fields(cls)}
        if not isinstance(data, dict):
            raise DataError(f"{where}: must be a JSON object with the fields {', '.join(kinds)}")
        for name, value in data.items():
            if name not in kinds:
                raise DataError(f"{where}: unknown field {name!r}; the fields are {', '.join(kinds)}")
            if type(value) is not kinds[name]:
                raise DataError(f"{where}: {name} must be {kinds[name].__name__}, got {value!r}")
        try:
            return cls(**data)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> "Template":
        """The template in a file that `to_json` or a person wrote; fields that are left out are `Template()`'s.

        Raises DataError when there is no such file, or it holds no template.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise DataError(f"the template {path} cannot be read: {reason}") from None
        return cls.from_json(text, str(path))
