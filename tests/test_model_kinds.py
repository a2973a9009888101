"""Ordinary folders of other tools load, and models that are not supported end in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, Qwen2Config, StableLmConfig

from helpers.adapter_folders import SAMPLE, by_peft, peft_logprobs
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.model.policy import ModelConfig, load_policy, load_tokenizer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def save(config, folder: Path, **options) -> Path:
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder, **options)
    return folder


def change_config(folder: Path, *without: str, **keys) -> None:
    file = folder / "config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k not in without}
    file.write_text(json.dumps(kept | keys))


def change_weights(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def as_qwen25_was_saved(folder: Path) -> None:
    change_config(
        folder,
        *("layer_types", "rope_parameters", "dtype"),
        torch_dtype="float32",
        sliding_window=131072,
        use_sliding_window=False,
        max_window_layers=28,
        rope_theta=1e6,
    )


def with_a_head_although_tied(folder: Path) -> None:
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    change_weights(folder, **{"lm_head.weight": head})


def with_other_files(folder: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "model.fp16.safetensors", "README.md"):
        (folder / name).write_bytes(b"x")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    (folder / "generation_config.json").unlink()


def with_a_buffer_of_older_versions(folder: Path) -> None:
    change_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})


def with_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})


TIED = Qwen2Config(**SIZES, tie_word_embeddings=True)
ORDINARY = {
    "biases": (Qwen2Config(**SIZES), {}, None),
    "more biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), {}, None),
    "shards": (Qwen2Config(**SIZES), {"max_shard_size": "5KB"}, None),
    "an older config.json": (Qwen2Config(**SIZES), {}, as_qwen25_was_saved),
    "a head although tied": (TIED, {}, with_a_head_although_tied),
    "a buffer of older versions": (LlamaConfig(**SIZES), {}, with_a_buffer_of_older_versions),
    "other files beside": (Qwen2Config(**SIZES), {}, with_other_files),
    "code for a known model": (Qwen2Config(**SIZES), {}, with_code),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_folders_give_the_log_probs_of_transformers(kind, tmp_path):
    config, options, change = ORDINARY[kind]
    folder = save(config, tmp_path / "model", **options)
    if change:
        change(folder)
    ours = load_policy(ModelConfig(path=str(folder)))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    scored = score(PolicyModule(ours), [SAMPLE], 100, torch.device("cpu"))[0]
    assert scored == pytest.approx(peft_logprobs(theirs), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (StableLmConfig(**SIZES), "model type 'stablelm' is not supported: take one of llama"),
        (
            GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
            "model type 'gptj' is not supported",
        ),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (Qwen2Config(**SIZES, attention_dropout=0.5), "attention_dropout is 0.5: it must be 0"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(config, words, tmp_path):
    folder = save(config, tmp_path / "model")
    with pytest.raises(ValueError, match=f"^model.path {folder}/config.json: {words}") as error:
        load_policy(ModelConfig(path=str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named_as_such(name, tmp_path):
    folder = save(Qwen2Config(**SIZES), tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / name).write_text(pointer)

    def load(path: str) -> None:
        if name == "tokenizer.json":
            load_tokenizer(path)
        else:
            load_policy(ModelConfig(path=path))

    with pytest.raises(ValueError, match=f"^model.path {folder / name}: only a pointer .*git lfs"):
        load(str(folder))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_a_training_that_diverged_are_named(value, dtype, tmp_path):
    folder = save(Qwen2Config(**SIZES), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name].to(dtype)
    weight[2, 3] = value
    change_weights(folder, **{name: weight})
    with pytest.raises(ValueError, match=f"^model.path {folder}: the weight {name} holds NaN"):
        load_policy(ModelConfig(path=str(folder)))


def test_an_adapter_of_a_training_that_diverged_is_named(tmp_path):
    folder = save(Qwen2Config(**SIZES), tmp_path / "model")
    by_peft(folder).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"^model.path {file}: the weight {name} holds NaN"):
        load_policy(ModelConfig(path=str(tmp_path / "adapter")))
