"""The pretended GPU refuses and counts what a GPU would; engine and learner compute there what they
compute on a CPU."""

import copy

import pytest
import torch
from torch import Tensor

from helpers.engine import make_engine, play, prompts, replies, tiny
from helpers.flash_double import replace_flash_attn
from helpers.learning import groups_of, make_learner
from helpers.pretended_gpu import DEVICE, PretendedGpu, pretended_gpu
from mtsql.learner.logprobs import PolicyModule, score


@pytest.fixture
def gpu():
    with pretended_gpu() as made:
        yield made


def test_values_are_those_of_the_cpu(gpu):
    x = torch.arange(6.0).view(2, 3)
    there = x.to(DEVICE)
    assert there.device == DEVICE == (there @ there.t()).device
    assert (there @ there.t()).tolist() == (x @ x.t()).tolist()
    assert there[1].cpu().tolist() == [3, 4, 5]
    there[0, 1:] += 10
    assert there.tolist() == [[0, 11, 12], [3, 4, 5]]
    assert torch.zeros(2, device=DEVICE).add_(1).tolist() == [1, 1]


def test_tensors_of_two_devices_are_refused(gpu):
    there = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"add.*\(3,\).* are on the CPU"):
        there + torch.ones(3)
    assert (there + 1 + torch.tensor(2.0)).tolist() == [4, 4, 4]  # numbers may come from the CPU


def test_every_way_to_wait_is_counted(gpu):
    x = torch.ones(3, device=DEVICE)
    ways = [
        lambda: x.tolist(),
        lambda: x[0].item(),
        lambda: bool(x.sum() > 1),
        lambda: x.cpu(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.ones(3).to(DEVICE),
        lambda: torch.tensor([1, 2], device=DEVICE),
    ]
    for number, way in enumerate(ways):
        gpu.reset()
        way()
        assert gpu.waits.total() == 1, number


def test_an_upload_that_does_not_block_is_no_wait(gpu):
    torch.ones(3).to(DEVICE, non_blocking=True)
    torch.zeros(3, device=DEVICE).copy_(torch.ones(3), non_blocking=True)
    assert gpu.uploads.total() == 2 and not gpu.waits


def test_kernels_are_counted_and_views_are_not(gpu):
    x = torch.ones(2, 3, device=DEVICE)
    gpu.reset()
    y = x.t()[1:].unsqueeze(0).transpose(0, 1)
    assert not gpu.kernels
    y.add_(1).sum()
    assert gpu.kernels == {"add_": 1, "sum": 1}


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x * float(x[0]),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x.cpu(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.ones(3),
    ],
)
def test_a_capture_refuses_waits_uploads_and_foreign_tensors(gpu, forbidden):
    x = torch.ones(3, device=DEVICE)

    def run() -> Tensor:
        return forbidden(x) if gpu.is_capturing else x

    with pytest.raises(RuntimeError, match="captured|on the CPU"):
        gpu.capture(run)
    assert not gpu.is_capturing


def test_a_replay_reads_the_tensors_as_they_are_now(gpu):
    x = torch.ones(3, device=DEVICE)
    replay, result = gpu.capture(lambda: (x + 1) * 2)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]), non_blocking=True)
    replay()
    assert result.tolist() == [4, 6, 8]


def test_tied_weights_stay_tied(gpu):
    one = torch.nn.Linear(2, 2, bias=False)
    pair = torch.nn.Sequential(one, torch.nn.Linear(2, 2, bias=False))
    pair[1].weight = one.weight
    gpu.move(pair)
    assert pair[0].weight is pair[1].weight and pair[0].weight.device == DEVICE


def test_its_tensors_are_of_no_use_outside():
    with pretended_gpu():
        x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="outside of PretendedGpu"):
        x + 1
    assert PretendedGpu.in_use is None


SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}]


def played(model: torch.nn.Module, path: str, **sampling: float) -> list[list[list[int]]]:
    """The replies of four rows."""
    engine = make_engine(model, max_reply_tokens=6, **sampling)
    if path == "eager":
        engine.graphs = None
    found = replies(play(engine, prompts(3, 9), [prompts(5), []], num_samples=2))
    assert bool(engine.graphs and engine.graphs.captured) == (path == "graphs")
    return found


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("path", ["graphs", "eager", "without flash-attn"])
def test_the_engine_draws_the_tokens_of_the_cpu(path, sampling, monkeypatch):
    model = tiny("qwen3", torch.float64)
    expected = played(model, "CPU", **sampling)
    if path != "without flash-attn":
        replace_flash_attn(monkeypatch)
    with pretended_gpu() as gpu:
        assert played(gpu.move(copy.deepcopy(model)), path, **sampling) == expected


def test_the_learner_scores_as_on_the_cpu():
    policy = make_learner().policy.double()
    samples = sum(groups_of(3), [])
    expected = score(PolicyModule(policy), samples, 60, torch.device("cpu"))
    with pretended_gpu() as gpu:
        there = score(PolicyModule(gpu.move(policy)), samples, 60, DEVICE)
    for found, wanted in zip(there, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-9)
