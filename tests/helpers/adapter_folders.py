"""Adapter folders as peft writes them, and log-probs by three ways, for the tests of adapters."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.packing import Sample, pack
from mtsql.model.policy import (
    AdapterConfig,
    ModelConfig,
    generation_weights,
    load_policy,
)

SAMPLE = Sample(prompt_ids=[30, 31, 32], ids=[40, 41, 42, 43], loss_mask=[1] * 4)


def by_peft(base: Path, **keys) -> torch.nn.Module:
    """A model of transformers and peft, whose adapters already do something."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    keys = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 4, **keys}
    model = get_peft_model(model, LoraConfig(**keys))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def change(folder: Path, **keys) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def learner_logprobs(model: torch.nn.Module) -> list[float]:
    """Log-probs of SAMPLE under the learner's module, in training mode."""
    with torch.no_grad():
        return PolicyModule(model.train())(pack([SAMPLE], 100)[0])[0].tolist()


def rollout_logprobs(model: torch.nn.Module) -> list[float]:
    """Log-probs of SAMPLE under the weights for generation."""
    with generation_weights(model) as weights:
        return score(PolicyModule(weights), [SAMPLE], 100, torch.device("cpu"))[0]


def peft_logprobs(model: torch.nn.Module) -> list[float]:
    """Log-probs of SAMPLE by transformers and peft, without any code of ours."""
    ids = torch.tensor([[*SAMPLE.prompt_ids, *SAMPLE.ids]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
    return logp[2:-1].gather(1, ids[0, 3:, None])[:, 0].tolist()


def refusal(folder: Path, **lora) -> str:
    """The one-line error of loading."""
    with pytest.raises(ValueError) as error:
        load_policy(ModelConfig(path=str(folder), lora=AdapterConfig(**lora)))
    assert "\n" not in str(error.value)
    return str(error.value)
