"""Karlo's weights: their names and shapes, the containers they come in, and what is refused."""

import gzip
import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from karlo_files import CONFIGS, original_tensors, write_folder, write_originals, write_variations
from published_files import MemoryPeak, rewrite, write_json, write_sparse
from safetensors.torch import load_file
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.errors import InputError
from genpipe.published import karlo, karlo_parts
from genpipe.published.guided_diffusion import Rules, applied
from genpipe.published.registry import find

MANIFEST: dict[str, Any] = json.loads(
    gzip.decompress(Path(__file__).with_name("manifests").joinpath("karlo.json.gz").read_bytes())
)
WHERE = Path("karlo")
FOLDER_PARTS = ("prior", "decoder", "upsampler")


def empty_parts(configs: Mapping[str, Any]) -> dict[str, Any]:
    """The parts without memory for their weights."""
    plain = {name: {key: value for key, value in config.items() if key[0] != "_"} for name, config in configs.items()}
    return {
        "prior": karlo_parts.empty_prior(plain["prior"], 5.0, WHERE),
        "decoder": karlo_parts.empty_decoder(plain["decoder"], plain["text_proj"], WHERE),
        "upsampler": karlo_parts.empty_upsampler(plain["super_res_first"], plain["decoder"]["sample_size"], WHERE),
    }


