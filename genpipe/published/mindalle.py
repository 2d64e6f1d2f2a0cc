"""minDALL-E 1.3B (Kakao Brain 2021): VQGAN, transformer and tokenizer from 1.3B.tar.gz or its unpacked folder."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpipe.errors import InputError
from genpipe.published.registry import Licence, Published
from genpipe.published.taming import vqgan_tensors

if TYPE_CHECKING:  # torch takes seconds to import, and files are recognised without it
    import torch

    from genpipe.dalle1.mindalle import MinDALLETransformer
    from genpipe.dalle1.vqgan import VQGAN

LICENCE = Licence(
    "CC-BY-NC-SA 4.0",
    "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    "The transformer's weights may not be used commercially; name Kakao Brain as their author, say what was changed, "
    "and pass changed weights on under the same licence. The VQGAN is a fine-tune of one under MIT; the code that "
    "describes them is under Apache-2.0.",
)
MD5 = "57b008f02ceaa02b779c8b7463143315"
URL = f"https://arena.kakaocdn.net/brainrepo/models/minDALL-E/{MD5}/1.3B.tar.gz"
CONFIG, STAGE_1, STAGE_2 = "config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"
VOCABULARY, MERGES = "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
FILES = (CONFIG, STAGE_1, STAGE_2, VOCABULARY, MERGES)
MAX_CONFIG_BYTES = 1 << 20

# What the file's config.yaml is merged over: the published shape.
DEFAULTS: dict[str, Any] = {
    "dataset": {"tokenizer_type": "CharBPE", "context_length": 64, "image_resolution": 256},
    "stage1": {
        "type": "vqgan",
        "embed_dim": 256,
        "n_embed": 16384,
        "hparams": {
            "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "pdrop": 0.0,
        },
    },
    "stage2": {
        "type": "transformer1d",
        "vocab_size_txt": 16384,
        "vocab_size_img": 16384,
        "use_cls_cond": None,
        "hparams": {
            "embed_dim": 1536, "n_layers": 42, "n_heads": 24, "n_dense_layers": 42, "ctx_len_img": 256,
            "ctx_len_txt": 64, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True,
            "attn_bias": True, "gelu_use_approx": False,
        },
    },
}  # fmt: skip


def recognises(source: Path) -> bool:
    """Whether `source` is the archive, by its name, or a folder with one of its checkpoints."""
    if source.is_dir():
        return (source / STAGE_1).is_file() or (source / STAGE_2).is_file()
    return source.is_file() and re.search(r"(1\.3b|mindall).*\.(tar\.gz|tgz)$", source.name.lower()) is not None


def missing(source: Path) -> list[str]:
    """Files of the folder that are not there; an archive is checked when it is unpacked."""
    return [name for name in FILES if not (source / name).is_file()] if source.is_dir() else []


def read(source: Path, dtype: torch.dtype | None = None, clip: Path | None = None, archive_md5: str = MD5) -> Published:
    """The archive or its unpacked folder as parts. `clip`: ranks what is drawn; there is none among the files.

    An archive, which must have the checksum `archive_md5`, is unpacked beside itself when the first part is built; what
    is unpacked is removed when the parts are no longer in use.
    """
    opened: _Folder | _Archive
    if source.is_dir():
        absent = missing(source)
        if absent:
            raise InputError(f"{source} is not complete: {', '.join(absent)} missing; unpack the archive again.")
        opened, files = _Folder(source), [source / name for name in FILES]
        resolution = settings_in(source / CONFIG).vqgan["resolution"]
    else:
        opened, files = _Archive(source, archive_md5), [source]
        resolution = DEFAULTS["dataset"]["image_resolution"]

    def dvae() -> VQGAN:
        return load_vqgan(opened.folder / STAGE_1, settings_in(opened.folder / CONFIG).vqgan, dtype)

    def transformer() -> MinDALLETransformer:
        return load_transformer(opened.folder, settings_in(opened.folder / CONFIG).transformer, dtype)

    parts: dict[str, Callable[[], Any]] = {"dvae": dvae, "transformer": transformer}
    if clip is not None:
        from genpipe.published.clip import read_clip

        parts["clip"] = partial(read_clip, clip, dtype)
    return Published(
        name="minDALL-E",
        family="mindalle",
        licence=LICENCE,
        description="minDALL-E 1.3B: pictures of 256 x 256 pixels from English captions, DALL-E 1's design trained on "
        "14 million pairs, 16 x 16 tokens of a VQGAN.",
        parts=parts,
        defaults={"dalle1": {"temperature": 1.0, "top_k": 256, "guidance_scale": 1.0}},
        files=files,
        resolution=resolution,
        notes=[
            "It has no CLIP: pictures come unranked unless one is given.",
            "It was not trained on empty captions, so guidance scales other than 1 are out of its reach.",
        ],
    )


@dataclass(frozen=True)
class _Folder:
    folder: Path


class _Archive:
    """The folder in an archive, there from its first use until this object goes."""

    def __init__(self, path: Path, md5: str) -> None:
        self.path, self.md5 = path, md5

    @cached_property
    def folder(self) -> Path:
        """Raises InputError for a wrong checksum and whatever open_tar refuses; nothing is left behind then."""
        from genpipe.published.containers import checksum, open_tar

        try:
            checksum(self.path, "md5", self.md5)
        except InputError as error:
            raise InputError(f"{str(error).rstrip('.')}, or unpack it yourself and give the folder.") from error
        try:
            place = self.path.parent
            outer = tempfile.TemporaryDirectory(prefix=".minDALL-E-", dir=place, ignore_cleanup_errors=True)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be unpacked beside itself ({error.strerror}); unpack it and give the folder."
            ) from error
        try:
            open_tar(self.path, FILES, Path(outer.name) / "1.3B")
        except InputError:
            outer.cleanup()
            raise
        self._unpacked = outer  # removes itself when nothing refers to it any more
        return Path(outer.name) / "1.3B"


@dataclass(frozen=True)
class Settings:
    """Arguments of VQGAN and of MinDALLETransformer."""

    vqgan: dict[str, Any]
    transformer: dict[str, Any]


def settings_in(path: Path) -> Settings:
    """config.yaml merged over the published shape. Raises InputError for what VQGAN and MinDALLETransformer cannot be.

    Entries of no use here (of the data, of the training) are passed over.
    """
    import yaml

    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = _merged(DEFAULTS, {} if given is None else given, "the file")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be used ({' '.join(str(error).split())}); get it again.") from error
    _check_design(config, path)
    first, second = config["stage1"], config["stage2"]
    a, b = first["hparams"], second["hparams"]
    vqgan = {
        "resolution": a["resolution"],
        "num_codes": first["n_embed"],
        "code_width": first["embed_dim"],
        "latent_channels": a["z_channels"],
        "widths": tuple(a["ch"] * factor for factor in a["ch_mult"]),
        "blocks_per_level": a["num_res_blocks"],
        "attention_resolutions": tuple(a["attn_resolutions"]),
    }
    transformer = {
        "vocab_size": second["vocab_size_txt"],
        "text_length": b["ctx_len_txt"],
        "num_image_tokens": second["vocab_size_img"],
        "grid_size": math.isqrt(b["ctx_len_img"]),
        "width": b["embed_dim"],
        "num_layers": b["n_layers"],
        "num_heads": b["n_heads"],
        "dropout": b["resid_pdrop"],
    }
    return Settings(vqgan, transformer)


def _check_design(config: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for entries of the merged config that VQGAN and MinDALLETransformer have one value for."""
    first, second, data = config["stage1"], config["stage2"], config["dataset"]
    a, b = first["hparams"], second["hparams"]
    fixed = {
        "dataset.tokenizer_type": (data["tokenizer_type"], "CharBPE"),
        "dataset.context_length": (data["context_length"], b["ctx_len_txt"]),
        "dataset.image_resolution": (data["image_resolution"], a["resolution"]),
        "stage1.type": (first["type"], "vqgan"),
        "stage1.hparams.double_z": (a["double_z"], False),
        "stage1.hparams.in_channels": (a["in_channels"], 3),
        "stage1.hparams.out_ch": (a["out_ch"], 3),
        "stage2.type": (second["type"], "transformer1d"),
        "stage2.vocab_size_img": (second["vocab_size_img"], first["n_embed"]),
        "stage2.use_cls_cond": (bool(second["use_cls_cond"]), False),
        "stage2.hparams.n_dense_layers": (b["n_dense_layers"], b["n_layers"]),
        "stage2.hparams.ctx_len_img": (b["ctx_len_img"], math.isqrt(b["ctx_len_img"]) ** 2),
        "stage2.hparams.mlp_bias": (b["mlp_bias"], True),
        "stage2.hparams.attn_bias": (b["attn_bias"], True),
        "stage2.hparams.gelu_use_approx": (b["gelu_use_approx"], False),
    }
    other = [f"{name} is {found!r}, not {wanted!r}" for name, (found, wanted) in fixed.items() if found != wanted]
    if other:
        raise InputError(f"{path} describes a model that genpipe does not have: {'; '.join(other)}.")


