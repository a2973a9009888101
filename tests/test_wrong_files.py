"""Files whose content is not what their name says: the error names the kind and says what to do."""

import gzip
import io
import json
import zipfile

import pytest

from helpers.databases import load_one_question, make_database
from mtsql.files import in_one_line, read_json
from mtsql.rl.replay import read_demonstrations
from mtsql.sql.questions import read_conversations
from mtsql.sql.schema import load_schemas

TEXT = json.dumps([{"db_id": "one", "question": "q", "query": "SELECT 1"}])


def zip_archive():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("train.json", TEXT)
    return content.getvalue()


WRONG = {
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
        "git lfs pull",
    ),
    "HTML": (b"\n<!DOCTYPE html>\n<html><head><title>Quota exceeded</title>", "it is a web page"),
    "gzip": (gzip.compress(TEXT.encode()), "compressed with gzip: unpack it"),
    "ZIP": (zip_archive(), "it is a ZIP archive or an Excel file"),
    "Parquet": (b"PAR1\x15\x04\x15\x10", "it is a Parquet file"),
    "zeros": (bytes(5000), "it begins with zero bytes"),
}
TEXTS = {
    "UTF-16": (TEXT.encode("utf-16"), "it is UTF-16: save it as UTF-8"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "it is UTF-16: save it as UTF-8"),
    "empty": (b" \n\n", "it is empty"),
    "code page 1252": (b"\n\n[\n\x93a\x94]", "line 4 has the byte 0x93: save it as UTF-8"),
}
READERS = {
    "train.json": read_conversations,
    "tables.json": load_schemas,
    "demonstrations.jsonl": read_demonstrations,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", WRONG | TEXTS)
def test_the_error_names_the_kind_of_a_wrong_text_file(tmp_path, name, kind):
    content, words = (WRONG | TEXTS)[kind]
    if name.endswith(".jsonl") and kind == "empty":
        return  # an empty file of lines is a valid file without demonstrations
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        READERS[name](tmp_path / name)
    assert words in str(error.value) and str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", WRONG)
def test_the_error_names_the_kind_of_a_wrong_database_file(tmp_path, kind):
    content, words = WRONG[kind]
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "one.sqlite").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_one_question(tmp_path)


def test_the_error_says_that_a_database_is_damaged(tmp_path):
    path = make_database(tmp_path / "database" / "one.sqlite")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="one.sqlite: not a readable SQLite database: .*malformed"):
        load_one_question(tmp_path)


def test_the_error_names_the_place_of_a_fault_in_json(tmp_path):
    (tmp_path / "a.json").write_text(TEXT[:-1] + ",]")
    with pytest.raises(ValueError, match=r"a.json: not JSON: .* line 1 column \d+"):
        read_json(tmp_path / "a.json")


def test_a_message_with_line_breaks_becomes_one_line():
    assert in_one_line("no column a\nb\u2028c\rd in  x") == "no column a b c d in  x"
