"""Bodies and queries as pydantic models, and what is wrong with one as one sentence that names the field."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from msa_jax.serve.errors import ApiError, shown

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Filled = Annotated[str, Field(min_length=1)]


class Fields(BaseModel):
    """What a JSON object may hold. null means absent, nothing is converted, and unknown names are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def read(kind: type[Fields], value: Any, where: str = "") -> Any:
    """A value as a `kind`. `where` is the value's own place, such as `messages[0]`; empty for the whole.

    Raises:
      ApiError: 400, naming the first field that is wrong.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
    at = where
    for part in error["loc"]:
        at += f"[{part}]" if isinstance(part, int) else f".{part}" if at else str(part)
    code = None
    match error["type"]:
        case "model_type" | "dict_type":
            said = f"{at or 'The body'} must be a JSON object, got {shown(error['input'])}."
        case "missing":
            said = f"{at} is missing: give it."
        case "extra_forbidden":
            known, code = ", ".join(kind.model_fields), "unknown_parameter"
            said = f"{shown(at)} is not a field of this request; there are {known}."
        case _:
            need = error["msg"].removeprefix("Value error, ").partition(" after validation")[0]
            need = re.sub(r"^\w+ should ", "must ", need)
            said = f"{at} {need}, got {shown(error['input'])}."
    raise ApiError(400, said, param=at[:80] or None, code=code)
