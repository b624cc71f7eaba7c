"""A model from anywhere: the same weights in many forms are the same network, to the last bit, and one identity."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny_bench
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from model_files import ldm_checkpoint, ldm_unet, ldm_unet_name
from safetensors.torch import load_file, save_file
from tiny import make_unet

from bench import registry
from bench.errors import BenchError, UsageError
from bench.models import load_unet, networks, save_unet
from bench.models.random_weights import SD15
from bench.models.sources import resolve
from bench.storage import runs
from bench.storage.stages import Stage
from bench.suites import load_suite

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tuned():
    torch.manual_seed(7)
    return make_unet()


@pytest.fixture(scope="module")
def base(tiny_pipeline_folder):
    return tiny_pipeline_folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def pipeline(pipe, unet, folder: Path) -> str:
    parts = {**pipe.components, "unet": unet}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


def network(pipe, unet, folder: Path) -> str:
    unet.save_pretrained(folder)
    return str(folder)


def published(pipe, unet, folder: Path) -> str:
    """As SPIN-Diffusion and Diffusion-DPO are: nothing but a folder unet."""
    unet.save_pretrained(folder / "unet")
    return str(folder)


def pickled(pipe, unet, folder: Path) -> str:
    unet.save_pretrained(folder, safe_serialization=False)
    return str(folder)


def sharded(pipe, unet, folder: Path) -> str:
    unet.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


def one_file(pipe, unet, folder: Path) -> str:
    return written(unet.state_dict(), folder, "model.safetensors")


def prefixed(pipe, unet, folder: Path) -> str:
    return written({f"unet.{name}": weight for name, weight in unet.state_dict().items()}, folder, "m.safetensors")


def ldm(pipe, unet, folder: Path) -> str:
    return written(ldm_checkpoint(pipe, unet), folder, "checkpoint.safetensors")


def comfy(pipe, unet, folder: Path) -> str:
    names = {name.removeprefix("model."): weight for name, weight in ldm_unet(unet).items()}
    return written(names, folder, "comfy.safetensors")


def bare(pipe, unet, folder: Path) -> str:
    names = {name.removeprefix("model.diffusion_model."): weight for name, weight in ldm_unet(unet).items()}
    return written(names, folder, "bare.safetensors")


def ckpt(pipe, unet, folder: Path) -> str:
    folder.mkdir()
    torch.save({"state_dict": ldm_checkpoint(pipe, unet)}, folder / "last.ckpt")
    return str(folder / "last.ckpt")


def written(tensors, folder: Path, name: str) -> str:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return str(folder / name)


FORMS = [pipeline, network, published, pickled, sharded, one_file, prefixed, ldm, comfy, bare, ckpt]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_network_is_the_same_to_the_last_bit(form, tiny_pipeline, tuned, base, tmp_path):
    source = resolve(form(tiny_pipeline, tuned, tmp_path / "there"))
    unet = source.load(base)
    assert same(unet, tuned) and unet.dtype == torch.float32 and not unet.training
    assert source.identity(base) == networks.content_key(tuned.state_dict())
    assert source.revision is None and Path(source.source).is_absolute() and source.files
    assert all(len(digest) == 64 for digest in source.files.values())
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 8, 16)
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, tuned(*inputs).sample)


def test_kinds_titles_and_where_from(tiny_pipeline, tuned, tmp_path):
    forms = {form: resolve(form(tiny_pipeline, tuned, tmp_path / form.__name__)) for form in FORMS}
    kinds = [forms[form].kind for form in FORMS]
    assert kinds == ["pipeline"] + ["network"] * 4 + ["file"] * 6
    assert [forms[form].title for form in (pipeline, published, ldm)] == ["pipeline", "published", "checkpoint"]
    assert sorted(forms[published].files) == ["unet/config.json", f"unet/{WEIGHTS}"]
    assert len(forms[sharded].files) > 3 and forms[ldm].source == str(tmp_path / "ldm" / "checkpoint.safetensors")
    assert json.loads(json.dumps(forms[ldm].record()))["files"] == dict(forms[ldm].files)
    assert resolve(f"{tmp_path}/published/unet").title == "published"


def test_the_identity_is_that_of_the_weights_not_of_the_name(tiny_pipeline, tuned, base, tmp_path):
    one, other = (resolve(network(tiny_pipeline, make_unet(), tmp_path / name)) for name in ("a", "b"))
    assert len({one.identity(base), other.identity(base), resolve(str(base)).identity(base)}) == 3


def test_weights_in_half_precision_are_read_as_they_are(tiny_pipeline, tuned, base, tmp_path):
    half = copy.deepcopy(tuned).half()
    half.save_pretrained(tmp_path / "half", variant="fp16")
    unet = resolve(str(tmp_path / "half")).load(base)
    assert unet.dtype == torch.float32 and same(unet.half(), half)
    single = resolve(one_file(tiny_pipeline, half, tmp_path / "single"))
    assert single.identity(base) == resolve(str(tmp_path / "half")).identity(base)
    assert same(single.load(base, torch.bfloat16), copy.deepcopy(half).float().bfloat16())


def test_full_precision_comes_before_safetensors_in_half(tuned, base, tmp_path):
    copy.deepcopy(tuned).half().save_pretrained(tmp_path, variant="fp16")
    tuned.save_pretrained(tmp_path, safe_serialization=False)
    assert same(resolve(str(tmp_path)).load(base), tuned)
    tuned.save_pretrained(tmp_path)
    assert sorted(resolve(str(tmp_path)).files) == ["config.json", WEIGHTS]


def test_names_in_ldms_files_are_those_that_were_published():
    """Some of v1-5-pruned.safetensors, and how many there are."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15["unet"])  # the class's defaults are SD-1.5's for the rest
    names = {ldm_unet_name(name, 2, (False, True, True, True)): tuple(w.shape) for name, w in unet.state_dict().items()}
    assert len(names) == 686
    assert names["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"] == (640, 768)
    assert names["input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert names["output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert names["output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    assert names["output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    assert names["middle_block.2.emb_layers.1.bias"] == (1280,)


# --- what differs in more than the UNet ---


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_another_text_encoder_or_vae_is_refused_unless_the_unet_alone_is_asked_for(
    part, tiny_pipeline, tuned, base, tmp_path
):
    pipe = StableDiffusionPipeline(
        **{**tiny_pipeline.components, part: copy.deepcopy(getattr(tiny_pipeline, part))}, requires_safety_checker=False
    )
    with torch.no_grad():
        next(getattr(pipe, part).parameters()).add_(1)
    for spec in (pipeline(pipe, tuned, tmp_path / "pipe"), ldm(pipe, tuned, tmp_path / "file")):
        with pytest.raises(BenchError, match=f"its {part} differ.*#unet") as caught:
            resolve(spec).load(base)
        assert "\n" not in str(caught.value)
        alone = resolve(f"{spec}#unet")
        assert same(alone.load(base), tuned) and alone.unet_alone


def test_parts_of_the_base_in_half_precision_are_still_the_bases(tiny_pipeline, tuned, base, tmp_path):
    copied = copy.deepcopy(tiny_pipeline.components) | {"unet": tuned}
    pipe = StableDiffusionPipeline(**copied, requires_safety_checker=False)
    pipe.text_encoder.half(), pipe.vae.half()
    pipe.save_pretrained(tmp_path)
    assert same(resolve(str(tmp_path)).load(base), tuned)


def test_another_scheduler_will_do_but_no_other_noise_or_prediction(tiny_pipeline, tuned, base, tmp_path):
    folder = Path(pipeline(tiny_pipeline, tuned, tmp_path / "pipe"))
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"timestep_spacing": "trailing"}))
    assert same(resolve(str(folder)).load(base), tuned)
    path.write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    with pytest.raises(BenchError, match=r"scheduler \(prediction_type v_prediction, expected epsilon\)"):
        resolve(str(folder)).load(base)
    file = tmp_path / "v.safetensors"
    save_file(tuned.state_dict(), file, metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(BenchError, match="its header says prediction_type v, expected epsilon"):
        resolve(str(file)).load(base)
    save_file(tuned.state_dict(), file, metadata={"modelspec.prediction_type": "epsilon"})
    assert same(resolve(str(file)).load(base), tuned)


# --- what is refused ---

OTHERS = {
    "in_channels": (9, r"found 208 tensors \(9 channels in.*expected 208 tensors \(4 channels in|found in_channels 9"),
    "cross_attention_dim": (32, "text of width 32.*text of width 16|found cross_attention_dim 32, expected 16"),
    "layers_per_block": (2, "no network of the suite's architecture"),
}


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("form", [network, one_file, bare])
def test_another_architecture_is_refused_by_what_was_found_and_expected(form, key, tiny_pipeline, base, tmp_path):
    value, words = OTHERS[key]
    source = resolve(form(tiny_pipeline, make_unet(**{key: value}), tmp_path / "there"))
    with pytest.raises(BenchError, match=words) as caught:
        source.load(base)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_changes_the_function_alone_is_refused(tuned, base, tmp_path):
    """The weights of another number of heads have the same shapes."""
    tuned.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attention_head_dim": 2}))
    with pytest.raises(BenchError, match="found attention_head_dim 2, expected 4"):
        resolve(str(tmp_path)).load(base)
    path.write_text(json.dumps(config | {"attention_head_dim": [4, 4]}))  # the same, block by block
    assert same(resolve(str(tmp_path)).load(base), tuned)


@pytest.mark.parametrize("form", [network, pipeline])
def test_a_missing_tensor_is_not_made_up(form, tiny_pipeline, tuned, base, tmp_path):
    """diffusers itself would warn, and sample from random numbers in its place."""
    folder = Path(form(tiny_pipeline, tuned, tmp_path / "there"))
    file = next(path for path in (folder / WEIGHTS, folder / "unet" / WEIGHTS) if path.exists())
    tensors = load_file(file)
    del tensors["conv_out.weight"]
    save_file(tensors, file)
    with pytest.raises(BenchError, match="1 tensors are missing, first conv_out.weight"):
        resolve(str(folder)).load(base)
    save_file({**tensors, "conv_out.weight": torch.zeros(4, 8, 3, 3), "extra": torch.zeros(1)}, file)
    with pytest.raises(BenchError, match="1 are unknown, first extra"):
        resolve(str(folder)).load(base)


def test_files_that_are_broken_or_something_else_are_one_line_each(base, tmp_path, tuned):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"model": tuned}, tmp_path / "code.ckpt")
    torch.save({"epoch": 3}, tmp_path / "counter.pt")
    (tmp_path / "empty.bin").write_bytes(b"")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "notes.txt").write_text("")
    for name, words in {
        "cut.safetensors": "cannot be read as a file of tensors",
        "other.safetensors": "expected a UNet with LDM's or diffusers' names, found names like weight",
        "code.ckpt": "could run code.*save its state dict with safetensors",
        "counter.pt": "expected a dict of tensors, found a int under 'epoch'",
        "empty.bin": "cannot be read as a file of tensors",
        "lora.safetensors": "holds a LoRA, no whole network: write lora:",
        "notes.txt": "a model's file is one of .safetensors",
    }.items():
        with pytest.raises(BenchError, match=words) as caught:
            resolve(str(tmp_path / name)).load(base)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_pickle_runs_nothing(base, tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "unet").mkdir()
    torch.save({"conv_in.weight": Harmful()}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "unet" / "config.json").write_text(
        json.dumps(dict(make_unet().config) | {"_class_name": "UNet2DConditionModel"})
    )
    with pytest.raises(BenchError, match="could run code"):
        resolve(str(tmp_path)).load(base)
    assert not (tmp_path / "ran").exists()


