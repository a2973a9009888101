"""Types of configuration fields: choices, of which a `Literal` lists the values, and sizes."""

import re
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

KlEstimator = Literal["k1", "k2", "k3"]
"""Estimators of a KL, for the loss and for the penalty in the reward."""
ReferencePlace = Literal["device", "host"]
"""Where the frozen copy of the policy is while nothing is scored with it."""


class Size(int):
    """In the type of a field: flags and recipes may write the number as a size. The value itself is
    an ordinary int."""


NumBytes = int | Size
"""A number of bytes, which flags and recipes may also write as 8GB (10**9) or 512MiB (2**20)."""


def parse_size(text: str) -> int:
    """The number of bytes of a text such as 8GB or 1.5GiB. ValueError for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", str(text))
    if match is None:
        raise ValueError(f"expected a size such as 8GB or 512MiB, found {text!r}")
    number, prefix, is_binary = match.groups()
    base = 1024.0 if is_binary else 1000.0
    return round(float(number) * base ** (1 + "KMGT".index(prefix)))


def require_choices(config: Any, section: str) -> None:
    """ValueError that names the key if a `Literal` field of this dataclass has another value.

    Flags and recipes are checked before; this is for a configuration that is built in Python, where
    a wrong value would otherwise count as the last branch of an `if`.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            choices = ", ".join(str(choice) for choice in get_args(field.type))
            raise ValueError(f"{section}.{field.name} is {value!r}: expected one of {choices}")
