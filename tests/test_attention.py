"""Packed attention against Hugging Face's own, one sequence at a time; its three paths against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mtsql.learner.logprobs import token_logprobs
from mtsql.learner.packing import Sample, pack
from mtsql.model import attention
from mtsql.model.attention import ATTENTION_NAME, PackedContext, register_attention
from mtsql.model.layers import use_our_layers

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, False),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, True),
    "llama": (LlamaConfig, LlamaForCausalLM, False),
}
SHAPE = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def tiny_model(family: str):
    """As the product computes it."""
    model = stock_model(family)
    use_our_layers(model)
    return model


def stock_model(family: str):
    register_attention()
    config, model, is_tied = FAMILIES[family]
    torch.manual_seed(0)
    settings = config(**SHAPE, tie_word_embeddings=is_tied)
    return model._from_config(settings, attn_implementation=ATTENTION_NAME, dtype=torch.float64)


def in_float64(model):
    """transformers computes its norms in fp32 even here, where sums depend on the batch's shape:
    use torch's norm."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(
                    child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64
                )
                exact.weight = child.weight
                setattr(parent, name, exact)
    return model


def tiny_samples() -> list[Sample]:
    """A group of three, a group of two and a single sample, with prompts and replies of unlike
    lengths."""
    draw = torch.Generator().manual_seed(1)
    samples = []
    for prompt_length, lengths in ((5, (7, 1, 4)), (2, (3, 6)), (4, (5,))):
        prompt = torch.randint(31, (prompt_length,), generator=draw).tolist()
        for n in lengths:
            ids = torch.randint(31, (n,), generator=draw).tolist()
            samples.append(
                Sample(prompt, ids, [1] + torch.randint(2, (n - 1,), generator=draw).tolist())
            )
    return samples


def weigh(logprobs, targets):
    """Any smooth function of the log-probs that treats every token differently."""
    return (logprobs * (1 + targets)).sum() + logprobs.square().sum()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def one_at_a_time(model, samples):
    """Hugging Face's attention, full logits, no sharing: per sample the trained log-probs;
    gradients in the model."""
    logprobs = []
    for s in samples:
        logits = model(input_ids=torch.tensor([s.prompt_ids + s.ids]), use_cache=False).logits[0]
        logp = logits[len(s.prompt_ids) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(s.ids)
        mine = logp[torch.arange(len(s.ids)), targets][torch.tensor(s.loss_mask) == 1]
        weigh(mine, targets[torch.tensor(s.loss_mask) == 1]).backward()
        logprobs.append(mine.detach())
    return logprobs


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [100, 14])
def test_shared_prompts_equal_one_at_a_time(
    family, is_lora, is_checkpointed, max_tokens, monkeypatch
):
    calls, attend = [], PackedContext.attend
    monkeypatch.setattr(
        PackedContext,
        "attend",
        lambda self, layer, *x: calls.append(layer) or attend(self, layer, *x),
    )
    ours = tiny_model(family)
    plain = in_float64(stock_model(family))
    plain.set_attn_implementation("sdpa")
    if is_checkpointed:
        ours.activation_checkpointing_enable()
    ours.train()
    if is_lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        torch.manual_seed(2)
        ours = get_peft_model(ours, lora).double()
        torch.manual_seed(2)
        plain = get_peft_model(plain, lora).double()
    samples = tiny_samples()
    expected = one_at_a_time(plain, samples)
    num_batches = 0
    for batch in pack(samples, max_tokens):
        num_batches += 1
        logprobs, _ = token_logprobs(ours, batch)
        weigh(logprobs, batch.targets).backward()
        for n, index in enumerate(batch.indices):
            torch.testing.assert_close(
                logprobs[batch.trajectory_index == n], expected[index], rtol=0, atol=1e-10
            )
    assert num_batches == (1 if max_tokens == 100 else 4)
    assert len(calls) == num_batches * SHAPE["num_hidden_layers"] * (1 + is_checkpointed)
    ours_grads, plain_grads = gradients(ours), gradients(plain)
    assert ours_grads.keys() == plain_grads.keys() and (
        not is_lora or all("lora" in name for name in ours_grads)
    )
    for name in plain_grads:
        torch.testing.assert_close(ours_grads[name], plain_grads[name], rtol=1e-10, atol=1e-10)


