"""Model folders as people bring them: each fault is one line that names the file."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from helpers.models import save_embedded
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.packing import Sample
from mtsql.model import folders
from mtsql.model.policy import (
    ModelConfig,
    generation_weights,
    load_policy,
    load_tokenizer,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_embedded(tmp_path_factory.mktemp("folders") / "good")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy of a good folder, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def change(folder: Path, name: str = "config.json", **keys) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def refusal(folder: Path, load=None) -> str:
    """The one-line error of loading the policy, or of `load`."""
    with pytest.raises(ValueError) as error:
        (load or (lambda path: load_policy(ModelConfig(path=path))))(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


CONTENTS = {
    "empty": b"",
    "a list": b"[1]",
    "a text": b'"x"',
    "null": b"null",
    "no UTF-8": b"\xff\xfe{}",
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "deep lists": b"[" * 10**5,
    "deep objects": b'{"a":' * 10**5,
    "a mark": b"\xef\xbb\xbf{}",
    "cut short": b'{"a": [1, ',
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_damaged_json_of_the_model_is_named(name, content, folder):
    (folder / name).write_bytes(CONTENTS[content])
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
)
def test_damaged_json_of_the_tokenizer_is_named(name, content, folder):
    (folder / name).write_bytes(CONTENTS[content])
    assert str(folder / name) in refusal(folder, load_tokenizer)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_pipe_is_refused_and_not_read(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    load = load_tokenizer if name.startswith("tok") else None
    assert f"{folder / name}: not a file" in refusal(folder, load)


@pytest.mark.parametrize(
    "content", [{}, {"model": 3}, {"model": {"type": "BPE"}, "added_tokens": []}]
)
def test_json_that_is_no_tokenizer_is_refused(content, folder):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert str(folder / "tokenizer.json") in refusal(folder, load_tokenizer)


@pytest.mark.parametrize(
    "keys", [{"tokenizer_class": 3}, {"added_tokens_decoder": [1]}, {"eos_token": [3]}]
)
def test_settings_that_are_no_tokenizers_are_refused(keys, folder):
    change(folder, "tokenizer_config.json", **keys)
    assert str(folder / "tokenizer_config.json") in refusal(folder, load_tokenizer)


def test_a_template_that_is_no_text_is_refused(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert str(folder / "chat_template.jinja") in refusal(folder, load_tokenizer)


ILL_VALUES = [
    {"model_type": None},
    {"model_type": 3},
    {"model_type": "no_such_model"},
    {"hidden_size": "x"},
    {"hidden_size": -1},
    {"hidden_size": 0},
    {"hidden_size": 10**12},
    {"hidden_size": []},
    {"hidden_size": 32},
    {"vocab_size": 10**12},
    {"vocab_size": 0},
    {"vocab_size": 20},
    {"head_dim": 0},
    {"num_hidden_layers": 10**12},
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": -1},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"intermediate_size": 10**12},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"hidden_act": "no_such"},
    {"dtype": "no_such"},
    {"rope_parameters": []},
    {"layer_types": "x"},
    {"layer_types": ["sliding_attention"] * 2},
    {"rope_parameters": {"rope_type": "no_such"}},
    {"rope_parameters": {"rope_type": "linear"}},
    {"max_position_embeddings": "x"},
    {"quantization_config": {"quant_method": "fp8"}},
    {"transformers_weights": "../x.safetensors"},
    {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
]


@pytest.mark.parametrize("keys", ILL_VALUES, ids=str)
def test_configurations_that_do_not_fit_the_weights_are_refused(keys, folder, capfd):
    change(folder, **keys)
    refusal(folder)
    assert capfd.readouterr() == ("", "")  # no table of transformers beside the line


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional"])
def test_rotary_tables_that_depend_on_the_length_are_refused(kind, folder):
    change(folder, rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    text = refusal(folder)
    assert str(folder / "config.json") in text and (kind == "longrope" or repr(kind) in text)
    change(folder, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "rope_type 'dynamic'" in refusal(folder)  # as older folders write it


SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("architecture", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scalings_give_the_log_probs_of_transformers(kind, architecture, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 1e4, **SCALINGS[kind]}
    shape = architecture(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(shape).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(300, (1, 120))
    with torch.no_grad():
        logp = theirs(input_ids=ids).logits[0].log_softmax(-1)
    expected = logp[99:-1].gather(1, ids[0, 100:, None])[:, 0].tolist()
    sample = Sample(ids[0, :100].tolist(), ids[0, 100:].tolist(), [1] * 20)
    with generation_weights(load_policy(ModelConfig(path=str(tmp_path)))) as weights:
        ours = score(PolicyModule(weights), [sample], 200, torch.device("cpu"))[0]
    assert ours == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x00" * 100, None, 100])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_damaged_weights_are_named(content, is_sharded, folder):
    file = folder / WEIGHTS
    if is_sharded:
        file = shard(folder)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        os.truncate(file, content or file.stat().st_size - 1)
    assert str(file) in refusal(folder)


def shard(folder: Path) -> Path:
    """Turn a folder into one with an index; returns its second shard."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:4], "model-2.safetensors": names[4:]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
    places = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / "model-2.safetensors"


