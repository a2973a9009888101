"""Adapter folders as peft and the tools on top of it write them: computed exactly, or refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mtsql.config import parse_config
from mtsql.llm.adapters import DEFAULT_TARGETS
from mtsql.llm.logprobs import PolicyModule, score
from mtsql.llm.model import (
    EmbeddedSize,
    LoraSettings,
    ModelConfig,
    build_embedded,
    generation_weights,
    load_policy,
    load_tokenizer,
    load_trained,
    make_reference,
    policy_shape,
    reference,
    save_policy,
)
from mtsql.llm.packing import Sample, pack
from mtsql.llm.tokenizer import train_tokenizer

SIZE = EmbeddedSize(
    num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32
)
SAMPLE = Sample(prompt_ids=[30, 31, 32], ids=[40, 41, 42, 43], loss_mask=[1] * 4)
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
    folder = tmp_path_factory.mktemp("adapters") / "base"
    tokenizer = train_tokenizer(["SELECT name FROM singer"], 300)
    save_policy(build_embedded(tokenizer, SIZE, seed=1), tokenizer, folder)
    return folder


def by_peft(base: Path, **keys) -> torch.nn.Module:
    """A model of peft's own, whose adapters do something."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    keys = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 4, **keys}
    model = get_peft_model(model, LoraConfig(**keys))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def plain(base) -> Path:
    by_peft(base).save_pretrained(base.parent / "plain")
    return base.parent / "plain"


@pytest.fixture
def adapter(plain, tmp_path) -> Path:
    """A plain adapter of `base`, to be changed."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def change(folder: Path, **keys) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def learner_logprobs(model: torch.nn.Module) -> list[float]:
    """Under the learner's module, in training mode."""
    with torch.no_grad():
        return PolicyModule(model.train())(pack([SAMPLE], 100)[0])[0].tolist()


def rollout_logprobs(model: torch.nn.Module) -> list[float]:
    with generation_weights(model) as weights:
        return score(PolicyModule(weights), [SAMPLE], 100, torch.device("cpu"))[0]


def peft_logprobs(model: torch.nn.Module) -> list[float]:
    """Of transformers and peft, without any code of ours."""
    ids = torch.tensor([[*SAMPLE.prompt_ids, *SAMPLE.ids]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
    return logp[2:-1].gather(1, ids[0, 3:, None])[:, 0].tolist()


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
    with reference(policy, make_reference(policy)) as frozen:
        assert learner_logprobs(frozen) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "DoRA", "embedding"])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_adapters_is_gone_on_with(kind, base, tmp_path):
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
    with reference(policy, None) as without:
        assert learner_logprobs(without) == pytest.approx(
            peft_logprobs(AutoModelForCausalLM.from_pretrained(base)), abs=1e-5
        )


def test_a_sharded_dora_generates_what_it_learns(base, tmp_path):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    by_peft(base, use_dora=True).save_pretrained(tmp_path / "dora")
    policy = load_policy(ModelConfig(path=str(tmp_path / "dora")))
    expected = learner_logprobs(policy)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for layer in policy.get_base_model().model.layers:
            fully_shard(layer)
        module = fully_shard(PolicyModule(policy))
        assert rollout_logprobs(policy) == pytest.approx(expected, abs=1e-5)
        logprobs, _ = module(pack([SAMPLE], 100)[0])
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)
        logprobs.sum().backward()
    finally:
        destroy_process_group()


def test_dropout_is_off_and_said(base, tmp_path, capsys):
    by_peft(base, lora_dropout=0.1).save_pretrained(tmp_path / "theirs")
    policy = load_policy(ModelConfig(path=str(tmp_path / "theirs")))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "adapter_config.json: lora_dropout is 0.1: trained without" in said[0]
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in policy.modules())
    save_policy(policy, load_tokenizer(str(base)), tmp_path / "ours")
    load_policy(ModelConfig(path=str(tmp_path / "ours")))
    assert not capsys.readouterr().err  # the saved one has none