def _merged(defaults: Mapping[str, Any], given: Any, where: str) -> dict[str, Any]:
    """`given` over `defaults`, entries of theirs alone, each of their type; ValueError for another type."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is no mapping")
    merged = {}
    for name, default in defaults.items():
        value = given.get(name, default)
        if isinstance(default, Mapping):
            value = _merged(default, value, name)
        elif isinstance(default, list):
            if not isinstance(value, list) or not value or any(type(entry) is not int or entry < 1 for entry in value):
                raise ValueError(f"{name} is {value!r}, not a list of whole numbers")
        elif isinstance(default, float):
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{name} is {value!r}, not a share in [0, 1)")
        elif default is not None and type(value) is not type(default):
            raise ValueError(f"{name} is {value!r}, not a {type(default).__name__}")
        elif type(value) is int and not 0 < value <= 1 << 24:
            raise ValueError(f"{name} is {value}, which is out of range")
        merged[name] = value
    return merged


def load_vqgan(path: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> VQGAN:
    """stage1_last.ckpt -> VQGAN of the shape `config`, in eval mode. Raises InputError, see read_tensors and assign."""
    from genpipe.dalle1.vqgan import VQGAN
    from genpipe.published.containers import read_tensors
    from genpipe.published.fitting import assign, on_meta

    tensors = read_tensors(path, inside=("state_dict",), dtype=dtype)
    model = on_meta(lambda: VQGAN(**config))
    assign(model, vqgan_tensors(tensors, len(model.config.widths)), str(path), dtype)
    return model.eval()


def load_transformer(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> MinDALLETransformer:
    """stage2_last.ckpt and tokenizer/ in `folder` -> MinDALLETransformer of the shape `config`, in eval mode.

    Raises InputError, see read_tensors, assign and CharacterTokenizer.from_files.
    """
    from genpipe.dalle1.character_tokenizer import CharacterTokenizer
    from genpipe.dalle1.mindalle import MinDALLETransformer
    from genpipe.published.containers import read_tensors
    from genpipe.published.fitting import assign, on_meta

    tokenizer = CharacterTokenizer.from_files(folder / VOCABULARY, folder / MERGES)
    tensors = read_tensors(folder / STAGE_2, inside=("state_dict",), dtype=dtype)
    model = on_meta(lambda: MinDALLETransformer(**config))
    model.tokenizer = tokenizer
    assign(model, transformer_tensors(tensors), str(folder / STAGE_2), dtype)
    return model.eval()


_OUTSIDE_BLOCKS = {
    "tok_emb_txt": "text_embedding",
    "pos_emb_txt": "text_position",
    "tok_emb_img": "image_embedding",
    "pos_emb_img": "image_position",
    "ln_f": "norm",
    "head_txt": "text_head",
    "head_img": "image_head",
}
_INSIDE_BLOCKS = {
    "ln1": "norm_1",
    "ln2": "norm_2",
    "attn.query": "attention.qkv.query",
    "attn.key": "attention.qkv.key",
    "attn.value": "attention.qkv.value",
    "attn.proj": "attention.out",
    "mlp.0": "mlp.0",
    "mlp.2": "mlp.2",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def transformer_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published tensors of stage 2 -> those of MinDALLETransformer: other names for the same tensors.

    Names that are not known stay as they are.
    """
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        renamed = transformer_name(name)
        ours[renamed if renamed not in ours else f"{name} (twice)"] = tensor
    return ours


def transformer_name(name: str) -> str:
    """blocks.3.attn.proj.bias -> blocks.3.attention.out.bias"""
    stem, _, kind = name.rpartition(".")
    found = _BLOCK.fullmatch(stem)
    if found is None:
        return f"{_OUTSIDE_BLOCKS.get(stem, stem)}.{kind}"
    return f"blocks.{found[1]}.{_INSIDE_BLOCKS.get(found[2], found[2])}.{kind}"
