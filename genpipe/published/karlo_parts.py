"""Karlo's networks as genpipe's parts: the prior, the decoder with its text projection, both super-resolution networks.

Each is built without memory for its weights, which are then the file's own: read once, nothing left over, no copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, PriorTransformer, UNet2DConditionModel, UNet2DModel
from torch import Tensor

from genpipe.dalle2.decoder import Decoder
from genpipe.dalle2.prior import Prior
from genpipe.dalle2.upsampler import Upsampler
from genpipe.errors import InputError
from genpipe.published.containers import find_weights, read_tensors
from genpipe.published.diffusers_folder import Classes, arguments, component_config, expect, needed
from genpipe.published.fitting import assign, on_meta
from genpipe.published.guided_diffusion import Rules, applied, unet_rules
from genpipe.published.karlo import CLASSES, ORIGINAL_CLAMP
from genpipe.published.weight_names import DIFFUSERS_STEMS

Model = TypeVar("Model", bound=ModelMixin)
Config = Mapping[str, Any]

UPSAMPLER_STEPS = 7
# The text projection beside diffusers' decoder, whose layers are the decoder's own here; in the original file they are
# within the decoder as well.
TEXT_PROJECTION = {
    "image_to_time": "clip_image_embeddings_project_to_time_embeddings",
    "text_to_time": "embedding_proj",
    "image_to_context": "clip_extra_context_tokens_proj",
    "text_to_context": "encoder_hidden_states_proj",
    "text_norm": "text_encoder_hidden_states_norm",
}
NULL_IMAGE = "learned_classifier_free_guidance_embeddings"
ORIGINAL_PROJECTION = {
    "image_to_time": "clip_emb",
    "text_to_time": "text_feat_proj",
    "image_to_context": "clip_tok_proj",
    "text_to_context": "text_seq_proj.0",
    "text_norm": "text_seq_proj.1",
}
ORIGINAL_PRIOR = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
    "attn1.to_out.0": "attn.c_proj",
    "ff.net.0.proj": "mlp.c_fc",
    "ff.net.2": "mlp.c_proj",
    "norm1": "ln_1",
    "norm3": "ln_2",
}
# What other versions of these classes can be told; Karlo and Kandinsky are the plain ones.
PLAIN_PRIOR = {
    "additional_embeddings": 4,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
# The noise schedule that these weights were trained on, as the folder's schedulers say it.
UNCLIP = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


# Models from configs of diffusers -------------------------------------------------------------------------------------


def empty_prior(config: Config, clamp: float, where: Path) -> Prior:
    """A Prior for the weights of a PriorTransformer of this config."""
    arguments(config, PriorTransformer, (), where)
    expect(config, PLAIN_PRIOR, where)
    width = needed(config, "embedding_dim", where)
    return on_meta(
        lambda: Prior(
            width,
            text_width=width,
            text_length=needed(config, "num_embeddings", where),
            num_layers=needed(config, "num_layers", where),
            num_heads=needed(config, "num_attention_heads", where),
            head_dim=needed(config, "attention_head_dim", where),
            dropout=float(config.get("dropout", 0.0)),
            embedding_scale="raw",
            clamp=clamp,
        )
    )


def empty_decoder(config: Config, projection: Config, where: Path) -> Decoder:
    """A Decoder for the weights of a UNet2DConditionModel and an UnCLIPTextProjModel of these configs."""
    expect(config, {"in_channels": 3, "out_channels": 6, "class_embed_type": "identity"}, where)
    context_width = needed(config, "cross_attention_dim", where)
    expect(projection, {"cross_attention_dim": context_width}, where)
    filled = ("sample_size", "in_channels", "out_channels", "cross_attention_dim", "class_embed_type")
    width = needed(projection, "clip_embeddings_dim", where)
    return on_meta(
        lambda: Decoder(
            needed(config, "sample_size", where),
            clip_width=width,
            text_width=width,
            unet_config=arguments(config, UNet2DConditionModel, filled, where),
            num_context_tokens=needed(projection, "clip_extra_context_tokens", where),
            context_width=context_width,
            learned_variance=True,
            embedding_scale="raw",
        )
    )


def empty_upsampler(config: Config, small: int, where: Path) -> Upsampler:
    """An Upsampler for the weights of two UNet2DModels of this config, which enlarge pictures of side `small`."""
    expect(config, {"in_channels": 6, "out_channels": 3, "add_attention": False}, where)
    factor, rest = divmod(needed(config, "sample_size", where), small)
    if rest or not factor:
        raise InputError(f"{where} is for pictures of side {config['sample_size']}, no multiple of {small}.")
    filled = ("sample_size", "in_channels", "out_channels", "add_attention")
    return on_meta(
        lambda: Upsampler(
            unet_config=arguments(config, UNet2DModel, filled, where),
            factor=factor,
            num_inference_steps=UPSAMPLER_STEPS,
            scheduler="unclip",
            last_step_network=True,
            corrects_colour=False,
        )
    )


# A folder in diffusers' layout ----------------------------------------------------------------------------------------


def prior_of_folder(source: Path, dtype: torch.dtype | None) -> Prior:
    """The part from a checked folder; so the next two. Raise InputError where config or weights do not fit."""
    config = component_config(source, "prior", CLASSES)
    wanted = {"prediction_type": "sample", "variance_type": "fixed_small_log"}
    clamp = unclip_clamp(source, "prior_scheduler", CLASSES, wanted)
    model = empty_prior(config, clamp, source / "prior" / "config.json")
    return filled_prior(model, _weights(source, "prior", dtype), str(source / "prior"))


def filled_prior(model: Prior, tensors: Mapping[str, Tensor], where: str) -> Prior:
    """An empty prior with the weights of a PriorTransformer, in eval mode."""
    fitting = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    for ours, theirs in (("mean", "transformer.clip_mean"), ("std", "transformer.clip_std")):
        if theirs in fitting:
            tensor = fitting.pop(theirs)
            fitting[ours] = tensor[0] if tensor.ndim == 2 and len(tensor) == 1 else tensor
    return filled(model, fitting, where)


def decoder_of_folder(source: Path, dtype: torch.dtype | None) -> Decoder:
    wanted = {"prediction_type": "epsilon", "variance_type": "learned_range"}
    unclip_clamp(source, "decoder_scheduler", CLASSES, wanted, 1.0)
    config = component_config(source, "decoder", CLASSES)
    projection = component_config(source, "text_proj", CLASSES)
    model = empty_decoder(config, projection, source / "decoder" / "config.json")
    tensors = _weights(source, "decoder", dtype), _weights(source, "text_proj", dtype)
    return filled_decoder(model, *tensors, f"{source}, decoder and text_proj,")


def filled_decoder(
    model: Decoder, tensors: Mapping[str, Tensor], projection: Mapping[str, Tensor], where: str
) -> Decoder:
    """An empty decoder with the weights of a UNet2DConditionModel and an UnCLIPTextProjModel, in eval mode."""
    fitting = {f"unet.{name}": tensor for name, tensor in tensors.items()}
    return filled(model, fitting | applied(projection_rules(TEXT_PROJECTION, NULL_IMAGE, ""), projection), where)


def upsampler_of_folder(source: Path, dtype: torch.dtype | None) -> Upsampler:
    wanted = {"prediction_type": "epsilon", "variance_type": "fixed_small_log"}
    unclip_clamp(source, "super_res_scheduler", CLASSES, wanted, 1.0)
    first, last = (component_config(source, name, CLASSES) for name in ("super_res_first", "super_res_last"))
    where = source / "super_res_last" / "config.json"
    if last.get("sample_size") is None:  # as it was published
        last = {**last, "sample_size": first.get("sample_size")}
    expect(last, first, where)
    small = needed(component_config(source, "decoder", CLASSES), "sample_size", source / "decoder" / "config.json")
    model = empty_upsampler(first, small, where)
    tensors = _weights(source, "super_res_first", dtype), _weights(source, "super_res_last", dtype)
    return filled_upsampler(model, *tensors, f"{source}, super_res_first and super_res_last,")


def filled_upsampler(
    model: Upsampler, first: Mapping[str, Tensor], last: Mapping[str, Tensor], where: str
) -> Upsampler:
    """An empty upsampler with the weights of two UNet2DModels, the second for the last step, in eval mode."""
    fitting = {f"unet.{name}": tensor for name, tensor in first.items()}
    return filled(model, fitting | {f"last_unet.{name}": tensor for name, tensor in last.items()}, where)


def unclip_clamp(source: Path, name: str, classes: Classes, wanted: Config, clamp: float | None = None) -> float:
    """The limit of x_0 by a folder's UnCLIPScheduler. Raises InputError for one that genpipe would not follow."""
    config = component_config(source, name, classes, "scheduler_config.json")
    where = source / name / "scheduler_config.json"
    expect(config, {**UNCLIP, **wanted, **({} if clamp is None else {"clip_sample_range": clamp})}, where)
    return float(config.get("clip_sample_range", 1.0))


