"""One learner update (log-probs, loss, backward, optimizer step) against a padded loop with full logits. Prints JSON.

    python benchmarks/update.py                       # a model of SmolLM2-135M's shape with random weights
    python benchmarks/update.py --layers 4 --groups 1 # a quick look

Both contestants get the same weights, trajectories and loss (GRPO, k3 KL off) and each runs in a process of its own,
after one small update that allocates gradients and optimizer state. The padded loop is what small trainers do: every
sample repeats its prompt, rows are padded to the longest, logits exist at every position. Memory is the peak
resident size during the update above what is resident before it. `matmul_frac` is the speed at which the counted
multiplications are done, as a share of a large matrix product's speed in the same process.
"""

import argparse
import ctypes
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtsql.llm.attention import ATTENTION_NAME, register_attention
from mtsql.llm.logprobs import PolicyModule
from mtsql.llm.losses import LossConfig, denominator, policy_loss
from mtsql.llm.packing import Sample, pack

LOSS = LossConfig(kl_coef=0.0)
CONTESTANTS = ("ours", "padded")


def make_model(layers: int, vocab: int, attention: str):
    """SmolLM2-135M's shape, tied embeddings, fp32, seeded."""
    register_attention()
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.float32)


def make_samples(groups: int, group_size: int, prompt: int, vocab: int) -> list[Sample]:
    """Replies of 30 to 90 tokens with observations between them: about 480 tokens after the prompt, half trained."""
    r, samples = random.Random(0), []
    for _ in range(groups):
        prompt_ids = [r.randrange(vocab) for _ in range(prompt)]
        for _ in range(group_size):
            mask = []
            for reply in range(4):
                mask += [1] * r.randint(30, 90) + [0] * (r.randint(60, 100) if reply < 3 else 0)
            n, advantage = len(mask), r.uniform(-1, 1)
            ids = [r.randrange(vocab) for _ in range(n)]
            samples.append(Sample(prompt_ids, ids, mask, [advantage] * n, [-10.8] * n))
    return samples


def ours(model, samples: list[Sample], max_tokens: int) -> float:
    """Forward and backward of this repository; the loss."""
    module, total = PolicyModule(model), denominator(samples, LOSS)
    loss = 0.0
    for batch in pack(samples, max_tokens):
        part, _ = policy_loss(*module(batch), batch, LOSS)
        (part / total).backward()
        loss += part.item() / total
    return loss


def padded(model, samples: list[Sample], max_tokens: int) -> float:
    """The same loss with right padding, prompts repeated, full logits and entropy; as many rows at a time as fit."""
    total, loss = denominator(samples, LOSS), 0.0
    rows = [s.prompt_ids + s.ids for s in samples]
    num_rows = max(1, max_tokens // max(map(len, rows)))
    for start in range(0, len(rows), num_rows):
        chosen = range(start, min(start + num_rows, len(rows)))
        width = max(len(rows[i]) for i in chosen)
        ids, seen, mask, advantages, old = (torch.zeros(len(chosen), width) for _ in range(5))
        for row, i in enumerate(chosen):
            own = slice(len(samples[i].prompt_ids), len(rows[i]))
            ids[row, : len(rows[i])], seen[row, : len(rows[i])] = torch.tensor(rows[i]).float(), 1
            mask[row, own] = torch.tensor(samples[i].loss_mask).float()
            advantages[row, own], old[row, own] = torch.tensor([samples[i].advantages, samples[i].old_logprobs])
        ids = ids.long()
        logp = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits[:, :-1].log_softmax(-1)
        logprobs = logp.gather(2, ids[:, 1:, None])[..., 0]
        with torch.no_grad():
            -(logp.exp() * logp).sum(-1)  # entropy, logged by both
        ratio, a = (logprobs - old[:, 1:]).exp(), advantages[:, 1:]
        objective = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high))
        objective = torch.where(a < 0, torch.minimum(objective, -a * LOSS.dual_clip), objective)
        part = (objective * mask[:, 1:]).sum() / total
        part.backward()
        loss += part.item()
    return loss


def multiplications(model, samples: list[Sample], max_tokens: int) -> float:
    """Floating-point operations `ours` cannot do without: 6 a weight and token in the layers, 8 a head weight and
    trained position (logits are computed twice), 14 a head dimension and (query, key) pair that may be seen."""
    c, weights = model.config, sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    batches = pack(samples, max_tokens)
    tokens, trained = sum(b.num_computed for b in batches), sum(len(b.targets) for b in batches)
    pairs = 0
    for batch in batches:
        for a, b in {span[:2] for span in batch.spans}:
            pairs += (b - a) * (b - a + 1) // 2
        for a, b, start, end in batch.spans:
            n = end - start
            pairs += n * (b - a) + n * (n + 1) // 2
    attention = 14 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return 6 * weights * tokens + 8 * c.vocab_size * c.hidden_size * trained + attention


def matmul_speed() -> float:
    """Floating-point operations per second of a 2048-cube product, best of five."""
    a, b, best = torch.randn(2048, 2048), torch.randn(2048, 2048), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak since `reset_peak`) of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Give freed memory back and start VmHWM at what is resident now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def contest(args: argparse.Namespace) -> dict:
    """One contestant's update, in this process."""
    torch.set_num_threads(args.threads)
    learn = {"ours": ours, "padded": padded}[args.who]
    model = make_model(args.layers, args.vocab, ATTENTION_NAME if args.who == "ours" else "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    samples = make_samples(args.groups, args.group_size, args.prompt, args.vocab)
    learn(model, [Sample([1, 2], [3, 4], [1, 1], [1.0, 1.0], [-10.8, -10.8])], args.max_tokens)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    speed = matmul_speed()
    reset_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    loss = learn(model, samples, args.max_tokens)
    optimizer.step()
    secs, peak = time.perf_counter() - start, resident("VmHWM") - before
    result = {"secs": secs, "peak_extra_mb": peak / 2**20, "loss": loss, "matmul_gflops": speed / 1e9}
    if args.who == "ours":
        batches = pack(samples, args.max_tokens)
        count = multiplications(model, samples, args.max_tokens)
        computed = sum(b.num_computed for b in batches)
        result |= {
            "gflop_counted": count / 1e9, "matmul_frac": count / secs / speed, "tokens_computed": computed,
            "computed_per_distinct": computed / sum(b.num_distinct for b in batches),
            "tokens_per_sec": computed / secs,
        }  # fmt: skip
    return result


def main() -> None:
    """Run every contestant in a process of its own and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 30, "vocab": 49152, "groups": 1, "group_size": 8, "prompt": 600,
                          "max_tokens": 8192, "threads": 2}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--who", choices=CONTESTANTS, help="run this one only, in this process")
    args = parser.parse_args()
    if args.who:
        print(json.dumps(contest(args)))
        return
    results = {}
    for who in CONTESTANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--who", who]
        results[who] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    results["speed_up"] = results["padded"]["secs"] / results["ours"]["secs"]
    results["memory_share"] = results["ours"]["peak_extra_mb"] / results["padded"]["peak_extra_mb"]
    results["setting"] = vars(args)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