def test_shards_are_read(good, folder):
    shard(folder)
    sharded = load_policy(ModelConfig(path=str(folder))).state_dict()
    for name, value in load_policy(ModelConfig(path=str(good))).state_dict().items():
        assert torch.equal(sharded[name], value)


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere.safetensors",
        "/elsewhere.safetensors",
        "./model-1.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        "nowhere.safetensors",
        3,
        None,
        ["x"],
    ],
)
def test_an_index_names_only_safetensors_files_of_its_folder(name, folder):
    shard(folder)
    shutil.copy(folder / "model-1.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(content))
    shown = name if name == "nowhere.safetensors" else repr(name)
    assert f"{folder / INDEX}: weight_map names {shown}" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight_map": {}},
        {"metadata": {}, "weight_map": []},
        {"metadata": {}, "weight_map": {}},
        {"metadata": 3, "weight_map": {}},
    ],
)
def test_an_index_without_a_map_is_refused(content, folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps(content))
    assert str(folder / INDEX) in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_links_stay_in_the_folder_or_in_a_cache(name, folder, tmp_path):
    load = load_tokenizer if name in ("tokenizer.json", "chat_template.jinja") else None
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "elsewhere" / "blob")
    (folder / name).symlink_to(tmp_path / "elsewhere" / "blob")
    assert f"{folder / name}: a link that leaves the folder" in refusal(folder, load)


def test_a_hub_cache_is_read(folder, tmp_path):
    cache = tmp_path / "models--org--name"
    blobs = cache / "blobs"
    snapshot = cache / "snapshots" / "a1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "named").symlink_to(snapshot)  # the folder itself may be a link
    for path in (snapshot, tmp_path / "named"):
        assert load_policy(ModelConfig(path=str(path))) and load_tokenizer(str(path))


HARM = {
    "a weight is missing": (
        lambda t: {n: v for n, v in t.items() if "norm" not in n},
        "norm.weight is missing",
    ),
    "a weight too many": (
        lambda t: {**t, "score.weight": torch.zeros(1)},
        "holds the weight score.weight",
    ),
    "a bias too many": (
        lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.zeros(16)},
        "q_proj.bias",
    ),
    "another shape": (lambda t: {n: v[:-1].clone() for n, v in t.items()}, "is of shape"),
    "none": (lambda t: {}, "num_hidden_layers"),
    "other names": (lambda t: {f"x.{n}": v for n, v in t.items()}, "is missing"),
}


@pytest.mark.parametrize("kind", HARM)
def test_weights_that_do_not_fit_are_named(kind, folder, capfd):
    harm, words = HARM[kind]
    save_file(harm(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    assert words in refusal(folder)
    assert capfd.readouterr() == ("", "")


def test_only_safetensors_are_read(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is not read, save it again as safetensors" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"GGU", b"no weights", b"GGUF\x03\x00\x00\x00"])
def test_a_damaged_gguf_file_is_named(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    for load in (None, load_tokenizer):
        refusal(tmp_path / "model.gguf", load)


@pytest.mark.parametrize("kind", ["evil", "qwen3"])
def test_code_in_a_folder_is_not_run_and_nothing_is_asked(kind, folder, monkeypatch):
    """For an unknown type and for a known one, even if a user would answer yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    change(
        folder, model_type=kind, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    (folder / "evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    if kind == "qwen3":
        assert load_policy(ModelConfig(path=str(folder))) and load_tokenizer(str(folder))
    else:
        assert (
            "'evil' is unknown to transformers, and code that a folder brings is not run"
            in refusal(folder)
        )
        load_tokenizer(str(folder))  # tokenizer.json alone describes it
    assert not asked and not (folder / "executed").exists()


def test_a_result_that_is_not_there_yet_is_not_looked_for_on_the_hub():
    assert str(folders.no_folder("runs/sft/model")).endswith(
        "(the run runs/sft writes it at its end)"
    )
    assert "hf download" in str(folders.no_folder("models/Qwen3-4B"))
