"""Reading text files as editors and other programs write them, and writing files."""

import errno
import io
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from mtsql.files import (
    WriteError,
    prepare_output,
    print_line,
    print_page,
    read_json,
    read_lines,
    read_text,
    write_text,
)


def test_a_byte_order_mark_line_ends_and_blank_last_lines_make_no_difference(tmp_path):
    file = tmp_path / "a.txt"
    for content in (b"a\nb", b"\xef\xbb\xbfa\r\nb\r\n\r\n", b"a\rb\n\n"):
        file.write_bytes(content)
        assert read_lines(file) == ["a", "b"]
    file.write_text("a\u2028b\x85c\nd", encoding="utf-8")
    assert read_lines(file) == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{", b"{", b"[NaN]", b"[-Infinity]", b"[" * 100_000, b""]
)
def test_a_file_that_is_not_json_is_an_error_that_names_flag_and_file(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^data\.train .*a\.json: not ") as error:
        read_json(file, "data.train")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_text(path)


def test_the_old_file_stays_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "a.txt"
    write_text(file, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtsql.files.os.replace", fail)
    with pytest.raises(ValueError, match=r"a\.txt: cannot be written: No space left"):
        write_text(file, "new")
    assert file.read_text() == "old"


@pytest.mark.parametrize(("reason", "is_error"), [(errno.EPIPE, False), (errno.ENOSPC, True)])
def test_a_page_may_be_read_in_part_but_not_be_lost(reason, is_error, monkeypatch, tmp_path):
    with open(tmp_path / "out", "w") as out:

        def fail() -> None:
            raise OSError(reason, os.strerror(reason))

        monkeypatch.setattr(
            sys, "stdout", SimpleNamespace(write=len, flush=fail, fileno=out.fileno)
        )
        with pytest.raises(WriteError) if is_error else nullcontext():
            print_page("usage")


def test_a_character_that_the_output_lacks_is_printed_as_an_escape(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    prepare_output()
    print_line("run \u00fc\ud83d")
    assert written.getvalue() == b"run \\xfc\\ud83d\n"
