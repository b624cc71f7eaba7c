"""A LoRA is merged as the libraries that wrote it would, from whatever names they gave its factors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from model_files import adapter, peft_model, write_diffusers, write_kohya, write_old_diffusers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from bench.errors import BenchError, UsageError
from bench.models import adapters, load_unet
from bench.models.sources import resolve

RANK = 2


@pytest.fixture(scope="module")
def base(tiny_pipeline_folder):
    return tiny_pipeline_folder


@pytest.fixture
def unet(base):
    return load_unet(base / "unet")


@pytest.fixture
def factors(unet):
    return adapter(unet, RANK)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    theirs = other.state_dict()
    return max(float((weight - theirs[name]).abs().max()) for name, weight in one.state_dict().items())


def forms(unet, factors, folder: Path, alpha: float = RANK) -> dict[str, str]:
    """The same adapter by everybody who writes one: what each is called on a command line."""
    folder.mkdir(exist_ok=True)
    peft_model(unet, factors, lora_alpha=alpha).save_pretrained(folder / "peft")
    return {
        "peft": f"lora:{folder}/peft",
        "peft's file": f"lora:{folder}/peft/adapter_model.safetensors",
        "diffusers": f"lora:{write_diffusers(factors, folder / 'diffusers', alpha)}",
        "kohya": f"lora:{write_kohya(factors, folder / 'kohya.safetensors', alpha)}",
    }


def test_every_form_merges_to_the_bits_of_peft_and_has_one_identity(base, unet, factors, tmp_path):
    merged = peft_model(unet, factors).merge_and_unload()
    specs = forms(unet, factors, tmp_path) | {
        "before peft": f"lora:{write_old_diffusers(factors, tmp_path / 'old')}",
        "no alpha": f"lora:{write_kohya(factors, tmp_path / 'plain.safetensors', None)}",
    }
    torch.save(load_file(tmp_path / "kohya.safetensors"), tmp_path / "kohya.pt")
    specs["pickled"] = f"lora:{tmp_path}/kohya.pt"
    sources = {name: resolve(spec) for name, spec in specs.items()}
    for name, source in sources.items():
        assert same(source.load(base), merged) and source.kind == "lora" and source.weight == 1, name
    assert len({source.identity(base) for source in sources.values()}) == 1
    assert not same(unet, merged)
    assert sorted(sources["peft"].files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sources["kohya"].title == "kohya" and sources["kohya"].source == f"{tmp_path}/kohya.safetensors"


def test_what_is_trained_here_is_one_too(base, unet, factors, tmp_path):
    """The adapter that a run keeps, merged, is the UNet that the run keeps, to the last bit."""
    adapters.attach(unet, RANK, 0)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            module, _, side = name.partition(".lora_")
            if side:
                weight.copy_(factors[module][side.startswith("B")])
    adapters.save(unet, tmp_path / "lora")
    adapters.merge(unet)
    assert same(resolve(f"lora:{tmp_path}/lora").load(base), unet)


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_alpha_over_rank_scales_in_every_form(base, unet, factors, tmp_path, alpha):
    merged = peft_model(unet, factors, lora_alpha=alpha).merge_and_unload()
    for name, spec in forms(unet, factors, tmp_path, alpha).items():
        assert same(resolve(spec).load(base), merged), name


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_weight_is_diffusers_own(form, tiny_pipeline_folder, base, unet, factors, tmp_path):
    """diffusers' pipeline loads the file and fuses it; both work in fp32, in another order: equal to 1e-6."""
    spec = forms(unet, factors, tmp_path, 1.0)[form]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    path = Path(spec.removeprefix("lora:"))
    pipe.load_lora_weights(
        *([path.parent] if path.is_file() else [path]), **({"weight_name": path.name} if path.is_file() else {})
    )
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    source = resolve(f"{spec}@0.8")
    assert source.weight == 0.8 and distance(source.load(base), pipe.unet) < 1e-6
    assert distance(source.load(base), unet) > 1e-2 and distance(resolve(spec).load(base), pipe.unet) > 1e-2
    assert same(resolve(f"{spec}@0").load(base), unet) and resolve(f"{spec}@-.5").weight == -0.5
    assert resolve(f"{spec}@0.8").identity(base) != resolve(spec).identity(base)


