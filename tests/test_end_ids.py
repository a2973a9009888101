"""The ids that end a reply: the template's, the tokenizer's and those of the model's folder."""

import json

import pytest

from helpers.chat_models import CHATML, HERMES_TAGS, LIKE_QWEN, byte_tokenizer, chars
from mtsql.agent.protocol import TAGS
from mtsql.model.end_ids import end_ids_of_folder
from mtsql.model.policy import load_tokenizer
from mtsql.model.rendering import Renderer
from mtsql.model.tokenizer import train_tokenizer


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, []),
        ({"config": {}}, []),
        ({"config": {"eos_token_id": None}}, []),
        ({"config": {"eos_token_id": 7}}, [7]),
        ({"generation_config": {"eos_token_id": [7, 3]}}, [7, 3]),
        ({"generation_config": {"eos_token_id": [7, 3]}, "config": {"eos_token_id": 3}}, [7, 3]),
        (
            {"generation_config": "\ufeff" + '{"eos_token_id": 1}', "config": {"eos_token_id": 2}},
            [1, 2],
        ),
    ],
)
def test_end_ids_come_from_both_files_of_a_folder_each_once(tmp_path, files, ids):
    write(tmp_path / "model", **files)
    assert end_ids_of_folder(tmp_path / "model") == ids


def test_a_missing_folder_names_no_ids(tmp_path):
    assert end_ids_of_folder(tmp_path / "missing") == []


@pytest.mark.parametrize("base", ["base", "missing", "adapter", "", None])
def test_adapters_have_the_end_ids_of_their_base_model(tmp_path, base):
    path = str(tmp_path / base) if base else base
    write(tmp_path / "adapter", adapter_config={"base_model_name_or_path": path})
    write(tmp_path / "base", generation_config={"eos_token_id": [7, 3]})
    assert end_ids_of_folder(tmp_path / "adapter") == ([7, 3] if base == "base" else [])


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize(
    "content",
    ["{", "", "[1]", '{"eos_token_id": NaN}', "[" * 9999]
    + [json.dumps({"eos_token_id": bad}) for bad in ("2", -1, 1.5, True, [1, "2"], {"a": 1})],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path, name, content):
    write(tmp_path / "model", **{name: content})
    with pytest.raises(ValueError, match=rf"^model.path .*model.{name}.json: [^\n]*$"):
        end_ids_of_folder(tmp_path / "model")


def test_a_renderer_stops_at_the_end_ids_of_the_folder(tmp_path):
    train_tokenizer(["SELECT name FROM singer"], 300, TAGS).save_pretrained(tmp_path)
    usual = Renderer(load_tokenizer(str(tmp_path))).stop_ids
    further = load_tokenizer(str(tmp_path)).convert_tokens_to_ids("<answer_sql>")
    write(tmp_path, generation_config={"eos_token_id": [further, *usual]})
    renderer = Renderer(load_tokenizer(str(tmp_path)))
    assert renderer.stop_ids == (*usual, further)
    assert renderer.close_reply() == [usual[0]]
    write(tmp_path, generation_config="{")
    with pytest.raises(ValueError, match="generation_config.json: not JSON"):
        Renderer(load_tokenizer(str(tmp_path)))


def test_decode_leaves_out_a_stop_id_unless_it_is_a_tag(tmp_path):
    tokenizer = byte_tokenizer(CHATML, HERMES_TAGS, LIKE_QWEN)
    end_of_text, end, tag = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "</tool_call>"]
    )
    write(tmp_path / "model", generation_config={"eos_token_id": [end, tag]})
    tokenizer.name_or_path = str(tmp_path / "model")
    renderer = Renderer(tokenizer)
    assert renderer.stop_ids == (end, end_of_text, tag)
    for last, text in ((end, "hi"), (end_of_text, "hi"), (tag, "hi</tool_call>")):
        assert renderer.decode([*chars("hi"), last]) == text