def flash_attn_varlen_double(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """flash-attn's varlen function as published (>= 2.1: causal aligned at the bottom right), in
    plain torch."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0.0
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    out = []
    for i in range(len(cu_seqlens_q) - 1):
        rows, cols = (slice(*cu[i : i + 2].tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
        queries, keys, values = q[rows], k[cols], v[cols]  # (L, heads, D)
        keys, values = (
            x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        if causal:
            n, m = scores.shape[1:]
            scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(out)


def spans_of(groups):
    """Spans of a flat batch laid out as `pack` does: [(prompt length, [sample lengths])]."""
    spans, at = [], 0
    for prompt, samples in groups:
        start, at = at, at + prompt
        for n in samples:
            spans.append((start, start + prompt, at, at + n))
            at += n
    return tuple(spans), at


lengths = st.integers(1, 9)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4)), min_size=1, max_size=4),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([1, 2, 4, 256]),
    st.sampled_from([1, 3, 96]),
    st.sampled_from([1, 2, 5]),
)
def test_the_three_paths_agree(groups, heads, causal_tokens, piece_tokens, num_threads):
    spans, num_tokens = spans_of(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CAUSAL_TOKENS", causal_tokens)
        patch.setattr(attention, "PIECE_TOKENS", piece_tokens)
        patch.setattr(torch, "get_num_threads", lambda: num_threads)
        context = PackedContext(spans, torch.device("cpu"))
        patch.setattr(attention, "flash_attn_varlen_func", flash_attn_varlen_double)
        results = []
        for path in (context.attend_rows, context.attend_varlen, lambda *x: context.attend(0, *x)):
            torch.manual_seed(num_tokens)
            query, key, value = (
                torch.randn(1, h, num_tokens, 8, dtype=torch.float64, requires_grad=True)
                for h in (heads[0], heads[1], heads[1])
            )
            out = path(query, key, value, 0.3)
            out.backward(torch.randn(out.shape, dtype=torch.float64))
            results.append((out, query.grad, key.grad, value.grad))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_joined_parts():
    spans, num_tokens = spans_of([(3, [2, 4]), (2, [3])])
    context = PackedContext(spans, torch.device("cpu"))
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, h, num_tokens, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)
    ]
    assert torch.autograd.gradcheck(lambda *x: context.attend(0, *x, None), inputs)


def test_distant_scores_do_not_break_the_join():
    """A prompt whose scores lie hundreds above or below a sample's own: no overflow, no NaN."""
    spans, num_tokens = spans_of([(2, [2, 2])])
    context = PackedContext(spans, torch.device("cpu"))
    query = torch.ones(1, 1, num_tokens, 4)
    for sign in (1.0, -1.0):
        key = torch.ones(1, 1, num_tokens, 4)
        key[:, :, :2] *= sign * 300
        value = torch.randn(1, 1, num_tokens, 4)
        got = context.attend(0, query, key, value, 1.0)
        torch.testing.assert_close(got, context.attend_rows(query, key, value, 1.0))


def test_what_it_does_not_compute_is_refused():
    model = tiny_model("qwen3")
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="attention_context"):
        model(input_ids=ids, use_cache=False)
    context = PackedContext(((0, 1, 1, 2),), torch.device("cpu"))
    arguments = dict(input_ids=ids, position_ids=ids, use_cache=False, attention_context=context)
    model.model.layers[0].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="sliding_window"):
        model(**arguments)
    model.model.layers[0].self_attn.sliding_window = None
    model.model.layers[0].self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        model(**arguments)
