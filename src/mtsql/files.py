"""Reading and writing text files. Errors name the file, and a file is written completely or not at
all.

A byte order mark is skipped. A line ends with LF, CRLF or CR and with nothing else, because the
line separators of Unicode may stand inside a JSON string. All readers of text files use these
functions.
"""

import errno
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

NAME_FAULTS = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP)
"""Errors of a file or folder that the user has named, wherever it is looked up."""


class WriteError(ValueError):
    """A file could not be written for a reason outside the program: the disk is full, the folder
    was removed, or writing there is not allowed. The text names the file."""


def read_text(path: Path | str, what: str = "") -> str:
    """The text of a UTF-8 file, with LF at its line ends.

    ValueError if the file cannot be read or is not UTF-8. It begins with `what` (a flag, such as
    "data.train") and the file.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{named(path, what)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        content = error.object
        line = content.count(b"\n", 0, error.start) + 1
        place = f"line {line} has the byte 0x{content[error.start]:02x}: save it as UTF-8"
        reason = kind_of(content) or place
        raise ValueError(f"{named(path, what)}: not UTF-8: {reason}") from error


def read_lines(path: Path | str, what: str = "") -> list[str]:
    """The lines of a text file, without their ends and without blank lines at the end of the file.
    ValueError like `read_text`."""
    text = read_text(path, what).rstrip()
    return text.split("\n") if text else []


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, or of another file with a JSON object in each line. ValueError
    that names the file and the line for a damaged line."""
    rows = []
    for number, line in enumerate(read_lines(file), 1):
        row = parse_json(line, f"{file}, line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: expected keys with values")
        rows.append(row)
    return rows


def file_digest(path: Path | str) -> str:
    """A hash of a file's bytes, which are not held in memory at once. ValueError that names a file
    that cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def read_json(path: Path | str, what: str = "", is_strict: bool = False) -> Any:
    """The value of a JSON file. ValueError like `read_text` and `parse_json`, which explains
    is_strict."""
    return parse_json(read_text(path, what), named(path, what), is_strict)


def parse_json(text: str, where: str, is_strict: bool = False) -> Any:
    r"""The value of a JSON text. ValueError that begins with `where` if it is not JSON. NaN,
    infinities, and values that are nested too deeply to be read are not accepted.

    is_strict: refuse two more faults and name the entry and the key. An object that has a key twice
    would lose the first value. Half a character (a lone surrogate such as `\ud83d`) cannot be
    written to a file or read by a tokenizer.
    """
    repeated: list[tuple[dict, str]] = []  # (object, the key that it has twice)

    def build(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = [key for key in found if keys.count(key) > 1]
            repeated.append((found, twice[0]))
        return found

    value = _loads(text, where, build if is_strict else None)
    if repeated:
        at_fault, key = repeated[0]
        place = _place_of(value, lambda part: part is at_fault)
        raise ValueError(f"{where}{place}: the key {key!a:.80} appears twice")
    if is_strict and _SURROGATE_ESCAPE.search(text):
        place = _place_of(value, has_half_character)
        if place is not None:
            raise ValueError(f"{where}{place}: half a character (a lone surrogate such as \\ud83d)")
    return value


def has_half_character(value: Any) -> bool:
    """Whether a text, or a key of an object, has half a character in it."""
    texts = value if isinstance(value, dict) else [value]
    return any(isinstance(text, str) and _SURROGATE.search(text) for text in texts)


def _place_of(value: Any, is_it: Callable[[Any], bool]) -> str | None:
    """The place of the first part of a JSON value for which `is_it` is true, such as ": entry 3:
    interaction[0]: utterance"; None if there is none."""
    stack: list[tuple[Any, str]] = [(value, "")]
    while stack:
        part, place = stack.pop()
        if is_it(part):
            return place
        inner = []
        if isinstance(part, dict):
            inner = [(item, f"{place}: {ascii(key)[1:-1]}") for key, item in part.items()]
        elif isinstance(part, list) and part is value:
            inner = [(item, f": entry {index}") for index, item in enumerate(part)]
        elif isinstance(part, list):
            inner = [(item, f"{place}[{index}]") for index, item in enumerate(part)]
        stack += reversed(inner)
    return None