def rules_of(parts: Mapping[str, Any]) -> dict[str, Rules]:
    statistics: Rules = {"mean": ("0", ()), "std": ("1", ())}
    return {
        "prior": karlo_parts.prior_rules(parts["prior"]),
        "decoder": karlo_parts.decoder_rules(parts["decoder"]),
        "upsampler": karlo_parts.upsampler_rules(parts["upsampler"]),
        "clip_stats": statistics,
    }


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return empty_parts(MANIFEST["configs"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("karlo") / "karlo-v1-alpha")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def meta(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def built(source: Path, **options: Any) -> dict[str, Any]:
    read = karlo.read(source, **options)
    return {part: read.parts[part]() for part in FOLDER_PARTS if part in read.parts}


def equal(first: Any, second: Any) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Names and shapes -----------------------------------------------------------------------------------------------------


def test_every_published_tensor_has_its_place(published: dict[str, Any]) -> None:
    tensors = {name: meta(shapes) for name, shapes in MANIFEST["diffusers"].items()}
    karlo_parts.filled_prior(published["prior"], tensors["prior"], "prior")
    karlo_parts.filled_decoder(published["decoder"], tensors["decoder"], tensors["text_proj"], "decoder")
    karlo_parts.filled_upsampler(
        published["upsampler"], tensors["super_res_first"], tensors["super_res_last"], "upsampler"
    )
    counts = {part: len(model.state_dict()) for part, model in published.items()}
    assert counts == {"prior": 338, "decoder": 716 + 11, "upsampler": 2 * 408}


def test_every_original_tensor_has_its_place(published: dict[str, Any]) -> None:
    rules = rules_of(published)
    for part, file in (("prior", "prior"), ("decoder", "decoder"), ("upsampler", "improved_sr")):
        fitting = applied(rules[part], meta(MANIFEST["original"][file]))
        if part == "prior":
            fitting |= applied(rules["clip_stats"], {"0": torch.empty(768), "1": torch.empty(768)})
        karlo_parts.filled(published[part], fitting, file)
        names = {theirs for theirs, _ in rules[part].values()}
        assert names == MANIFEST["original"][file].keys()  # nothing that the file has is left out


def test_the_rules_are_the_key_map(published: dict[str, Any]) -> None:
    rules = rules_of(published)
    ours = {"prior": "transformer.", "decoder": "unet.", "super_res_first": "unet.", "super_res_last": "last_unet."}
    part_of = {"prior": "prior", "decoder": "decoder", "super_res_first": "upsampler", "super_res_last": "upsampler"}
    for component, prefix in ours.items():
        for name, (file, theirs, operation) in MANIFEST["keymap"][component].items():
            if file != "clip_stats":
                found, operations = rules[part_of[component]][prefix + name]
                assert (found, ":".join(reversed(operations)) or "copy") == (theirs, operation)
    own = karlo_parts.projection_rules(karlo_parts.TEXT_PROJECTION, karlo_parts.NULL_IMAGE, "")
    for name, (theirs, _) in own.items():
        assert MANIFEST["keymap"]["text_proj"][theirs] == ["decoder", rules["decoder"][name][0], "copy"]


def _defaults(network: type) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(network).parameters.items()}


def test_sizes_and_configs_are_the_published_ones() -> None:
    for component, shapes in MANIFEST["diffusers"].items():
        assert sum(4 * torch.Size(shape).numel() for shape in shapes.values()) == MANIFEST["bytes"][component]
    for network, name in ((UNet2DConditionModel, "decoder"), (UNet2DModel, "super_res_first")):
        configs = (MANIFEST["configs"][name], karlo.CONFIGS[name])
        whole = [{**_defaults(network), **{k: v for k, v in config.items() if k[0] != "_"}} for config in configs]
        assert whole[0] == whole[1]
    for name in ("prior", "text_proj"):
        assert {key: MANIFEST["configs"][name][key] for key in karlo.CONFIGS[name]} == karlo.CONFIGS[name]
    assert (karlo.SAMPLING["prior_steps"], karlo.SAMPLING["num_inference_steps"]) == (25, 25)
    assert (karlo.SAMPLING["prior_guidance_scale"], karlo.SAMPLING["guidance_scale"]) == (4, 8)
    assert karlo_parts.UPSAMPLER_STEPS == karlo.SAMPLING["upsampler_steps"] == 7


# Values, through the containers ---------------------------------------------------------------------------------------


def test_a_folder_is_read_bit_for_bit(folder: Path) -> None:
    read = karlo.read(folder)
    assert (read.name, read.resolution, find(folder)) == ("karlo-v1-alpha", 8, karlo)
    parts = built(folder)
    files = {name: load_file(folder / name / "diffusion_pytorch_model.safetensors") for name in MANIFEST["diffusers"]}
    prior, decoder, upsampler = (parts[name].state_dict() for name in FOLDER_PARTS)
    again = {name.removeprefix("transformer."): tensor for name, tensor in prior.items() if name.startswith("tr")}
    again |= {"clip_mean": prior["mean"][None], "clip_std": prior["std"][None]}
    projection = karlo_parts.projection_rules(karlo_parts.TEXT_PROJECTION, karlo_parts.NULL_IMAGE, "")
    back = {
        "prior": again,
        "decoder": {name[5:]: tensor for name, tensor in decoder.items() if name.startswith("unet.")},
        "text_proj": original_tensors(projection, decoder),
        "super_res_first": {name[5:]: tensor for name, tensor in upsampler.items() if name.startswith("unet.")},
        "super_res_last": {name[10:]: tensor for name, tensor in upsampler.items() if name.startswith("last_unet.")},
    }
    for name, tensors in files.items():
        assert back[name].keys() == tensors.keys()
        assert all(torch.equal(back[name][key], tensor) for key, tensor in tensors.items())
    assert not any(model.training for model in parts.values())
    config = parts["upsampler"].config
    assert (config.factor, config.num_inference_steps, config.scheduler) == (4, 7, "unclip")
    assert config.last_step_network and not config.corrects_colour
    assert parts["prior"].config.clamp == 5.0 and parts["decoder"].config.learned_variance


def test_the_original_checkpoints_make_equal_models(folder: Path, tmp_path: Path) -> None:
    parts = built(folder)
    rules = rules_of(parts)
    originals = write_originals(tmp_path / "originals", parts, rules)
    assert karlo.recognises(originals) and karlo.missing(originals) == ["ViT-L-14.pt"]
    with pytest.raises(InputError, match=r"is incomplete, it lacks ViT-L-14\.pt; "):
        karlo.read(originals, configs=CONFIGS)
    read = karlo.read(originals, clip=folder / "text_encoder", configs=CONFIGS)
    again = {part: read.parts[part]() for part in FOLDER_PARTS}
    assert all(equal(parts[part], again[part]) for part in FOLDER_PARTS)
    assert again["prior"].config.clamp == 10.0
    qkv = torch.load(originals / karlo.ORIGINALS["decoder"], weights_only=True)["state_dict"][
        "model.middle_block.1.qkv.weight"
    ]
    query = parts["decoder"].unet.mid_block.attentions[0].to_q.weight
    assert torch.equal(qkv[:4, :, 0], query[:4]) and torch.equal(qkv[12:16, :, 0], query[4:8])  # head by head


def test_variations_come_in_pickled_files_and_without_a_prior(folder: Path, tmp_path: Path) -> None:
    variations = write_variations(folder, tmp_path / "variations")
    assert karlo.missing(variations) == []
    read, parts = karlo.read(variations), built(folder)
    assert set(read.parts) == {"clip", "decoder", "upsampler"} and "variations" in read.name
    assert all(equal(parts[part], read.parts[part]()) for part in ("decoder", "upsampler"))
    assert any("no prior" in note for note in read.notes)
    whole, half = read.parts["clip"](), karlo.read(folder).parts["clip"]()
    assert isinstance(whole, CLIP) and whole.has_image and not half.has_image
    joined = karlo.read(folder, clip=variations / "image_encoder").parts["clip"]()
    assert equal(whole, joined) and torch.equal(half.encode_text("a cat").states, whole.encode_text("a cat").states)


def test_weights_are_cast_one_by_one(folder: Path) -> None:
    whole = built(folder)["decoder"].state_dict()
    half = karlo.read(folder, torch.float16).parts["decoder"]().state_dict()
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in whole.items())


