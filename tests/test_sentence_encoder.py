"""A sentence encoder is read from a folder, and a bad folder is named in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from helpers.models import tiny_tokenizer
from mtsql.model.rendering import Renderer
from mtsql.model.sentence_encoder import load_encoder
from mtsql.rl.embeddings import check_embedding, open_embedder
from mtsql.rl.trajectory import Trajectory

CPU = torch.device("cpu")
POSITIONS = 22
LONG = " ".join(["SELECT name FROM singer"] * 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=POSITIONS,
    )
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pooled_by_hand(folder, text, pooling):
    """The vector of a short text."""
    encoder = load_encoder(str(folder), CPU, "x")
    ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        hidden = encoder.model(ids).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_texts_become_vectors_of_length_one_whatever_stands_beside_them(folder, tmp_path, pooling):
    path = shutil.copytree(folder, tmp_path / "copy")
    if pooling != "mean":
        (path / "1_Pooling").mkdir()
        key = {"cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}[pooling]
        settings = {key: True, "pooling_mode_mean_tokens": False, "include_prompt": True}
        (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)  # as tokenizers of language models have none
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = load_encoder(str(path), CPU, "selftaught.embedding")
    vectors = encoder.encode(["SELECT name", LONG, "name"])
    np.testing.assert_allclose((vectors**2).sum(1), 1, rtol=1e-5)
    for text, vector in zip(["SELECT name", "name"], vectors[::2]):
        np.testing.assert_allclose(vector, pooled_by_hand(path, text, pooling), atol=1e-5)
    np.testing.assert_allclose(encoder.encode([LONG])[0], vectors[1], atol=1e-5)
    assert not np.allclose(encoder.encode([LONG + " WHERE 1"])[0], vectors[1], atol=1e-4)


def test_the_text_of_a_trajectory_is_what_was_sampled(folder):
    renderer = Renderer(tiny_tokenizer())
    embedder = open_embedder(str(folder), renderer, CPU, 99)
    points = []
    for observation in ("one row", "two rows"):
        trajectory = Trajectory(None, 0, [1], None)
        for text in ("SELECT name", "singer"):
            ids = renderer.render_reply(text)
            trajectory.add_sampled(ids, [0.0] * len(ids))
            trajectory.add_context(renderer.render_observation(observation))
        points.append(embedder.embed_with(None)([trajectory])[0])
    np.testing.assert_array_equal(*points)
    texts = ["SELECT name\nsinger"]
    np.testing.assert_allclose(load_encoder(str(folder), CPU, "x").encode(texts)[0], points[0])


def without(name):
    return lambda path: (path / name).unlink()


def write(name, text):
    return lambda path: (path / name).write_text(text)


def ask_for_max(path):
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "no such folder"),
        (without("config.json"), "no config.json"),
        (without("tokenizer_config.json"), "no tokenizer_config.json"),
        (without("model.safetensors"), "no .safetensors file"),
        (write("config.json", '{"model_type": "clouds"}'), "clouds"),
        (write("config.json", "{"), "config.json"),
        (write("tokenizer.json", "{"), ""),
        (ask_for_max, "mean, cls and last token"),
    ],
)
def test_a_bad_folder_is_one_line_that_names_the_key(folder, tmp_path, damage, words):
    path = shutil.copytree(folder, tmp_path / "copy")
    damage(path)
    with pytest.raises(ValueError, match="selftaught.embedding") as error:
        check_embedding(str(path))
    assert str(path) in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_weight_is_named(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="selftaught.embedding .*the weight encoder.layer.1"):
        load_encoder(str(path), CPU, "selftaught.embedding")
