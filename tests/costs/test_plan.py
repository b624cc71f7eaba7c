"""Plans against what torch counts and allocates when the same work is really done."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import tiny_bench
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import registry, walk
from bench.commands import cli
from bench.costs import cards, cost, memory
from bench.costs.operations import solver_evaluations
from bench.costs.plan import Planner
from bench.experiment import build_method
from bench.models import adapters, load_pipeline
from bench.sampling.sample import sample
from bench.storage.cache import Embeddings
from bench.storage.runs import BASE
from bench.suites import Iteration, load_suite
from bench.training.batches import sample_order
from bench.training.recipe import TrainSettings
from bench.training.train import TrainData, train

NOTHING_SCORED = ["metrics=[]"]


@pytest.fixture(scope="module")
def mini():
    return load_pipeline("mini")


def count(call) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def step(pipe, accelerator, method: str, size: int, micro: int, steps: int = 1, lora: int | None = None):
    """Real optimizer steps of the shared loop on random latents, as a call."""
    random, unet = np.random.default_rng(0), pipe.unet
    beta = None if method == "sft" else 100.0
    chosen = build_method(method, Iteration(steps=1, lr=1e-8, beta=beta))
    side = unet.config.sample_size
    tokens, width = pipe.tokenizer.model_max_length, unet.config.cross_attention_dim

    def latents() -> np.ndarray:
        return random.standard_normal((size, 4, side, side)).astype(np.float32)

    context = random.standard_normal((size, tokens, width)).astype(np.float32)
    data = TrainData(latents(), latents() if beta else None, Embeddings(context, np.arange(size), context[0]))
    settings = TrainSettings(steps=steps, lr=1e-8, batch_size=size, micro_batch=micro, lora_rank=lora)

    def run() -> None:
        policy = copy.deepcopy(unet)
        if lora:
            adapters.attach(policy, lora, 0)
        reference = (policy if lora else copy.deepcopy(unet)) if chosen.needs_reference else None
        train(policy, reference, chosen, data, settings, pipe.scheduler, 0, accelerator)

    return run


@pytest.mark.parametrize(("method", "lora"), [("spin", None), ("sft", None), ("spin", 4), ("diffusion_kto", None)])
def test_a_training_step_of_the_miniature_costs_what_is_planned(mini, accelerator, monkeypatch, method, lora):
    """Diffusion-KTO's loss knows a mean over the batch, for which both models run over it once more."""
    monkeypatch.setitem(registry.BUILT_IN["methods"], "diffusion_kto", "plug_ins:DiffusionKTO")
    adapter = [f"train.lora_rank={lora}"] if lora else []
    suite = load_suite(
        "mini",
        [
            *NOTHING_SCORED,
            "train.batch_size=2",
            "train.micro_batch=1",
            *adapter,
            "methods.diffusion_kto={iterations: [{steps: 1, lr: 1e-8, beta: 100}]}",
        ],
    )
    planner, paired = Planner(suite, 0), method != "sft"
    (planned,) = planner.train(walk.Training(method, 1, Iteration(steps=1, lr=1e-8), 0, 2))
    real = count(step(mini, accelerator, method, 2, 1, lora=lora))
    assert planned.flops == pytest.approx(real, rel=0.05)
    assert planned.count == 2
    after = cost.training_flops(
        planner.operations.forward,
        2,
        paired=paired,
        reference=paired,
        adapter=lora is not None,
        statistic=method == "diffusion_kto",
    )
    assert after == pytest.approx(real, rel=0.05)


def test_sampling_an_image_of_the_miniature_costs_what_is_planned(mini):
    settings = [
        *NOTHING_SCORED,
        "evaluation.steps=3",
        "evaluation.guidance=[1.0, 3.0]",
        "evaluation.seeds=[1]",
        "evaluation.prompt_sets={test: {prompts: 'world:test', limit: 1}}",
    ]
    planner = Planner(load_suite("mini", settings), 0)
    planner.remember(walk.Evaluation(BASE))
    planned = planner.sampling()
    real = sum(
        count(lambda guidance=guidance: sample(mini, ["a"], guidance=guidance, steps=3, seeds=[1]))
        for guidance in (1.0, 3.0)
    )
    assert planned.count == 2
    assert planned.flops == pytest.approx(real, rel=0.05)  # the prompt's embedding is the difference


def test_a_pair_of_stable_diffusion_1_5_costs_what_torch_counts(monkeypatch):
    """Winner and loser forward and backward, and forward through the reference: 6.42 TFLOP."""
    monkeypatch.setattr(memory, "training_bytes", lambda *_, **__: 0)  # takes longer than all of this
    suite = load_suite(
        "mini", [*NOTHING_SCORED, "model.weights=random:sd15", "train.batch_size=1", "train.micro_batch=1"]
    )
    planner = Planner(suite, 0)
    (planned,), unet = planner.train(walk.Training("spin", 1, Iteration(steps=1, lr=1e-8), 0, 1)), planner.models.unet
    rows = (
        torch.empty(2, 4, 64, 64, device="meta"),
        torch.zeros(2, device="meta"),
        torch.empty(2, 77, 768, device="meta"),
    )

    def pair() -> None:
        with torch.no_grad():
            unet(*rows)
        unet(*rows).sample.sum().backward()

    assert planned.flops == pytest.approx(count(pair), rel=0.05)
    assert planned.flops == pytest.approx(6.42e12, rel=0.01)
    assert planned.disk_bytes == 859_520_964 * 4


