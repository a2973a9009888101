"""Files as people have them: read with an error that names the file, written whole or not at all.

A byte order mark is skipped, and a line ends with LF, CRLF or CR and with nothing else: the line
separators of Unicode may stand inside a JSON string. All readers of text files use these functions.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")
_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class WriteError(ValueError):
    """A file could not be written, for a reason outside the program: the disk is full, the folder
    is gone, or writing there is not allowed. The text names the file."""


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
        kind = kind_of(error.object)
        line = error.object.count(b"\n", 0, error.start) + 1
        place = f"line {line} has the byte 0x{error.object[error.start]:02x}: save it as UTF-8"
        raise ValueError(f"{named(path, what)}: not UTF-8: {kind or place}") from error


def read_lines(path: Path | str, what: str = "") -> list[str]:
    """The lines of a text file, without their ends and without blank lines at the end of the file.
    ValueError as `read_text`."""
    text = read_text(path, what).rstrip()
    return text.split("\n") if text else []


def read_json(path: Path | str, what: str = "", is_strict: bool = False) -> Any:
    """The value of a JSON file. ValueError as `read_text`, and for what is not JSON: NaN and
    infinities, and values that are nested too deeply to be read. is_strict: see `parse_json`."""
    return parse_json(read_text(path, what), named(path, what), is_strict)


def parse_json(text: str, where: str, is_strict: bool = False) -> Any:
    r"""The value of a JSON text. ValueError that begins with `where` if it is not JSON.

    is_strict: refuse two more things and name the entry and the key at fault: an object that has a
    key twice, since the first value would be lost, and half a character (a lone surrogate such as
    `\ud83d`), since no file and no tokenizer takes it.
    """
    doubled: list[tuple[dict, str]] = []

    def build(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            doubled.append((found, next(key for key in found if keys.count(key) > 1)))
        return found

    value = _loads(text, where, build if is_strict else None)
    if doubled:
        place = _place_of(value, lambda part: part is doubled[0][0])
        raise ValueError(f"{where}{place}: the key {doubled[0][1]!a:.80} appears twice")
    if is_strict and _HALF_ESCAPE.search(text):
        place = _place_of(value, _has_half_character)
        if place is not None:
            raise ValueError(f"{where}{place}: half a character (a lone surrogate such as \\ud83d)")
    return value


def _has_half_character(value: Any) -> bool:
    texts = value if isinstance(value, dict) else [value]  # a key of an object, or a text
    return any(isinstance(text, str) and _HALF.search(text) for text in texts)


def _place_of(value: Any, is_it: Callable[[Any], bool]) -> str | None:
    """The place of the first part of a JSON value for which `is_it` is true, such as ": entry 3:
    interaction[0]: utterance"; None if there is none."""
    stack: list[tuple[Any, str]] = [(value, "")]
    while stack:
        part, place = stack.pop()
        if is_it(part):
            return place
        if isinstance(part, dict):
            inner = [(item, f"{place}: {ascii(key)[1:-1]}") for key, item in part.items()]
        elif isinstance(part, list):
            is_top = part is value
            inner = [(x, f": entry {i}" if is_top else f"{place}[{i}]") for i, x in enumerate(part)]
        else:
            continue
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
"""So many bytes of a file show what it is."""
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
    """What a file is that is not what it should be, by its first bytes, and what to do about it;
    empty if it is none of the things that people often have in its place."""
    start = start[:KIND_BYTES]
    return next((words for pattern, words in _KINDS if re.match(pattern, start, re.I)), "")


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


@contextmanager
def printing() -> Iterator[None]:
    """For what prints to the standard output. WriteError if it cannot be written: the disk that it
    goes to is full, or the program that reads it (`| head`) has ended."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Python writes what is left of it at the end of the process, which would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = f"the standard output: cannot be written: {error.strerror}"
        raise WriteError(reason) from error


def print_line(text: str) -> None:
    """Print a text at once. WriteError as `printing`."""
    with printing():
        print(text, flush=True)


def in_one_line(text: str) -> str:
    """A message in one line: names in it, of columns for example, may have line breaks."""
    return " ".join(text.splitlines())


def named(path: Path | str, what: str) -> str:
    """How an error names a file: after the flag that names it, if there is one."""
    return f"{what} {path}" if what else str(path)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
