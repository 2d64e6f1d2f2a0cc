"""What DALL-E 2's parts are told about a call: texts and a picture as the shared CLIP encodes them (2204.06125, 2).

Legend: B prompts, L text positions, D CLIP width, W width of its text states.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.dalle2.decoder import Decoder
from genpipe.dalle2.prior import Prior
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.images import shrink, to_unit
from pipelines import request


@dataclass(frozen=True)
class TextEncoding:
    """Of CLIP, for B prompts: embedding (B, D), states (B, L, W), mask (B, L); constant over the steps of a drawing."""

    embedding: Tensor
    states: Tensor
    mask: Tensor

    def rows(self, index: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The three of some prompts, also of one prompt several times."""
        chosen = list(index)
        return self.embedding[chosen], self.states[chosen], self.mask[chosen]


@dataclass(frozen=True)
class EncodedPrompts:
    """What a call is about: B texts; the null text (one row) of guidance; what pictures are ranked against (B, D).

    picture: the embedding (1, D) of a picture that was given in place of the prior, or None.
    """

    text: TextEncoding
    null: TextEncoding
    ranked_by: Tensor
    picture: Tensor | None


def encode_prompts(
    clip: CLIP, prompts: Sequence[str], negative_prompt: str = "", image: Image.Image | None = None
) -> EncodedPrompts:
    """Clean prompts, which may be empty beside an image -> what CLIP says; warns of prompts that are too long."""
    read = [request.shorten(text, clip.tokenizer, clip.context_length) for text in (*prompts, negative_prompt)]
    for prompt, beginning in zip((*prompts, negative_prompt), read, strict=True):
        request.warn_of_cut_prompt(prompt, beginning)
    text, null, picture = encode_texts(clip, read[:-1]), encode_texts(clip, read[-1:]), None
    ranked_by = text.embedding
    if image is not None:
        small = shrink(image, max(clip.image_size))
        picture = clip.embed_image(to_unit([small]).to(clip.device))  # 1, D
        said = torch.tensor([bool(prompt) for prompt in prompts], device=picture.device)
        ranked_by = torch.where(said[:, None], ranked_by, picture)
    return EncodedPrompts(text, null, ranked_by, picture)


def encode_texts(clip: CLIP, texts: Sequence[str]) -> TextEncoding:
    """Texts that CLIP can read whole -> their encoding, one by one, since a batch of several rounds differently.

    Raises InputError for a CLIP that gives no text states.
    """
    encoded = [clip.encode_text([text]) for text in texts]
    states = [each.states for each in encoded if each.states is not None]
    if len(states) < len(encoded):
        raise InputError(
            "This CLIP gives no text states, which the decoder reads; take one with open_clip's own tower."
        )
    return TextEncoding(
        torch.cat([each.embedding for each in encoded]), torch.cat(states), torch.cat([each.mask for each in encoded])
    )


def check_fit(clip: CLIP, decoder: Decoder, prior: Prior | None) -> None:
    """Raises InputError where decoder or prior were made for another CLIP than this one."""
    text = clip.config["architecture"]["text_cfg"]
    wanted = {"decoder": (decoder.config.clip_width, decoder.config.text_width)}
    if prior is not None:
        wanted["prior"] = (prior.config.embedding_dim, prior.config.text_width)
    for part, widths in wanted.items():
        if widths != (clip.embedding_dim, text.get("width")):
            raise InputError(
                f"The {part} reads embeddings of width {widths[0]} and text states of width {widths[1]}, this CLIP "
                f"gives {clip.embedding_dim} and {text.get('width')}; take both from one family."
            )
    if prior is not None and prior.config.text_length < clip.context_length:
        raise InputError(
            f"The prior reads {prior.config.text_length} text positions, this CLIP gives {clip.context_length}; take "
            "both from one family."
        )
    identities = {"decoder": decoder.config.clip_identity, "prior": prior and prior.config.clip_identity}
    known = {part: identity for part, identity in identities.items() if identity is not None}
    if known and clip.dtype in (torch.float32, torch.float16):  # bfloat16 has lost what the identity is made of
        present = weights_identity(clip)
        for part, identity in known.items():
            if identity != present:
                raise InputError(
                    f"The {part} was trained beside another CLIP (identity {identity[:12]}, this one has "
                    f"{present[:12]}); take both from one family."
                )
