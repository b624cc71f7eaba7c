"""Every option of the training loop shows its effect, and nothing but its effect."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import pandas as pd
import pytest
import tiny_bench
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from tiny import make_unet
from tiny_bench import trained
from train_tiny import SCHEDULER, SETTINGS, make_data

from bench import registry
from bench.errors import UsageError
from bench.experiment import Experiment
from bench.methods.diffusion_dpo import DiffusionDPO
from bench.methods.sft import SFT
from bench.models import adapters, load_unet
from bench.runtime.processes import tf32
from bench.shared import Shared
from bench.storage import runs
from bench.suites import load_suite
from bench.training.checkpoint import Checkpoints
from bench.training.recipe import TrainSettings, make_accelerator, require_packages
from bench.training.train import Loop, moving_average, train
from bench.walk import Evaluation, Opponent, walk

SMALL = replace(SETTINGS, steps=3, batch_size=3, micro_batch=3)


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return make_unet()


@pytest.fixture
def go(base, accelerator):
    """Train a copy of `base` with SFT, or the method given; return it and the history."""

    def run(method=None, **changes):
        policy, method = copy.deepcopy(base), method or SFT()
        reference = copy.deepcopy(base) if method.needs_reference else None
        settings = replace(SMALL, **changes)
        return policy, train(policy, reference, method, make_data(), settings, SCHEDULER, 0, accelerator)

    return run


def weights(unet: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])


def test_ema_makes_the_moving_average_the_result_and_leaves_the_training_alone(base, go, monkeypatch):
    """From the weights w0 before the first step, d = 0.2: a3 = d^3 w0 + d^2 (1 - d) w1 + d (1 - d) w2 + (1 - d) w3."""
    seen = []
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda self, number: (step(self, number), seen.append(weights(self.policy))))
    averaged, history = go(ema=0.2)
    _, plain = go()
    average = sum(
        share * weight.double()
        for share, weight in zip((0.008, 0.032, 0.16, 0.8), (weights(base), *seen[:3]), strict=True)
    )
    torch.testing.assert_close(weights(averaged).double(), average, rtol=1e-6, atol=1e-7)
    assert not torch.equal(weights(averaged), seen[2])
    assert torch.equal(seen[2], seen[5])
    assert [row["loss"] for row in history] == [row["loss"] for row in plain]


def test_a_decay_of_0_999_moves_two_per_cent_of_the_way_in_20_steps():
    """By hand 1 - 0.999^20 = 0.0198; under diffusers' own ramp it has gone all of it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    average = moving_average([weight], 0.999)
    with torch.no_grad():
        weight.fill_(1)
    for _ in range(20):
        average.step([weight])
    assert average.shadow_params[0].item() == pytest.approx(0.0198, abs=5e-5)


def test_gradient_checkpointing_runs_blocks_twice_and_changes_no_bit(go, monkeypatch):
    calls = []
    forward = CrossAttnDownBlock2D.forward
    monkeypatch.setattr(
        CrossAttnDownBlock2D,
        "forward",
        lambda self, *a, **k: calls.append(self.gradient_checkpointing) or forward(self, *a, **k),
    )
    plain, first = go(DiffusionDPO(500.0))
    assert not any(calls)
    recomputed, second = go(DiffusionDPO(500.0), gradient_checkpointing=True)
    assert any(calls)
    assert torch.equal(weights(plain), weights(recomputed))
    assert first[0]["grad_norm"] == second[0]["grad_norm"]
    assert not recomputed.is_gradient_checkpointing  # and it is off again on the result


class Compiled(torch.nn.Module):
    """Stands in for what torch.compile returns: a wrapper with the same weights."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.wrapped, self.calls = unet, 0

    def forward(self, *arguments, **options):
        self.calls += 1
        return self.wrapped(*arguments, **options)


def test_compile_wraps_policy_and_reference_and_leaves_no_wrapper(go, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda unet: made.append(Compiled(unet)) or made[-1])
    policy, history = go(DiffusionDPO(500.0), compile=True, steps=2)
    assert [one.calls for one in made] == [3, 2] and made[0].wrapped is policy is not made[1].wrapped
    assert type(policy) is UNet2DConditionModel
    plain, expected = go(DiffusionDPO(500.0), steps=2)
    assert len(made) == 2
    assert torch.equal(weights(policy), weights(plain)) and history[0]["loss"] == expected[0]["loss"]


class Halved(Compiled):
    """The right output, and half of its gradient."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.sample = (output.sample + output.sample.detach()) / 2
        return output