def test_the_whole_decoder_loads_without_a_copy(tmp_path: Path) -> None:
    configs, stem = MANIFEST["configs"], "diffusion_pytorch_model.safetensors"
    for name in ("decoder", "text_proj"):
        write_json(tmp_path / name / "config.json", configs[name])
        write_sparse(tmp_path / name / stem, MANIFEST["diffusers"][name])
    write_json(tmp_path / "decoder_scheduler" / "scheduler_config.json", configs["decoder_scheduler"])
    assert (tmp_path / "decoder" / stem).stat().st_size > 3.54e9
    with MemoryPeak() as memory:
        decoder = karlo_parts.decoder_of_folder(tmp_path, None)
        assert sum(parameter.numel() for parameter in decoder.parameters()) == 885_439_686 + 7_878_400
        loaded = memory.rise
        used = sum(float(parameter.detach().sum()) for parameter in decoder.unet.up_blocks[0].parameters())
    assert used == 0 and loaded < 0.3e9  # of 3.57 GB: they are mapped, not read
    block = sum(parameter.nbytes for parameter in decoder.unet.up_blocks[0].parameters())
    assert block > 0.5e9 and memory.rise < 1.05 * block + 0.3e9  # what is used, and that once


# Refusals -------------------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_all_listed(copy: Path) -> None:
    def damaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors["conv_in.bias"]
        wide = tensors["mid_block.attentions.0.add_k_proj.weight"]
        return tensors | {"strange.weight": torch.zeros(2), "mid_block.attentions.0.add_k_proj.weight": wide.T}

    rewrite(copy / "decoder" / "diffusion_pytorch_model.safetensors", damaged)
    with pytest.raises(InputError) as caught:
        karlo.read(copy).parts["decoder"]()
    message = str(caught.value)
    assert "missing unet.conv_in.bias" in message and "unexpected unet.strange.weight" in message
    assert "mis-shaped unet.mid_block.attentions.0.add_k_proj.weight [24, 16] instead of [16, 24]" in message
    assert message.count("unet.") == 3


