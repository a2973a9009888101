"""Adapters that mtsql does not compute, and damaged ones: refused in a line that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from helpers.adapter_folders import by_peft, change, refusal
from helpers.models import save_embedded
from mtsql.model.policy import ModelConfig, load_policy, policy_shape

OTHER_TYPES = [
    "IA3",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "ADALORA",
    "VERA",
    "OFT",
    "BOFT",
    "LOHA",
    "LOKR",
    "LN_TUNING",
    "XLORA",
    "TRAINABLE_TOKENS",
    "SOMETHING_NEW",
    None,
    3,
]
REFUSED = [
    *({"peft_type": kind} for kind in OTHER_TYPES),
    *({"task_type": kind} for kind in ("SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM")),
    *(
        {"init_lora_weights": kind}
        for kind in (
            "pissa",
            "pissa_niter_4",
            "olora",
            "corda",
            "loftq",
            "lora_ga",
            "mica",
            "no such",
            3,
            [],
        )
    ),
    *({"bias": kind} for kind in ("all", "lora_only", 3)),
    *({"r": rank} for rank in (0, -1, 1.5, "4", None, True)),
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [5, 6]},
    {"use_qalora": True},
    {"lora_bias": True},
    {"alora_invocation_tokens": [1]},
    {"target_parameters": ["experts"]},
    {"layer_replication": [[0, 2]]},
    {"megatron_config": {"a": 1}},
    {"arrow_config": {"a": 1}},
    {"use_bdlora": {"a": 1}},
    {"kasa_config": {"a": 1}},
    {"velora_config": {"a": 1}},
    {"monteclora_config": {"a": 1}},
    {"ensure_weight_tying": True},
    {"an_option_of_tomorrow": 0.5},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_embedded(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def plain(base) -> Path:
    by_peft(base).save_pretrained(base.parent / "plain")
    return base.parent / "plain"


@pytest.fixture
def adapter(plain, tmp_path) -> Path:
    """A plain adapter of `base`, to be changed."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


@pytest.mark.parametrize("keys", REFUSED, ids=str)
def test_other_kinds_are_refused_by_name(keys, adapter):
    change(adapter, **keys)
    text = refusal(adapter)
    assert f"{adapter}/adapter_config.json: {next(iter(keys))} is " in text


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["no_such"]},
        {"target_modules": "("},
        {"target_modules": 3},
        {"target_modules": []},
        {"r": 10**12},
        {"lora_alpha": "x"},
        {"rank_pattern": [1]},
        {"layers_to_transform": "x"},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    ids=str,
)
def test_impossible_values_are_named(keys, adapter):
    change(adapter, **keys)
    assert str(adapter) in refusal(adapter)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "{", '{"a": NaN}', "[" * 10**5, "\ufeff{}"]
)
def test_a_damaged_configuration_is_named(text, adapter):
    (adapter / "adapter_config.json").write_text(text)
    assert f"{adapter}/adapter_config.json" in refusal(adapter)


def rename(tensors: dict) -> dict:
    return {f"{name}x": tensor for name, tensor in tensors.items()}


DAMAGE = {
    "one is missing": (lambda t: dict(list(t.items())[1:]), "is missing"),
    "all are missing": (lambda t: {}, "is missing"),
    "other names": (rename, "is missing"),
    "another shape": (lambda t: {n: v[:, :-1].clone() for n, v in t.items()}, "is of shape"),
    "a foreign one": (lambda t: {**t, "value_head": torch.zeros(1)}, "no part of the adapter"),
    "a trained head": (
        lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(300, 16)},
        "is of shape|differs from the base",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_file_of_weights_must_fit(kind, adapter):
    harm, words = DAMAGE[kind]
    file = adapter / "adapter_model.safetensors"
    save_file(harm(load_file(file)), file)
    text = refusal(adapter)
    assert str(file) in text and any(word in text for word in words.split("|")), text


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x00" * 100])
def test_a_damaged_or_missing_file_of_weights_is_named(content, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(content)
    assert str(file) in refusal(adapter)
    file.rename(adapter / "adapter_model.bin")
    assert "no adapter_model.safetensors" in refusal(adapter)


@pytest.mark.parametrize("moved", ["/no/such/base", "no/such", "", None, 3, "org/name-on-the-hub"])
def test_a_base_that_has_moved_is_named(moved, adapter):
    change(adapter, base_model_name_or_path=moved)
    text = refusal(adapter)
    assert f"base_model_name_or_path in {adapter}/adapter_config.json" in text
    assert "base model" in text and (not moved or str(moved) in text)
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        policy_shape(ModelConfig(path=str(adapter)))


def test_a_base_that_is_an_adapter_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "second")
    for named in (tmp_path / "second", adapter):  # another one, and itself
        change(tmp_path / "second", base_model_name_or_path=str(named))
        assert f"is {named}, itself an adapter" in refusal(tmp_path / "second")


def test_a_quantised_base_is_refused(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "quantised")
    file = tmp_path / "quantised" / "config.json"
    kind = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **kind}))
    change(adapter, base_model_name_or_path=str(tmp_path / "quantised"))
    assert f"{file}: quantization_config is set" in refusal(adapter)


def test_several_adapters_in_one_folder_are_refused(base, tmp_path):
    model = by_peft(base)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    assert f"several adapters, name one: {tmp_path}/both/second" in refusal(tmp_path / "both")
    assert load_policy(ModelConfig(path=str(tmp_path / "both" / "second")))