def test_a_compiler_with_wrong_gradients_is_refused_before_the_first_step(base, go, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda unet: made.append(Halved(unet)) or made[-1])
    for method in (SFT(), DiffusionDPO(500.0)):
        with pytest.raises(UsageError, match="wrongly for a cpu: its gradients are 50% off; set train.compile=false"):
            go(method, compile=True)
    assert torch.equal(weights(made[0].wrapped), weights(base))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_for_real_the_training_is_the_same_up_to_rounding_or_refused(go, monkeypatch, backend):
    """inductor takes minutes, and what torch 2.13's makes for a processor has wrong gradients."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet: real(unet, backend=backend))
    plain, expected = go(DiffusionDPO(500.0), steps=2)
    try:
        policy, history = go(DiffusionDPO(500.0), compile=True, steps=2)
    except UsageError as error:
        assert backend == "inductor" and "train.compile=false" in str(error)
    else:
        assert history[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-4)
        torch.testing.assert_close(weights(policy), weights(plain), rtol=1e-3, atol=1e-4)


def test_the_learning_rate_falls_linearly_to_zero_where_asked(go):
    settings = TrainSettings(steps=6, lr=1.0, batch_size=1, micro_batch=1, warmup_steps=2, lr_schedule="linear")
    assert [settings.learning_rate(step) for step in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    longer = replace(settings, schedule_steps=10)
    assert [longer.learning_rate(step) for step in (1, 2, 6, 9, 10, 11)] == [1, 1, 0.5, 0.125, 0, 0]
    constant, linear = (go(lr_schedule=schedule, schedule_steps=1) for schedule in ("constant", "linear"))
    assert linear[1][-1]["lr"] == 0
    assert not torch.equal(weights(constant[0]), weights(linear[0]))


def test_8_bit_adamw_has_the_settings_of_adamw_and_nearly_its_steps(base, go, monkeypatch):
    from bitsandbytes import optim

    made, real = [], optim.AdamW8bit
    monkeypatch.setattr(optim, "AdamW8bit", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    moved = [
        weights(go(optimizer=name, weight_decay=0.5, adam_beta2=0.9)[0]) - weights(base)
        for name in ("adamw", "adamw8bit")
    ]
    group = made[0].param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (SMALL.lr, (0.9, 0.9), 0.5)
    kept = {state["state1"].dtype for state in made[0].state.values()}
    assert torch.uint8 in kept  # small tensors keep fp32 moments
    assert not torch.equal(*moved) and (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["train.optimizer=adamw8bit"],
            "train.optimizer=adamw8bit needs bitsandbytes, which is not installed: "
            "pip install 'diffusion-align-bench[bitsandbytes]'",
        ),
        (
            ["train.lora_rank=4"],
            "train.lora_rank=4 needs peft, which is not installed: pip install 'diffusion-align-bench[peft]'",
        ),
        (
            ["methods.sft.train.lora_rank=4"],
            "train.lora_rank=4 needs peft, which is not installed: pip install 'diffusion-align-bench[peft]'",
        ),
    ],
)
def test_a_missing_package_is_said_before_anything_is_loaded(monkeypatch, options, said):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "bench.training.recipe.find_spec", lambda name: None if name in ("bitsandbytes", "peft") else find_spec(name)
    )
    monkeypatch.setattr("bench.models.load_pipeline", None)
    with pytest.raises(UsageError) as caught:
        Shared(load_suite("mini", options), ["sft"])
    assert str(caught.value) == said
    require_packages("adamw", None)


def test_fp16_needs_a_gpu_and_says_so(make_accelerator):
    make_accelerator()  # a CPU accelerator, which the next one shares its device with
    with pytest.raises(UsageError, match="train.precision=fp16 does not run on a cpu: use bf16 or fp32"):
        make_accelerator_for_cpu("fp16")
    assert make_accelerator_for_cpu("bf16").mixed_precision == "bf16"


def make_accelerator_for_cpu(precision: str):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    return make_accelerator(precision)


def test_fp32_is_that_of_matrix_products_and_of_convolutions(make_accelerator):
    """torch's own defaults differ: TF32 for the second alone."""
    torch.backends.cudnn.allow_tf32 = True
    make_accelerator()
    assert tf32() == {"matmul": False, "convolution": True}
    make_accelerator_for_cpu("fp32")
    assert tf32() == {"matmul": False, "convolution": False}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_the_first_loss_is_log_2_and_memory_is_measured(base, precision):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = make_accelerator(precision)
        policy = copy.deepcopy(base)
        settings = replace(SMALL, precision=precision, log_every=1)
        history = train(
            policy, copy.deepcopy(base), DiffusionDPO(5000.0), make_data(), settings, SCHEDULER, 0, accelerator
        )
        assert accelerator.device.type == "cuda" and (accelerator.scaler is not None) == (precision == "fp16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert history[0]["loss"] == torch.tensor(2.0).log().item()
    assert history[0]["peak_memory_gib"] > 0


def test_what_changes_numbers_is_in_the_hash_and_nothing_else():
    plain = SMALL.identity()
    for neutral in ({"checkpoint_every": 3}, {"gradient_checkpointing": True}, {"stop_on_collapse": False}):
        assert replace(SMALL, **neutral).identity() == plain
    assert replace(SMALL, ema=0.9).identity() == {**plain, "ema": 0.9, "ema_ramp": False}  # it had one once
    for other in (
        {"precision": "bf16"},
        {"lora_rank": 4},
        {"optimizer": "adamw8bit"},
        {"compile": True},
        {"lr_schedule": "linear"},
        {"schedule_steps": 5},
        {"lr": 0.5},
        {"log_every": 7},
    ):
        assert replace(SMALL, **other).identity() == {**plain, **other}


def test_an_option_left_alone_keeps_results_of_before_it_existed():
    """The settings as they were hashed when there were no options."""
    assert set(SMALL.identity()) == {
        "steps",
        "lr",
        "batch_size",
        "micro_batch",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "warmup_steps",
        "max_grad_norm",
        "prompt_dropout",
        "log_every",
        "first_step",
    }


class TestLora:
    """With the real peft; a UNet of 64 adapter weights' tensors."""

    @pytest.fixture(autouse=True)
    def peft(self):
        pytest.importorskip("peft")

    @pytest.fixture
    def lora(self, base, accelerator):
        def run(method=None, checkpoints=None, **changes):
            policy = copy.deepcopy(base)
            adapters.attach(policy, 4, 0)
            settings = replace(SMALL, lora_rank=4, lr=1e-2, **changes)
            history = train(
                policy,
                policy,
                method or DiffusionDPO(5000.0),
                make_data(),
                settings,
                SCHEDULER,
                0,
                accelerator,
                checkpoints=checkpoints,
            )
            return policy, history

        return run

    def test_the_reference_is_the_base_with_the_adapter_off(self, base, accelerator, go, lora, monkeypatch):
        """log 2 exactly at first; and after steps, the very drift a second copy of the base would show."""
        _, history = lora(log_every=1)
        assert history[0]["loss"] == torch.tensor(2.0).log().item()
        assert history[2]["winner_drift"] != 0
        policy = copy.deepcopy(base)
        adapters.attach(policy, 4, 0)
        settings = replace(SMALL, lora_rank=4, lr=1e-2, log_every=1)
        copied = train(
            policy, copy.deepcopy(base), DiffusionDPO(5000.0), make_data(), settings, SCHEDULER, 0, accelerator
        )
        for name in ("loss", "winner_drift", "grad_norm"):
            assert [row[name] for row in history] == [row[name] for row in copied]

    def test_only_the_adapter_is_trained_and_merging_gives_a_plain_unet(self, base, lora, tmp_path):
        policy, _ = lora()
        inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 3, 16)
        trained = policy(*inputs).sample
        with adapters.switched_off(policy):
            assert torch.equal(policy(*inputs).sample, base(*inputs).sample)
        assert not torch.allclose(trained, base(*inputs).sample)
        adapters.merge(policy)
        torch.testing.assert_close(policy(*inputs).sample, trained, rtol=1e-4, atol=1e-5)
        assert policy.state_dict().keys() == base.state_dict().keys()
        assert vars(policy).keys() == vars(base).keys()
        assert all(weight.requires_grad for weight in policy.parameters())
        assert torch.equal(policy.conv_in.weight, base.conv_in.weight)

    def test_stopped_and_resumed_equals_undisturbed(self, lora, tmp_path, monkeypatch):
        undisturbed, expected = lora(ema=0.5)
        checkpoints, step = Checkpoints(tmp_path, "key", 2), Loop.step

        def dies(self, number):
            if number == 2:
                raise KeyboardInterrupt
            step(self, number)

        monkeypatch.setattr(Loop, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            lora(ema=0.5, checkpoints=checkpoints)
        monkeypatch.setattr(Loop, "step", step)
        assert (tmp_path / "step2" / "lora").is_dir() and not (tmp_path / "step2" / "unet").exists()
        resumed, history = lora(ema=0.5, checkpoints=checkpoints)
        assert torch.equal(weights(resumed), weights(undisturbed))
        assert history[0]["loss"] == expected[0]["loss"]

    def test_self_play_merges_each_iteration_and_starts_a_new_adapter(
        self, tiny_pipeline_folder, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
        tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)
        shared = Shared(load_suite("tiny.yaml", ["train.lora_rank=2"]))
        run = runs.create("spin", shared.suite, 0, 2)
        experiment = Experiment(run, shared)
        loaded = []
        load = load_unet
        monkeypatch.setattr(
            "bench.experiment.models.load_unet", lambda folder, *dtype: loaded.append(dtype) or load(folder, *dtype)
        )
        for stage in walk(run.suite, "spin", 2):
            if isinstance(stage, Evaluation):
                continue
            experiment.do(stage, lambda *scalar: None)
            if isinstance(stage, Opponent):
                continue
            iteration, before = stage.iteration, experiment.ends[stage.iteration - 1]
            assert loaded.count(()) == 1  # the policy; the other one, with a dtype, sampled the opponent
            start, end = (
                load_unet(before.folder),
                UNet2DConditionModel.from_pretrained(run.folder / f"iter{iteration}", subfolder="unet"),
            )
            twin = copy.deepcopy(start)
            adapters.attach(twin, 2, "any")
            adapters.load(twin, run.folder / f"iter{iteration}" / "lora")
            adapters.merge(twin)
            assert torch.equal(weights(twin), weights(end)) and not torch.equal(weights(start), weights(end))
            loaded.clear()
        history = pd.read_parquet(run.folder / "history.parquet")
        assert history["loss"][[0, 2]].tolist() == [torch.tensor(2.0).log().item()] * 2

    def test_a_result_inside_is_merged_too_and_the_adapter_is_trained_on(
        self, tiny_pipeline_folder, tmp_path, monkeypatch
    ):
        """The same as that of a training that ends there, and the same end as without."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
        tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)
        found = {}
        for name, settings in (
            ("inside", "{steps: 2, lr: 1e-2, checkpoints: [1]}"),
            ("long", "{steps: 2, lr: 1e-2}"),
            ("short", "{steps: 1, lr: 1e-2}"),
        ):
            shared = Shared(load_suite("tiny.yaml", ["train.lora_rank=2", f"methods.sft.iterations=[{settings}]"]))
            run = runs.create("sft", shared.suite, 0, 1)
            trained(run, shared)
            found |= {(name, path.name): path for path in run.folder.glob("iter*")}
        for one, other in ((("inside", "iter1@1"), ("short", "iter1")), (("inside", "iter1"), ("long", "iter1"))):
            for part in ("unet", "lora"):
                (kept,), (ended,) = ((found[key] / part).glob("*.safetensors") for key in (one, other))
                assert kept.read_bytes() == ended.read_bytes()