def test_original_tensors_that_do_not_fit_are_all_listed(folder: Path, tmp_path: Path) -> None:
    parts = built(folder)
    originals = write_originals(tmp_path / "originals", parts, rules_of(parts))
    path = originals / karlo.ORIGINALS["prior"]
    tensors = torch.load(path, weights_only=True)["state_dict"]
    del tensors["model.final_ln.bias"]
    tensors["model.strange"] = torch.zeros(2)
    tensors["model.transformer.resblocks.0.mlp.c_fc.weight"] = tensors[
        "model.transformer.resblocks.0.mlp.c_fc.weight"
    ].T
    torch.save({"state_dict": tensors}, path)
    with pytest.raises(InputError) as caught:
        karlo.read(originals, clip=folder, configs=CONFIGS).parts["prior"]()
    message = str(caught.value)
    assert "missing transformer.norm_out.bias" in message and "unexpected model.strange" in message
    assert "mis-shaped transformer.transformer_blocks.0.ff.net.0.proj.weight [16, 64] instead of [64, 16]" in message


def changed(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **values})


def test_classes_are_looked_up_and_never_imported(copy: Path) -> None:
    changed(copy / "model_index.json", prior=["os", "system"])
    with pytest.raises(InputError, match=r"names the class 'system' for 'prior', which this family does not have"):
        karlo.read(copy)
    changed(copy / "model_index.json", prior=["diffusers", "PriorTransformer"], safety_checker=["my_module", "Checker"])
    with pytest.raises(InputError, match="'Checker' for 'safety_checker'"):
        karlo.read(copy)
    changed(copy / "model_index.json", safety_checker=[None, None])
    changed(copy / "decoder" / "config.json", _class_name="UNet3DConditionModel")
    with pytest.raises(InputError, match="describes a 'UNet3DConditionModel', not a UNet2DConditionModel"):
        karlo.read(copy)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("prior/config.json", {"added_emb_type": None}, "has added_emb_type 'None'; genpipe runs these weights with"),
        ("prior/config.json", {"num_layers": "two"}, "has num_layers 'two'; a whole number above 0 is needed"),
        ("decoder/config.json", {"trust_me": 1}, "has entries that UNet2DConditionModel does not know: trust_me"),
        ("decoder_scheduler/scheduler_config.json", {"variance_type": "fixed_small_log"}, "has variance_type"),
        ("super_res_last/config.json", {"layers_per_block": 3}, "has layers_per_block '3'"),
        ("super_res_first/config.json", {"sample_size": 20}, "is for pictures of side 20, no multiple of 8"),
    ],
)
def test_configs_that_are_not_karlos_are_refused(copy: Path, file: str, values: Any, message: str) -> None:
    changed(copy / file, **values)
    if "first" in file:
        changed(copy / "super_res_last/config.json", sample_size=20)
    with pytest.raises(InputError, match=message):
        built(copy)


def test_what_is_missing_is_listed(copy: Path) -> None:
    (copy / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "text_encoder" / "config.json").unlink()
    (copy / "decoder_scheduler" / "scheduler_config.json").unlink()
    lacking = [
        "prior/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "decoder_scheduler/scheduler_config.json",
    ]
    assert karlo.recognises(copy) and karlo.missing(copy) == lacking
    with pytest.raises(InputError, match=f"is incomplete, it lacks {', '.join(lacking)}; "):
        karlo.read(copy)
    assert not karlo.recognises(copy / "prior") and not karlo.recognises(copy / "nowhere")


def test_a_truncated_file_is_refused(copy: Path) -> None:
    path = copy / "super_res_last" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        InputError, match=r"super_res_last/diffusion_pytorch_model\.safetensors is refused: it is trunc"
    ):
        karlo.read(copy).parts["upsampler"]()
