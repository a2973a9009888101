"""Plain copies of a policy: what they share, in which types they keep their weights, and that they
round as the policy does."""

import pytest
import torch

from helpers.learning import counted_casts, groups_of
from helpers.models import save_embedded
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.packing import pack
from mtsql.model.copies import generation_weights, make_reference
from mtsql.model.policy import AdapterConfig, EmbeddedConfig, ModelConfig, load_policy

SIZE = EmbeddedConfig(
    num_layers=8, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48
)
SAMPLES = sum(groups_of(), [])
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_embedded(tmp_path_factory.mktemp("copies") / "base", SIZE))


def scores(model: torch.nn.Module) -> list[list[float]]:
    """Log-probs of SAMPLES in bfloat16, in several micro-batches."""
    with torch.autocast("cpu", torch.bfloat16):
        return score(PolicyModule(model), SAMPLES, MAX_TOKENS, torch.device("cpu"))


def num_elements(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_reference_keeps_each_weight_as_autocast_computes_with_it(folder):
    """So the KL of equal weights is 0, and scoring casts no weight but the tied head, which the
    embedding has in float32."""
    policy = load_policy(ModelConfig(path=folder))
    frozen = make_reference(policy, torch.bfloat16)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight
    assert num_elements(frozen) == num_elements(policy)
    kinds = {name.split(".")[-2]: p.dtype for name, p in frozen.named_parameters()}
    in_float32 = {name for name, dtype in kinds.items() if dtype is torch.float32}
    assert in_float32 == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "q_norm",
        "k_norm",
        "norm",
    }
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    assert scores(frozen) == scores(policy)
    with counted_casts(frozen) as casts:
        scores(frozen)
    assert casts and set(casts) == {"model.embed_tokens.weight"}


def test_scoring_casts_a_trained_weight_once_and_its_head_in_each_micro_batch(folder):
    policy = load_policy(ModelConfig(path=folder))
    num_batches = len(pack(SAMPLES, MAX_TOKENS))
    with counted_casts(policy) as casts:
        scores(policy)
    head = "model.embed_tokens.weight"  # tied to it
    assert num_batches > 1 and casts.count(head) == num_batches
    assert len(casts) - num_batches == len(set(casts) - {head}) == 7 * SIZE.num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_ties_what_is_tied(folder, dtype):
    config = ModelConfig(path=folder, lora=AdapterConfig(rank=2), dtype="float32")
    with generation_weights(load_policy(config), dtype) as weights:
        assert weights.lm_head.weight is weights.model.embed_tokens.weight
        assert {p.dtype for p in weights.parameters()} == {dtype}


def test_an_adapted_embedding_does_not_change_the_head_that_was_tied_to_it(folder):
    from peft import LoraConfig, get_peft_model

    policy = load_policy(ModelConfig(path=folder))
    base = policy.lm_head.weight.clone()
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_embedding" in name:
                weight.fill_(0.5)
    with generation_weights(adapted) as weights:
        assert torch.equal(weights.lm_head.weight, base)
        assert not torch.equal(weights.model.embed_tokens.weight, base)