@pytest.mark.parametrize(
    ("method", "size", "micro", "lora"),
    [("spin", 4, 4, None), ("spin", 4, 2, None), ("sft", 8, 8, None), ("spin", 4, 2, 4)],
)
def test_peak_memory_of_a_training_step_is_what_torch_allocates(mini, accelerator, method, size, micro, lora):
    run = step(mini, accelerator, method, size, micro, steps=2, lora=lora)  # AdamW's moments are there at the second
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    allocated = max(np.cumsum(sizes))
    sides = 1 if method == "sft" else 2
    planned = memory.training_bytes(
        mini.unet,
        (4, 8, 8),
        32,
        micro * sides,
        dtype="fp32",
        reference=sides == 2 and not lora,
        accumulate=size > micro,
        lora_rank=lora,
    )
    assert planned == pytest.approx(allocated, rel=0.05)


def test_less_is_held_in_half_precision_and_with_checkpointing(tiny_pipeline):
    unet, shape, tokens = tiny_pipeline.unet, (4, 8, 8), 8
    options = {"reference": False, "accumulate": False}
    plain = memory.training_bytes(unet, shape, tokens, 64, dtype="fp32", **options)
    assert memory.training_bytes(unet, shape, tokens, 64, dtype="bf16", **options) < plain
    assert memory.training_bytes(unet, shape, tokens, 64, dtype="fp32", checkpointing=True, **options) < plain
    assert memory.unet_bytes(unet, shape, tokens, 8, "bf16") < memory.unet_bytes(unet, shape, tokens, 8, "fp32")


def test_norms_keep_fp32_results_as_under_a_gpus_autocast_and_products_do_not():
    """It is what makes training SD-1.5 with 16 rows take 39.1 GB, where the processor's autocast would say 34.2."""
    half = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    with memory._autocast("bf16"):
        norms = F.group_norm(half, 2), F.layer_norm(half, (8,)), half.softmax(-1)
        product = F.linear(norms[0], torch.randn(3, 8))
    assert {norm.dtype for norm in norms} == {torch.float32} and product.dtype == torch.bfloat16
    with memory._autocast("fp32"):
        assert F.group_norm(half, 2).dtype == torch.bfloat16


def test_a_micro_batch_is_halved_until_it_fits_and_is_one_at_least():
    """Of 10 bytes a sample and 5: 60 samples take 605, 30 take 305, 15 take 155."""
    budgets = {605: 60, 604: 30, 305: 30, 304: 15, 100: 8, 20: 1, 0: 1}
    found = {budget: memory.fitting_micro_batch(lambda size: 10 * size + 5, 60, budget) for budget in budgets}
    assert found == budgets
    assert memory.free_bytes(torch.device("cpu")) > 2**20


@pytest.mark.parametrize(("first", "number"), [(0, 5), (0, 10), (0, 11), (7, 3), (7, 6), (7, 12), (7, 13), (3, 40)])
def test_distinct_pairs_are_those_of_the_training_order(first, number):
    span = walk.Opponent("spin", 1, Iteration(steps=1, lr=1e-8), first, number)
    seen = set(sample_order(0, first, number, 10).tolist())
    assert span.count(0, 10) == len(seen) and span.pairs(0, 10).tolist() == sorted(seen)


def test_pndm_evaluates_once_more_than_it_is_asked_for():
    assert [solver_evaluations(name, 50) for name in ("ddim", "pndm", "ddpm")] == [50, 51, 50]


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla T4", "t4"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("cpu (x86_64, 2 threads)", None),
    ],
)
def test_cards_are_known_by_the_drivers_names(device, card):
    assert cards.recognise(device) == card


def test_the_command_prints_hours_that_follow_from_the_operations(tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
    suite = tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)
    line = [
        "plan",
        "--suite",
        str(suite),
        "--method",
        "spin",
        "--iters",
        "2",
        "--card",
        "a100",
        "--mfu",
        "0.5",
        "--gpus",
        "4",
    ]
    record = json.loads(run([*line, "--format", "json"], capsys))
    assert [stage["name"] for stage in record["stages"]] == [
        "encode",
        "spin 1: opponent",
        "spin 1: training",
        "spin 2: opponent",
        "spin 2: training",
        "evaluation: sampling",
        "evaluation: scoring",
    ]
    stages, total = record["stages"], record["total"]
    assert [stage["count"] for stage in stages] == [12, 8, 8, 7, 8, 48, 48]  # images: (1 + 2) models x 4 x 2 seeds x 2
    assert total["flops"] == sum(stage["flops"] for stage in stages)
    assert total["gpu_hours"] == pytest.approx(total["flops"] / (0.5 * 19.5e12 * 3600))
    assert total["wall_hours"] == pytest.approx(total["gpu_hours"] / 4)
    assert total["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in stages)
    more = ["--set", "methods.spin.iterations.0.checkpoints=[1]"]
    inside = json.loads(run([*line, *more, "--format", "json"], capsys))["stages"]
    assert [stage["count"] for stage in inside] == [12, 8, 8, 7, 8, 80, 80]  # images of 1 + 2 x 2 models
    assert [stage["flops"] for stage in inside][:5] == [stage["flops"] for stage in stages][:5]
    assert inside[2]["disk_bytes"] == 2 * stages[2]["disk_bytes"]
    text = run(line, capsys)
    assert "4 x NVIDIA A100 80 GB at 50% of 312 TFLOP/s (bf16), 19.5 TFLOP/s (fp32)" in text
    assert "does not fit" not in text


def run(line: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(line)
    assert caught.value.code == 0
    return capsys.readouterr().out