def _loads(text: str, where: str, build: Callable[[list], dict] | None) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=build)
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        kind = kind_of(text[:KIND_BYTES].encode("utf-8", "replace"))
        raise ValueError(f"{where}: not JSON: {kind or error}") from error


KIND_BYTES = 64
"""How many bytes of a file are needed to recognise its kind."""
_KINDS = (
    (rb"version https://git-lfs", "it is a Git LFS pointer to the file: run git lfs pull"),
    (rb"\s*<(!doctype html|html|\?xml)", "it is a web page: download the file itself"),
    (rb"\x1f\x8b", "it is compressed with gzip: unpack it"),
    (rb"PK\x03\x04", "it is a ZIP archive or an Excel file: unpack it, or save it as CSV"),
    (rb"PAR1", "it is a Parquet file: save it as JSON Lines or CSV"),
    (rb"SQLite format 3\0", "it is an SQLite database"),
    (rb"\xff\xfe|\xfe\xff|[\[{]\0|\0[\[{]", "it is UTF-16: save it as UTF-8"),
    (rb"\0{16}", "it begins with zero bytes: copy or download it again"),
    (rb"\s*\Z", "it is empty"),
)


def kind_of(start: bytes) -> str:
    """Say what a file of the wrong kind is, by its first bytes, and what the user can do. Empty if
    the kind is not in `_KINDS`."""
    for pattern, words in _KINDS:
        if re.match(pattern, start[:KIND_BYTES], re.IGNORECASE):
            return words
    return ""


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 file under another name, then rename it, so that a file of that name is always
    complete. WriteError that names the file if it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file as `write_text` does."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from error


def append_line(path: Path | str, text: str) -> None:
    """Add a text and a line end to an existing file: all of it or, if that fails, nothing. OSError
    if it cannot be written."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(handle).st_size
        rest = f"{text}\n".encode()
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def prepare_output() -> None:
    """Make the standard output ready for any text: a character that its encoding lacks is printed
    as an escape. ValueError if it is closed. Call it before anything is printed."""
    if sys.stdout is None:
        raise ValueError("the standard output is closed: redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def printing() -> Iterator[None]:
    """Print to the standard output inside the `with`. WriteError if it cannot be written: the disk
    is full, or the program that reads it (`| head`) has ended."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # When Python ends, it writes what is left in the buffer. That would fail once more, so it
        # is sent to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = f"the standard output: cannot be written: {error.strerror}"
        raise WriteError(reason) from error


def print_line(text: str) -> None:
    """Print a text at once. WriteError like `printing`."""
    with printing():
        print(text, flush=True)


def print_page(text: str) -> None:
    """Print what the user has asked to read. A reader that ends early (`--help | head`) has what it
    wanted, so that is no error; WriteError like `printing` for any other reason."""
    try:
        print_line(text)
    except WriteError as error:
        if not isinstance(error.__cause__, BrokenPipeError):
            raise


def in_one_line(text: str) -> str:
    """A message in one line, since names in it, for example of columns, may have line breaks."""
    return " ".join(text.splitlines())


def fault_of_name(error: OSError) -> str | None:
    """What to tell a user about an error of a file or folder that the user has named, wherever it
    was looked up; None for an error that has another cause."""
    if error.errno not in NAME_FAULTS or error.filename is None:
        return None
    return f"{ascii(error.filename)[1:-1]:.80}: {error.strerror}"


def named(path: Path | str, what: str) -> str:
    """The name of a file as an error shows it: after the flag `what`, if a flag named the file."""
    return f"{what} {path}" if what else str(path)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
