"""Files as people have them: read with an error that names the file, written whole or not at all.

A byte order mark is skipped, and a line ends with LF, CRLF or CR and with nothing else: the line
separators of Unicode may stand inside a JSON string. All readers of text files use these functions.
"""

import json
import os
from pathlib import Path
from typing import Any


class WriteError(ValueError):
    """A file could not be written, for a reason outside the program: the disk is full, the folder is
    gone, or writing there is not allowed. The text names the file."""


def read_text(path: Path | str, what: str = "") -> str:
    """The text of a UTF-8 file, its line ends as LF.

    ValueError that begins with `what` (a flag, such as "data.train") and the file if it cannot be
    read or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{named(path, what)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{named(path, what)}: not UTF-8: {error}") from error


def read_lines(path: Path | str, what: str = "") -> list[str]:
    """The lines of a text file, without their ends and without blank lines at the end of the file.
    ValueError as `read_text`."""
    return read_text(path, what).rstrip().split("\n")


def read_json(path: Path | str, what: str = "") -> Any:
    """The value of a JSON file. ValueError as `read_text`, and for what is not JSON: NaN and
    infinities, and values that are nested too deeply to be read."""
    return parse_json(read_text(path, what), named(path, what))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. ValueError that begins with `where` if it is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 file beside its place, then rename it into place, so that a file of that name
    is always whole. WriteError that names the file if it cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from error


def named(path: Path | str, what: str) -> str:
    """How an error names a file: after the flag that names it, if there is one."""
    return f"{what} {path}" if what else str(path)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
