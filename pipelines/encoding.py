"""What DALL-E 2's parts are told about a call: texts and a picture as the shared CLIP encodes them (2204.06125, 2).

A decoder with a text encoder of its own is asked in CLIP's place. Legend: B prompts, L text positions, D CLIP width, W
width of its text states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.dalle2.prior import Prior
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.images import shrink, to_unit
from pipelines import request
from pipelines.protocols import PictureDecoder


@dataclass(frozen=True)
class TextEncoding:
    """Of B prompts: embedding (B, D), states (B, L, W), mask (B, L); constant over the steps of a drawing."""

    embedding: Tensor
    states: Tensor
    mask: Tensor

    def rows(self, index: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The three of some prompts, also of one prompt several times."""
        chosen = list(index)
        return self.embedding[chosen], self.states[chosen], self.mask[chosen]


@dataclass(frozen=True)
class EncodedPrompts:
    """What a call is about: B texts, and the null text (one row) of guidance.

    ranked_by: what pictures are ranked against (B, D), None where they are not. picture: the embedding (1, D) of a
    picture that was given in place of the prior, or None. null_picture: the null image embedding (1, D), None where the
    decoder has its own.
    """

    text: TextEncoding
    null: TextEncoding
    ranked_by: Tensor | None
    picture: Tensor | None
    null_picture: Tensor | None


def text_reader(clip: CLIP | None, decoder: PictureDecoder) -> Any:
    """The part that encodes the prompts (pipelines.protocols.TextReader); None where there is none."""
    if hasattr(decoder, "encode_text"):
        return decoder
    return clip if has_tower(clip, "text") else None


def has_tower(clip: CLIP | None, tower: str) -> bool:
    """Whether there is a CLIP with this tower, "text" or "image"."""
    return clip is not None and bool(getattr(clip, f"has_{tower}"))


def encode_prompts(
    clip: CLIP | None,
    decoder: PictureDecoder,
    prompts: Sequence[str],
    negative_prompt: str = "",
    image: Image.Image | None = None,
) -> EncodedPrompts:
    """Clean prompts, which may be empty beside an image -> their encoding; warns of prompts that are too long.

    Raises InputError for an image where CLIP has no image tower.
    """
    reader = text_reader(clip, decoder)
    read = [request.shorten(text, reader.tokenizer, reader.context_length) for text in (*prompts, negative_prompt)]
    for prompt, beginning in zip((*prompts, negative_prompt), read, strict=True):
        request.warn_of_cut_prompt(prompt, beginning)
    text, null = encode_texts(reader, read[:-1]), encode_texts(reader, read[-1:])
    if clip is None or not has_tower(clip, "image"):
        if image is not None and decoder.reads_image:
            raise InputError(
                "These weights have no CLIP image tower, which a given picture needs; import them with --clip."
            )
        return EncodedPrompts(text, null, None, None, None)
    ranked_by = None
    if has_tower(clip, "text"):
        ranked_by = text.embedding if reader is clip else read_texts(clip, prompts).embedding
    picture = None
    if image is not None and decoder.reads_image:
        small = shrink(image, max(clip.image_size))
        picture = clip.embed_image(to_unit([small]))  # 1, D
        said = torch.tensor([bool(prompt) for prompt in prompts], device=picture.device)
        ranked_by = None if ranked_by is None else torch.where(said[:, None], ranked_by, picture)
    return EncodedPrompts(text, null, ranked_by, picture, mean_coloured(clip) if decoder.null_picture else None)


def mean_coloured(clip: CLIP) -> Tensor:
    """CLIP's embedding (1, D) of a picture of its mean colour: all zeros for its image tower."""
    mean = torch.tensor(clip.config["image_mean"], dtype=torch.float32)
    return clip.embed_image(mean[None, :, None, None].expand(1, 3, *clip.image_size))


def read_texts(reader: Any, texts: Sequence[str]) -> TextEncoding:
    """Texts -> the encoding of as much of each as a part can read."""
    return encode_texts(reader, [request.shorten(text, reader.tokenizer, reader.context_length) for text in texts])


def encode_texts(reader: Any, texts: Sequence[str]) -> TextEncoding:
    """Texts that a part can read whole -> their encoding, one by one, since a batch of several rounds differently."""
    encoded = [reader.encode_text([text]) for text in texts]
    embedding, states, mask = ([getattr(each, name) for each in encoded] for name in ("embedding", "states", "mask"))
    return TextEncoding(torch.cat(embedding), torch.cat(states), torch.cat(mask))


def check_fit(clip: CLIP | None, decoder: PictureDecoder, prior: Prior | None) -> None:
    """Raises InputError where decoder or prior were made for another CLIP than this one, or cannot do without one."""
    if text_reader(clip, decoder) is None or (prior is not None and not has_tower(clip, "text")):
        raise InputError("The decoder and the prior read CLIP's text, and these parts have no CLIP text tower.")
    if decoder.null_picture and not has_tower(clip, "image"):
        raise InputError("The decoder is led away from CLIP's empty picture, and these parts have no CLIP image tower.")
    if clip is None:
        return
    text = clip.config["architecture"]["text_cfg"]
    given = {"clip_width": clip.embedding_dim, "embedding_dim": clip.embedding_dim, "text_width": text.get("width")}
    parts: dict[str, Any] = {"prior": prior, "decoder": decoder if text_reader(clip, decoder) is clip else None}
    present = {part: model.config for part, model in parts.items() if model is not None}
    for part, config in present.items():
        wanted = {name: config[name] for name in given if config.get(name) is not None}
        if any(given[name] != width for name, width in wanted.items()):
            width = config.get("clip_width") or config.get("embedding_dim")
            raise InputError(
                f"The {part} reads embeddings of width {width} and text states of width {config.get('text_width')}, "
                f"this CLIP gives {clip.embedding_dim} and {text.get('width')}; take both from one family."
            )
    if prior is not None and prior.config.text_length < clip.context_length:
        raise InputError(
            f"The prior reads {prior.config.text_length} text positions, this CLIP gives {clip.context_length}; take "
            "both from one family."
        )
    known = {part: config["clip_identity"] for part, config in present.items() if config.get("clip_identity")}
    if known and clip.dtype in (torch.float32, torch.float16):  # bfloat16 has lost what the identity is made of
        identity = weights_identity(clip)
        for part, expected in known.items():
            if expected != identity:
                raise InputError(
                    f"The {part} was trained beside another CLIP (identity {expected[:12]}, this one has "
                    f"{identity[:12]}); take both from one family."
                )