def _weights(source: Path, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return read_tensors(find_weights(source / name, *DIFFUSERS_STEMS), dtype=dtype)


# The original checkpoints ---------------------------------------------------------------------------------------------


def prior_of_originals(files: Mapping[str, Path], configs: Mapping[str, Config], dtype: torch.dtype | None) -> Prior:
    """The part from the original files; so the next two. Raise InputError where they do not fit `configs`."""
    model = empty_prior(configs["prior"], ORIGINAL_CLAMP, files["prior"])
    tensors = read_tensors(files["prior"], inside=["state_dict"], dtype=dtype)
    statistics = read_tensors(files["clip_stats"], dtype=dtype)
    fitting = applied(prior_rules(model), tensors)
    fitting |= applied({"mean": ("0", ()), "std": ("1", ())}, statistics)
    return filled(model, fitting, f"{files['prior']} with {files['clip_stats'].name}")


def decoder_of_originals(
    files: Mapping[str, Path], configs: Mapping[str, Config], dtype: torch.dtype | None
) -> Decoder:
    model = empty_decoder(configs["decoder"], configs["text_proj"], files["decoder"])
    tensors = read_tensors(files["decoder"], inside=["state_dict"], dtype=dtype)
    return filled(model, applied(decoder_rules(model), tensors), str(files["decoder"]))


def upsampler_of_originals(
    files: Mapping[str, Path], configs: Mapping[str, Config], dtype: torch.dtype | None
) -> Upsampler:
    config = configs["super_res_first"]
    model = empty_upsampler(config, needed(configs["decoder"], "sample_size", files["decoder"]), files["super_res"])
    tensors = read_tensors(files["super_res"], inside=["state_dict"], dtype=dtype)
    return filled(model, applied(upsampler_rules(model), tensors), str(files["super_res"]))


def prior_rules(model: Prior) -> Rules:
    """Our names of the prior's tensors -> those in the original file, which lacks mean and std."""
    rules: dict[str, tuple[str, tuple[str, ...]]] = {
        "transformer.positional_embedding": ("model.positional_embedding", ()),
        "transformer.prd_embedding": ("model.prd_emb", ()),
    }
    head = model.config.head_dim
    for name in model.transformer.state_dict():
        layer, _, kind = name.rpartition(".")
        block, found, inner = layer.partition("transformer_blocks.")
        number, _, inner = inner.partition(".") if found else ("", "", block)
        prefix = f"model.transformer.resblocks.{number}." if found else "model."
        if inner in ORIGINAL_PRIOR:
            rules[f"transformer.{name}"] = (f"{prefix}{ORIGINAL_PRIOR[inner]}.{kind}", ())
        elif inner in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            share = f"per_head_rows:{'qkv'.index(inner[-1])}/3:{head}"
            rules[f"transformer.{name}"] = (f"{prefix}attn.c_qkv.{kind}", (share,))
    return rules


def decoder_rules(model: Decoder) -> Rules:
    """Our names of the decoder's tensors -> those in the original file."""
    config = model.config.unet_config
    names = model.unet.state_dict().keys()
    unet = unet_rules(names, config["layers_per_block"], config["attention_head_dim"], "model.")
    return projection_rules(ORIGINAL_PROJECTION, "cf_param", "model.") | _within("unet", unet)


def upsampler_rules(model: Upsampler) -> Rules:
    """Our names of the tensors of both super-resolution networks -> those in the original file, which holds both."""
    layers, names = model.config.unet_config["layers_per_block"], model.unet.state_dict().keys()
    first, last = (unet_rules(names, layers, 1, f"{prefix}.") for prefix in ("model_first_steps", "model_last_step"))
    return _within("unet", first) | _within("last_unet", last)


def projection_rules(names: Mapping[str, str], null: str, prefix: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Our names of the text projection's tensors -> those of a file."""
    rules: dict[str, tuple[str, tuple[str, ...]]] = {"null_image_embedding": (f"{prefix}{null}", ())}
    for ours, theirs in names.items():
        rules |= {f"{ours}.{kind}": (f"{prefix}{theirs}.{kind}", ()) for kind in ("weight", "bias")}
    return rules


def _within(prefix: str, rules: Rules) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {f"{prefix}.{name}": rule for name, rule in rules.items()}


def filled(model: Model, tensors: Mapping[str, Tensor], where: str) -> Model:
    """An empty model with its weights under our names, in eval mode. Raises InputError where they do not fit."""
    assign(model, tensors, where)
    model.register_to_config(_name_or_path=where)  # as diffusers does: its weights come from somewhere
    return model.eval()