def refusal(folder: Path, **lora) -> str:
    """The one-line error of loading."""
    with pytest.raises(ValueError) as error:
        load_policy(ModelConfig(path=str(folder), lora=LoraSettings(**lora)))
    assert "\n" not in str(error.value)
    return str(error.value)


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
def test_ill_values_are_named(keys, adapter):
    change(adapter, **keys)
    assert str(adapter) in refusal(adapter)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "{", '{"a": NaN}', "[" * 10**5, "\ufeff{}"]
)
def test_damaged_configurations(text, adapter):
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
def test_a_damaged_or_absent_file_of_weights(content, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(content)
    assert str(file) in refusal(adapter)
    file.rename(adapter / "adapter_model.bin")
    assert "no adapter_model.safetensors" in refusal(adapter)


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
    policy = load_policy(ModelConfig(path="base", lora=LoraSettings(rank=2)))
    save_policy(policy, load_tokenizer("base"), tmp_path / "fresh")
    monkeypatch.chdir(tmp_path)
    assert learner_logprobs(load_policy(ModelConfig(path="fresh"))) == learner_logprobs(policy)
    settings = policy.peft_config["default"]
    assert settings.lora_alpha == 32 and settings.target_modules == set(DEFAULT_TARGETS)


@pytest.mark.parametrize("moved", ["/no/such/base", "no/such", "", None, 3, "org/name-on-the-hub"])
def test_a_base_that_moved(moved, adapter):
    change(adapter, base_model_name_or_path=moved)
    text = refusal(adapter)
    assert f"base_model_name_or_path in {adapter}/adapter_config.json" in text
    assert "base model" in text and (not moved or str(moved) in text)
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        policy_shape(ModelConfig(path=str(adapter)))


def test_a_base_that_is_an_adapter(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "second")
    for named in (tmp_path / "second", adapter):  # another one, and itself
        change(tmp_path / "second", base_model_name_or_path=str(named))
        assert f"is {named}, itself an adapter" in refusal(tmp_path / "second")


def test_a_quantised_base(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "quantised")
    file = tmp_path / "quantised" / "config.json"
    kind = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **kind}))
    change(adapter, base_model_name_or_path=str(tmp_path / "quantised"))
    assert f"{file}: quantization_config is set" in refusal(adapter)


def test_several_adapters_in_one_folder(base, tmp_path):
    model = by_peft(base)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    assert f"several adapters, name one: {tmp_path}/both/second" in refusal(tmp_path / "both")
    assert load_policy(ModelConfig(path=str(tmp_path / "both" / "second")))


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
def test_flags_that_an_adapter_contradicts(lora, words, adapter):
    with pytest.raises(ValueError, match=words):
        load_policy(ModelConfig(path=str(adapter), lora=LoraSettings(**lora)))


def test_flags_that_an_adapter_confirms(adapter, base):
    lora = LoraSettings(rank=4, alpha=8, targets=("down_proj", "q_proj"))
    assert load_policy(ModelConfig(path=str(adapter), lora=lora))
    for alone in (replace(lora, rank=0, targets=None), replace(lora, rank=0, alpha=None)):
        key = "alpha" if alone.alpha else "targets"
        with pytest.raises(ValueError, match=f"model.lora.{key} is set, but model.lora.rank is 0"):
            load_policy(ModelConfig(path=str(base), lora=alone))


def test_the_embedded_model_has_no_adapters():
    for key, value in {"rank": 4, "alpha": 16, "targets": ("q_proj",)}.items():
        with pytest.raises(ValueError, match=f"model.lora.{key} is set"):
            ModelConfig(lora=LoraSettings(**{key: value}))


def test_configurations_of_older_runs_still_read(base, tmp_path):
    old = f"lora: {{rank: 0, alpha: 32, targets: [{', '.join(DEFAULT_TARGETS)}]}}"
    (tmp_path / "old.yaml").write_text(f"path: {base}\n{old}\n")
    config = parse_config(ModelConfig, ["--config", str(tmp_path / "old.yaml")], "")
    assert config.lora.targets == DEFAULT_TARGETS and load_policy(config)
    again = parse_config(ModelConfig, ["--path", str(base), "--lora.targets", "null"], "")
    assert again.lora == LoraSettings() and again.lora.targets is None