def test_folders_of_something_else_say_what_is_there(tiny_pipeline_folder, tmp_path):
    with pytest.raises(UsageError, match="no pipeline .* and no network .*; it has nothing"):
        resolve(str(tmp_path))
    with pytest.raises(BenchError, match="expected a UNet2DConditionModel, found AutoencoderKL"):
        resolve(str(tiny_pipeline_folder / "vae"))
    shutil.copytree(tiny_pipeline_folder, tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vae")
    with pytest.raises(BenchError, match="found no vae"):
        resolve(str(tmp_path / "pipe"))
    (tmp_path / "pipe" / "unet" / WEIGHTS).unlink()
    with pytest.raises(BenchError, match="no weights in its folder unet"):
        resolve(str(tmp_path / "pipe"))
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(BenchError, match="expected a StableDiffusionPipeline, found FluxPipeline"):
        resolve(str(tmp_path / "pipe"))


@pytest.mark.parametrize("spec", ["nowhere", "./no/where", "/no/where", "a/model.safetensors", "images:", "lora:"])
def test_what_is_not_there_names_the_forms(spec):
    with pytest.raises(UsageError, match="no such file or folder, and no name on the hub"):
        resolve(spec)
    with pytest.raises(UsageError, match="no such folder of images"):
        resolve("images:nowhere")


# --- runs, images, the base itself ---


def test_the_result_of_a_run(base, tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
    tiny_bench.write_suite(tmp_path, base)
    suite = load_suite("tiny.yaml", ["methods.spin.iterations=[{steps: 2, lr: 1e-3, beta: 10, checkpoints: [1]}]"])
    run = runs.create("spin", suite, 3, 2)
    kept = {"iter1": make_unet(), "iter2@1": make_unet(), "iter2": tuned}
    for name, unet in kept.items():
        Stage(run.folder / name, {"name": name}).make(lambda folder, unet=unet: save_unet(unet, folder / "unet"))
    for spec, name in ((f"{run.id}:1", "iter1"), (f"{run.id}:2", "iter2"), (f"{run.id}:2@1", "iter2@1")):
        source = resolve(spec)
        assert same(source.load(base), kept[name]) and source.kind == "run" and source.source == run.id
        assert same(load_unet(run.folder / name / "unet"), source.load(base))
    assert resolve(f"{run.id}:2@1").title == "SPIN-Diffusion 2@1, seed 3"
    with pytest.raises(UsageError, match="has no iteration 3; it has 1, 2"):
        resolve(f"{run.id}:3")
    with pytest.raises(UsageError, match="no result after 7 steps of iteration 2; it has 1, 2"):
        resolve(f"{run.id}:2@7")
    with pytest.raises(UsageError, match="no run 'nothing'"):
        resolve("nothing:1")
    (run.folder / "iter1" / "unet" / WEIGHTS).write_bytes(b"")
    with pytest.raises(BenchError, match="damaged"):
        resolve(f"{run.id}:1")


def test_images_are_no_model(tmp_path, base):
    source = resolve(f"images:{tmp_path}")
    assert source.kind == "images" and source.folder == tmp_path and not source.files
    with pytest.raises(UsageError, match="images hold no model to load"):
        source.load(base)


def test_the_miniature_is_a_model_too():
    from bench.mini import MINI_WEIGHTS

    folder = MINI_WEIGHTS / "pipeline"
    source = resolve("mini")
    assert source.title == "mini" and same(source.load(folder), load_unet(folder / "unet"))
    assert source.identity(folder) == resolve("mini#unet").identity(folder) == resolve(str(folder)).identity(folder)
