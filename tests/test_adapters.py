"""Adapters of peft are computed exactly, and `model.lora` may not contradict them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.adapter_folders import (
    SAMPLE,
    by_peft,
    change,
    learner_logprobs,
    peft_logprobs,
    rollout_logprobs,
)
from helpers.models import save_embedded
from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.packing import pack
from mtsql.model.adapters import DEFAULT_TARGETS
from mtsql.model.copies import adapters_off
from mtsql.model.policy import (
    AdapterConfig,
    ModelConfig,
    load_policy,
    load_tokenizer,
    load_trained,
    make_reference,
    save_policy,
)
from mtsql.run.config import parse_config

COMPUTED = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "DoRA and dropout": {"use_dora": True, "lora_dropout": 0.5},
    "rslora": {"use_rslora": True, "r": 8},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 40}},
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.(q_proj|up_proj)"},
    "excluded": {"exclude_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "without a task": {"task_type": None},
}


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


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore")
def test_rollout_learner_and_peft_agree(kind, base, tmp_path):
    theirs = by_peft(base, **COMPUTED[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peft_logprobs(theirs)
    policy = load_policy(ModelConfig(path=str(tmp_path / "theirs")))
    save_policy(policy, load_tokenizer(str(base)), tmp_path / "ours")
    again = load_policy(ModelConfig(path=str(tmp_path / "ours")))
    for model in (policy, again):
        assert learner_logprobs(model) == pytest.approx(expected, abs=1e-5)
        assert rollout_logprobs(model) == pytest.approx(expected, abs=1e-5)
    assert learner_logprobs(make_reference(policy)) == pytest.approx(expected, abs=1e-5)


def test_all_linear_means_every_layer_but_the_head(base, tmp_path):
    theirs = by_peft(base, target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    change(tmp_path, target_modules="all-linear")  # peft itself saves the names
    policy = load_policy(ModelConfig(path=str(tmp_path)))
    assert learner_logprobs(policy) == pytest.approx(peft_logprobs(theirs), abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "DoRA", "embedding"])
@pytest.mark.filterwarnings("ignore")
def test_training_continues_from_a_checkpoint_of_adapters(kind, base, tmp_path):
    by_peft(base, **COMPUTED[kind]).save_pretrained(tmp_path / "theirs")
    policy = load_policy(ModelConfig(path=str(tmp_path / "theirs")))
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    with torch.no_grad():
        for weight in trained:
            weight += 0.05
    save_policy(policy, load_tokenizer(str(base)), tmp_path / "checkpoint")
    resumed = load_policy(ModelConfig(path=str(tmp_path / "theirs")))
    load_trained(resumed, tmp_path / "checkpoint")
    assert learner_logprobs(resumed) == learner_logprobs(policy)
    with adapters_off(policy):
        assert learner_logprobs(policy) == pytest.approx(
            peft_logprobs(AutoModelForCausalLM.from_pretrained(base)), abs=1e-5
        )


def test_a_sharded_dora_generates_what_it_learns(base, tmp_path):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    by_peft(base, use_dora=True).save_pretrained(tmp_path / "dora")
    policy = load_policy(ModelConfig(path=str(tmp_path / "dora")))
    expected = learner_logprobs(policy)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    try:
        for layer in policy.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        module = fully_shard(PolicyModule(policy), mesh=mesh)
        assert rollout_logprobs(policy) == pytest.approx(expected, abs=1e-5)
        logprobs, _ = module(pack([SAMPLE], 100)[0])
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)
        logprobs.sum().backward()
    finally:
        destroy_process_group()


def test_dropout_is_off_and_a_line_says_so(base, tmp_path, capsys):
    by_peft(base, lora_dropout=0.1).save_pretrained(tmp_path / "theirs")
    policy = load_policy(ModelConfig(path=str(tmp_path / "theirs")))
    (line,) = capsys.readouterr().err.splitlines()
    assert "adapter_config.json: lora_dropout is 0.1: trained without" in line
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in policy.modules())
    save_policy(policy, load_tokenizer(str(base)), tmp_path / "ours")
    load_policy(ModelConfig(path=str(tmp_path / "ours")))
    assert not capsys.readouterr().err  # the saved adapter has no dropout


@pytest.mark.parametrize("is_beside", [False, True])
def test_a_relative_base_is_found_beside_the_adapter(
    is_beside, base, adapter, tmp_path, monkeypatch
):
    place = tmp_path if is_beside else adapter
    shutil.copytree(base, place / "models" / "base")
    change(adapter, base_model_name_or_path="models/base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    policy = load_policy(ModelConfig(path="../adapter"))
    save_policy(policy, load_tokenizer("../adapter"), Path("saved"))  # the base model's tokenizer
    saved = json.loads(Path("saved/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(place / "models" / "base")
    (tmp_path / "further").mkdir()
    monkeypatch.chdir(tmp_path / "further")
    again = load_policy(ModelConfig(path="../elsewhere/saved"))
    assert learner_logprobs(again) == learner_logprobs(policy)


def test_a_fresh_adapter_is_saved_with_a_path_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    policy = load_policy(ModelConfig(path="base", lora=AdapterConfig(rank=2)))
    save_policy(policy, load_tokenizer("base"), tmp_path / "fresh")
    monkeypatch.chdir(tmp_path)
    assert learner_logprobs(load_policy(ModelConfig(path="fresh"))) == learner_logprobs(policy)
    settings = policy.peft_config["default"]
    assert settings.lora_alpha == 32 and settings.target_modules == set(DEFAULT_TARGETS)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, "model.lora.rank is 8, but .* rank 4"),
        ({"alpha": 16}, "model.lora.alpha is 16, but .* alpha 8"),
        ({"alpha": 32}, "model.lora.alpha is 32, but .* alpha 8"),
        (
            {"targets": ("q_proj",)},
            r"model.lora.targets is \['q_proj'\], but .*'down_proj', 'q_proj'",
        ),
    ],
)
def test_flags_that_contradict_an_adapter_are_refused(lora, words, adapter):
    with pytest.raises(ValueError, match=words):
        load_policy(ModelConfig(path=str(adapter), lora=AdapterConfig(**lora)))


def test_flags_that_confirm_an_adapter_are_accepted(adapter, base):
    lora = AdapterConfig(rank=4, alpha=8, targets=("down_proj", "q_proj"))
    assert load_policy(ModelConfig(path=str(adapter), lora=lora))
    for alone in (replace(lora, rank=0, targets=None), replace(lora, rank=0, alpha=None)):
        key = "alpha" if alone.alpha else "targets"
        with pytest.raises(ValueError, match=f"model.lora.{key} is set, but model.lora.rank is 0"):
            load_policy(ModelConfig(path=str(base), lora=alone))


def test_the_embedded_model_has_no_adapters():
    for key, value in {"rank": 4, "alpha": 16, "targets": ("q_proj",)}.items():
        with pytest.raises(ValueError, match=f"model.lora.{key} is set"):
            ModelConfig(lora=AdapterConfig(**{key: value}))


def test_configurations_of_older_runs_still_read(base, tmp_path):
    old = f"lora: {{rank: 0, alpha: 32, targets: [{', '.join(DEFAULT_TARGETS)}]}}"
    (tmp_path / "old.yaml").write_text(f"path: {base}\n{old}\n")
    config = parse_config(ModelConfig, ["--config", str(tmp_path / "old.yaml")], "")
    assert config.lora.targets == DEFAULT_TARGETS and load_policy(config)
    again = parse_config(ModelConfig, ["--path", str(base), "--lora.targets", "null"], "")
    assert again.lora == AdapterConfig() and again.lora.targets is None
