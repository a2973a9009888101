"""Flags of the small commands. A wrong flag ends the command with one line."""

from argparse import ArgumentParser, ArgumentTypeError
from typing import NoReturn

from mtsql.files import in_one_line


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line, `error: ...`, with exit code 1, like those of the
    scripts. Flags cannot be abbreviated."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End the process with the message."""
        line = in_one_line(message).encode("utf-8", "backslashreplace").decode("utf-8")
        self.exit(1, f"error: {line}\n")


def whole_number(text: str) -> int:
    """The value of a flag that counts something; at least 1."""
    try:
        value = int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"expected a whole number, found {text!r:.80}") from error
    if value < 1:
        raise ArgumentTypeError(f"expected 1 or more, found {value}")
    return value
