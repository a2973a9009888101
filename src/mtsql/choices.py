"""Choices of a configuration: a `Literal` field may hold only one of its values."""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

KlEstimator = Literal["k1", "k2", "k3"]
"""Estimators of a KL, for the loss and for the penalty in the reward."""


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