def test_ranks_and_alphas_by_module_are_pefts(base, unet, tmp_path):
    ranks, alphas = {"attn1.to_q": 3, "attn2.to_k": 1}, {"attn2.to_k": 7, r"down_blocks\.0.*\.to_v": 5}
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    for number, changes in enumerate(({}, {"use_rslora": True})):
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas, **changes
        )
        config.init_lora_weights = False  # random factors on both sides
        model = get_peft_model(copy.deepcopy(unet), config)
        model.save_pretrained(tmp_path / str(number))
        assert same(resolve(f"lora:{tmp_path}/{number}").load(base), model.merge_and_unload())


def test_convolutions_are_merged_to_rounding(base, unet, tmp_path):
    """peft multiplies a convolution's factors by a convolution, here it is a product of matrices: equal to 1e-6."""
    config = LoraConfig(r=2, target_modules=["conv1", "conv_shortcut", "proj_in", "conv_in"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(unet), config)
    model.save_pretrained(tmp_path / "peft")
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    kohya = {}
    for name, weight in written.items():
        module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        flat = f"lora_unet_{module.replace('.', '_')}"
        kohya |= {
            f"{flat}.lora_{'down' if side[0] == 'A' else 'up'}.weight": weight,
            f"{flat}.alpha": torch.tensor(8.0),
        }
    save_file(kohya, tmp_path / "locon.safetensors")
    merged = model.merge_and_unload()
    assert distance(unet, merged) > 1e-2
    for spec in (f"lora:{tmp_path}/peft", f"lora:{tmp_path}/locon.safetensors"):
        assert distance(resolve(spec).load(base), merged) < 1e-6


def test_half_precision_factors_are_multiplied_in_fp32(base, unet, factors, tmp_path):
    half = {name: (down.half(), up.half()) for name, (down, up) in factors.items()}
    merged = peft_model(
        unet, {name: (down.float(), up.float()) for name, (down, up) in half.items()}
    ).merge_and_unload()
    assert same(resolve(f"lora:{write_kohya(half, tmp_path / 'half.safetensors', RANK)}").load(base), merged)


def test_injected_layers_saved_by_diffusers_network_are_read(base, unet, factors, tmp_path):
    """`unet.save_lora_adapter`, without the pipeline's prefix."""
    config = LoraConfig(r=RANK, lora_alpha=3, target_modules=sorted(factors), init_lora_weights=False)
    injected = copy.deepcopy(unet)
    injected.add_adapter(config)
    injected.save_lora_adapter(tmp_path)
    injected.fuse_lora()
    injected.unload_lora()
    assert same(resolve(f"lora:{tmp_path}").load(base), injected)


# --- what is refused ---


def kohya(unet, folder: Path, **more: torch.Tensor) -> str:
    path = write_kohya(adapter(unet, RANK), folder / "lora.safetensors", 1)
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in more.items()}, path)
    return f"lora:{path}"


def test_a_text_encoders_part_is_not_left_out_in_silence(base, unet, factors, tmp_path):
    plain = resolve(f"lora:{write_kohya(factors, tmp_path / 'plain.safetensors', 1)}").load(base)
    spec = kohya(unet, tmp_path, lora_te_text_model_encoder_layers_0_mlp_fc1__lora_down__weight=torch.zeros(2, 16))
    count = 3 * len(factors) + 1  # down, up and alpha of each
    with pytest.raises(BenchError, match=f"1 of its {count} tensors are for a text encoder.*#unet"):
        resolve(spec).load(base)
    source = resolve(f"{spec}#unet@1.0")
    assert source.unet_alone and source.weight == 1 and same(source.load(base), plain)


FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FAULTS = {
    "another layer": ({"lora_unet_down_blocks_7_x__lora_down__weight": (2, 8)}, "names no layer of the suite's UNet"),
    "a LoHa": ({f"{FLAT}__hada_w1_a": (2, 8)}, "is a LoHa, which is not merged here"),
    "a DoRA": ({f"{FLAT}__dora_scale": (1, 8)}, "is a DoRA"),
    "something else": ({"weight": (1,)}, "weight is no part of a LoRA"),
    "one side": ({"lora_unet_conv_in__lora_down__weight": (2, 4, 3, 3)}, "conv_in has no up factor"),
    "another width": ({f"{FLAT}__lora_down__weight": (2, 9)}, "made for another network.*attn1.to_q.*base has"),
    "another rank": ({f"{FLAT}__lora_down__weight": (3, 8)}, "attn1.to_q do not fit"),
    "a second": ({FLAT.removeprefix("lora_unet_").replace("_", "-") + "__lora_A__weight": (2, 8)}, "names no layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_merged_whole_is_one_line(fault, base, unet, tmp_path):
    more, words = FAULTS[fault]
    spec = kohya(unet, tmp_path, **{name: torch.zeros(shape) for name, shape in more.items()})
    with pytest.raises(BenchError, match=words) as caught:
        resolve(spec).load(base)
    assert "\n" not in str(caught.value) and "lora.safetensors" in str(caught.value)


def test_two_names_of_one_factor_are_refused(base, unet, factors, tmp_path):
    path = write_kohya(factors, tmp_path / "lora.safetensors", 1)
    name = next(iter(factors))
    save_file(load_file(path) | {f"unet.{name}.lora_A.weight": factors[name][0]}, path)
    with pytest.raises(BenchError, match="two tensors for the same side"):
        resolve(f"lora:{path}").load(base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "LOHA is more than a plain LoRA"),
        ({"use_dora": True}, "use_dora is more than a plain LoRA"),
        ({"bias": "all"}, "bias is more than a plain LoRA"),
        ({"r": 8}, "has rank 2, its configuration says 8"),
    ],
)
def test_pefts_configuration_is_believed_or_refused(changes, words, base, unet, factors, tmp_path):
    peft_model(unet, factors).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(BenchError, match=words):
        resolve(f"lora:{tmp_path}").load(base)
    config.write_text("{")
    with pytest.raises(BenchError, match="no LoRA's configuration can be read"):
        resolve(f"lora:{tmp_path}").load(base)
    config.unlink()
    for spec in (f"lora:{tmp_path}", f"lora:{tmp_path}/adapter_model.safetensors"):
        with pytest.raises(BenchError, match="without adapter_config.json"):
            resolve(spec)


def test_a_folder_of_several_or_none_is_not_guessed_at(unet, factors, tmp_path):
    with pytest.raises(UsageError, match="expected a LoRA.*found no .safetensors"):
        resolve(f"lora:{tmp_path}")
    write_kohya(factors, tmp_path / "a.safetensors", 1)
    assert resolve(f"lora:{tmp_path}").files.keys() == {"a.safetensors"}
    write_kohya(factors, tmp_path / "b.safetensors", 1)
    with pytest.raises(UsageError, match="found 2 files: name one, like a.safetensors"):
        resolve(f"lora:{tmp_path}")
    write_diffusers(factors, tmp_path / "pipe", 2)
    with pytest.raises(UsageError, match="it holds a LoRA: write lora:"):
        resolve(str(tmp_path / "pipe"))


def test_a_whole_network_is_no_lora(base, unet, tmp_path):
    save_file(unet.state_dict(), tmp_path / "whole.safetensors")
    with pytest.raises(BenchError, match="is no part of a LoRA"):
        resolve(f"lora:{tmp_path}/whole.safetensors").load(base)
