"""Two processes with full copies (DDP) or shards (FSDP2) of a policy compute what one process does,
and each continues from what the other has saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.runs import SCRIPTS, launch
from helpers.sharding import play
from mtsql.agent.protocol import TAGS
from mtsql.model.policy import (
    EmbeddedConfig,
    build_embedded,
    save_policy,
)
from mtsql.model.tokenizer import train_tokenizer
from mtsql.run.launch import make_accelerator
from mtsql.run.seeds import generator_seed

SIZE = EmbeddedConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
FSDP = "--num_processes 2 --main_process_port 0 --use_fsdp --fsdp_version 2".split()


def play_two(flags, plans, folder, precision="no"):
    """The plans on two processes, started as a user starts them; returns the results of both
    ranks."""
    done = launch(
        flags, SCRIPTS / "sharding_rank.py", json.dumps(plans), str(folder), precision, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_same_folder(one: Path, other: Path, abs=1e-5):
    names = sorted(path.name for path in (one / "model").iterdir())
    assert names == sorted(path.name for path in (other / "model").iterdir())
    weights = [f"model/{name}" for name in names if name.endswith(".safetensors")]
    for name in (*weights, "optimizer.safetensors"):
        a = load_file(one / name)
        b = load_file(other / name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype, key
            assert torch.allclose(a[key], b[key], atol=abs, rtol=1e-4), key


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["SELECT name FROM singer"], SIZE.vocab_size, TAGS)
    save_policy(build_embedded(tokenizer, SIZE, seed=1), tokenizer, folder / "base")
    return str(folder / "base")


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """What one process computes: (folder, result) without and with adapters, and of the update
    that follows each."""
    from accelerate import Accelerator

    accelerator, found = Accelerator(cpu=True), {}
    for name, plan in {
        "full": {},
        "lora": {"lora": True},
        "full next": {"load": "full", "updates": [2]},
        "lora next": {"load": "lora", "updates": [2], "lora": True},
    }.items():
        folder = tmp_path_factory.mktemp("alone")
        if "load" in plan:
            plan["load"] = str(found[plan["load"]][0])
        found[name] = folder, play(accelerator, base, str(folder), **plan)
    return found


def test_a_peft_folder_of_ours_is_read_by_peft(base, alone):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, result = alone["lora"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "model"
    )
    with torch.no_grad():
        logits = model(torch.arange(9)[None]).logits[0, :, :8]
    assert torch.allclose(logits, torch.tensor(result["logits"]), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_compute_what_one_does_and_each_continues_from_the_other(
    kind, base, alone, tmp_path
):
    flags = FSDP if kind == "fsdp2" else ["--num_processes", "2"]
    plans = {
        "full": {},
        "recompute": {"recompute": True},
        "lora": {"lora": True},
        "offload": {"offload": True},
        "own next": {"load": str(tmp_path / "full"), "updates": [2]},
        "own next lora": {"load": str(tmp_path / "lora"), "updates": [2], "lora": True},
        "full next": {"load": str(alone["full"][0]), "updates": [2], "offload": True},
        "lora next": {"load": str(alone["lora"][0]), "updates": [2], "lora": True},
    }
    for name in plans:
        (tmp_path / name).mkdir()
    both = play_two(
        flags,
        [{"base": base, "save": str(tmp_path / n), **plan} for n, plan in plans.items()],
        tmp_path,
    )
    same = {
        "recompute": "full",
        "offload": "full",
        "own next": "full next",
        "own next lora": "lora next",
    }
    for index, name in enumerate(plans):
        folder, expected = alone[same.get(name, name)]
        for result in (rank[index] for rank in both):
            assert result["sharded"] == (kind == "fsdp2")
            assert torch.tensor(result["steps"]).numpy() == pytest.approx(
                torch.tensor(expected["steps"]).numpy(), abs=1e-4
            )
            assert torch.allclose(
                torch.tensor(result["logits"]), torch.tensor(expected["logits"]), atol=1e-4
            )
            assert result["gap"] < 1e-4
            runs = 2 if name == "recompute" else 1  # once more in backward
            assert result["gathered"] == 0
            assert "load" in plans[name] or result["moved"][0] == 0
            assert result["attention_calls"] == [runs] * len(result["steps"])
        assert_same_folder(folder, tmp_path / name)
    # one process continues from what two have saved
    from accelerate import Accelerator

    for name, lora in (("full", False), ("lora", True)):
        play(
            Accelerator(cpu=True),
            base,
            str(tmp_path),
            load=str(tmp_path / name),
            updates=[2],
            lora=lora,
        )
        assert_same_folder(alone[f"{name} next"][0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_bfloat16_scores_what_it_samples_and_stays_near_float32(kind, base, alone, tmp_path):
    flags = FSDP if kind == "fsdp2" else ["--num_processes", "2"]
    plans = [
        {"base": base, "save": str(tmp_path), "dtype": "bfloat16", "lora": lora}
        for lora in (False, True)
    ]
    for rank in play_two(flags, plans, tmp_path, "bf16"):
        for name, result in zip(("full", "lora"), rank, strict=True):
            expected = torch.tensor(alone[name][1]["steps"])
            assert result["gathered"] == 0 and result["moved"][0] == 0
            assert torch.allclose(torch.tensor(result["steps"]), expected, rtol=0.1, atol=0.02)
            assert result["gap"] < (
                1e-5 if name == "full" else 0.05
            )  # merged adapters are rounded once more


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "--num_processes 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "optim.offload",
        ),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            "model.gradient_checkpointing",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed"),
    ],
)
def test_settings_that_sharding_cannot_use_are_refused_by_name(env, words, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        make_accelerator("no")


def test_no_two_ranks_or_updates_of_a_run_share_a_seed():
    seeds = [generator_seed(7, update, rank) for update in range(2000) for rank in range(64)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
