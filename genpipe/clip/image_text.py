"""Image-text classification: one label for a picture and a text together, by three heads on one CLIP (2103.00020).

`SumClassifier` adds the two pooled embeddings and compares the sum with class prompts, as zero-shot classification does
(section 3.1.2); `MLPClassifier` and `TransformerClassifier` learn from pooled embeddings and from token states.

Legend: B pairs, C classes, D embedding width, P patches, L text positions, W tower width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from genpipe.clip.model import CLIP
from genpipe.clip.zero_shot import ClassifiedFiles, build_classifier, label_files
from genpipe.data.labelled import check_class_names
from genpipe.errors import InputError
from genpipe.identity import weights_identity
from genpipe.json_files import peek_json
from genpipe.parts import CONFIG_NAME, load_part, save_part
from genpipe.tokenizer import TokenBatch

CLIP_FOLDER = "clip"  # inside a head's folder: the CLIP that was fine-tuned with it


class PairFeatures(NamedTuple):
    """What CLIP makes of B pictures and their texts.

    image_embedding, text_embedding: (B, D) float32 of length 1; image_states (B, P, W) and text_states (B, L, W') with
    text_mask (B, L), True where there is text: None unless asked for.
    """

    image_embedding: Tensor
    text_embedding: Tensor
    image_states: Tensor | None = None
    text_states: Tensor | None = None
    text_mask: Tensor | None = None


def encode_pairs(clip: CLIP, pixels: Tensor, texts: Sequence[str] | TokenBatch, states: bool = True) -> PairFeatures:
    """Pixels (B, 3, H, W) in [0, 1] and B texts, or their tokens -> PairFeatures; differentiable in CLIP's weights.

    Raises InputError for pixels outside [0, 1], another number of texts, and, with `states`, a CLIP without any.
    """
    count = len(texts.ids) if isinstance(texts, TokenBatch) else len(texts)
    if isinstance(texts, str) or len(pixels) != count:
        raise InputError(f"{len(pixels)} pictures need as many texts, in a list; got {count}.")
    text = clip.encode_text(texts if isinstance(texts, TokenBatch) else list(texts))
    if not states:
        clip.check_range(pixels)
        image_embedding = F.normalize(clip.embed_image(pixels).float(), dim=-1)
        return PairFeatures(image_embedding, text.normalized)
    image = clip.encode_image(pixels)
    return PairFeatures(image.normalized, text.normalized, image.states, text.states, text.mask)


class PairHead(ModelMixin, ConfigMixin):
    """What the three heads share: names of the classes, and the identity of the CLIP whose features they read.

    Every head turns PairFeatures into logits (B, C) and has `names` and `clip_identity` in its config; reads_states
    says whether it needs the states.
    """

    reads_states = False

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of the outputs."""
        return tuple(self.config["names"])

    def check_clip(self, clip: CLIP) -> None:
        """Raise InputError unless `clip` is the one that this head was made with."""
        if weights_identity(clip) != self.config["clip_identity"]:
            raise InputError(
                f"This {type(self).__name__} was made with another CLIP; choose that one, or train the head anew."
            )


class SumClassifier(PairHead):
    """Both embeddings added and brought to length 1, then compared with one direction per class.

    Arguments (all stored in config.json):
        names: the classes, at least two, in the order of the outputs; clip_identity: weights_identity of the CLIP.
        embedding_dim: D. logit_scale: the CLIP's own, exponentiated and clipped.
        linear: False compares with `weights` (C, D), the embeddings of class prompts (see `build_sum_classifier`), and
            needs no training; True has a linear layer in their place, to be trained.
    """

    @register_to_config
    def __init__(
        self, names: Sequence[str], clip_identity: str, embedding_dim: int, logit_scale: float, linear: bool = False
    ) -> None:
        super().__init__()
        checked = check_class_names(names)
        self.register_to_config(names=list(checked))
        self.weights: Tensor
        self.layer: nn.Linear | None = nn.Linear(embedding_dim, len(checked)) if linear else None
        if not linear:
            self.register_buffer("weights", torch.zeros(len(checked), embedding_dim))

    def forward(self, pairs: PairFeatures) -> Tensor:
        """PairFeatures -> logits (B, C)."""
        total = F.normalize(pairs.image_embedding + pairs.text_embedding, dim=-1)  # B, D
        if self.layer is not None:
            return self.layer(_unit_variance(total))
        return self.config["logit_scale"] * total @ self.weights.T


class MLPClassifier(PairHead):
    """Both embeddings side by side through one hidden layer.

    Arguments beside those of SumClassifier: width of the hidden layer; dropout behind it, while training.
    """

    @register_to_config
    def __init__(
        self, names: Sequence[str], clip_identity: str, embedding_dim: int, width: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        checked = check_class_names(names)
        self.register_to_config(names=list(checked))
        self.layers = nn.Sequential(
            nn.Linear(2 * embedding_dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, len(checked))
        )

    def forward(self, pairs: PairFeatures) -> Tensor:
        """PairFeatures -> logits (B, C)."""
        both = torch.cat([_unit_variance(pairs.image_embedding), _unit_variance(pairs.text_embedding)], dim=-1)
        return self.layers(both)  # B, C


class TransformerClassifier(PairHead):
    """A classification token, all patch states and all text states through a small transformer (pre-norm, GELU).

    Each kind of state has a projection and a modality embedding of its own; padding is masked. States carry their place
    already: CLIP's towers added it.

    Arguments beside those of SumClassifier: image_width, text_width: W of the two towers; width, num_layers, num_heads,
    dropout: of the transformer.
    """

    reads_states = True

    @register_to_config
    def __init__(
        self,
        names: Sequence[str],
        clip_identity: str,
        image_width: int,
        text_width: int,
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        checked = check_class_names(names)
        self.register_to_config(names=list(checked))
        self.image_projection = nn.Linear(image_width, width)
        self.text_projection = nn.Linear(text_width, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(width))
        self.modality = nn.Parameter(0.02 * torch.randn(2, width))
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.classes = nn.Linear(width, len(checked))

    def forward(self, pairs: PairFeatures) -> Tensor:
        """PairFeatures with states -> logits (B, C). Raises InputError where the states are missing."""
        if pairs.image_states is None or pairs.text_states is None or pairs.text_mask is None:
            raise InputError("A TransformerClassifier reads token states; encode the pairs with states=True.")
        length = int(pairs.text_mask.any(dim=0).nonzero().max()) + 1  # behind it all is padding
        mask = pairs.text_mask[:, :length]
        image = self.image_projection(pairs.image_states) + self.modality[0]  # B, P, W
        text = self.text_projection(pairs.text_states[:, :length]) + self.modality[1]  # B, L, W
        start = self.class_token.to(image.dtype).expand(len(image), 1, -1)
        x = torch.cat([start, image, text], dim=1)  # B, 1 + P + L, W
        padding = torch.cat([mask.new_zeros(image.shape[0], 1 + image.shape[1]), ~mask], dim=1)
        return self.classes(self.blocks(x, src_key_padding_mask=padding)[:, 0])


HEADS: dict[str, type[PairHead]] = {"sum": SumClassifier, "mlp": MLPClassifier, "transformer": TransformerClassifier}


def _unit_variance(embedding: Tensor) -> Tensor:
    """Embeddings of length 1 -> coordinates of mean square 1, which is what layers are initialised for."""
    return embedding * embedding.shape[-1] ** 0.5


def build_head(kind: str, clip: CLIP, names: Sequence[str], **settings: Any) -> PairHead:
    """A new head of HEADS for `clip`, its sizes taken from it; `settings` are constructor arguments.

    A SumClassifier without a linear layer comes ready: see `build_sum_classifier`.
    """
    given: dict[str, Any] = {"names": list(names), "clip_identity": weights_identity(clip), **settings}
    if kind == "sum" and not settings.get("linear", False):
        return build_sum_classifier(clip, names)
    if kind == "sum":
        scale = float(clip.clipped_logit_scale().detach())
        return SumClassifier(**given, embedding_dim=clip.embedding_dim, logit_scale=scale)
    if kind == "mlp":
        return MLPClassifier(**given, embedding_dim=clip.embedding_dim)
    with torch.no_grad():
        pairs = encode_pairs(clip, torch.zeros(1, 3, *clip.image_size), [""])
    assert pairs.image_states is not None and pairs.text_states is not None
    widths = {"image_width": pairs.image_states.shape[-1], "text_width": pairs.text_states.shape[-1]}
    return TransformerClassifier(**given, **widths)


def build_sum_classifier(clip: CLIP, names: Sequence[str], templates: str | Sequence[str] = "plain") -> SumClassifier:
    """A SumClassifier that needs no training: its directions are those of the zero-shot classifier of these classes.

    Raises InputError for names and templates that `build_classifier` refuses.
    """
    zero_shot = build_classifier(clip, names, templates)
    scale, identity = float(zero_shot.config["logit_scale"]), zero_shot.config["clip_identity"]
    head = SumClassifier(list(zero_shot.names), identity, clip.embedding_dim, scale)
    head.weights = zero_shot.weights.clone()
    return head.to(clip.device).eval()


class ImageTextClassifier(nn.Module):
    """A head and its CLIP. Raises InputError if the head was made with another one.

    Saved with `save_pretrained`, by way of genpipe.parts.save_part, the CLIP lies beside the head, in its folder: so it
    is where both were trained. A head on a CLIP as it was before is saved alone.
    """

    def __init__(self, clip: CLIP, head: PairHead) -> None:
        super().__init__()
        head.check_clip(clip)
        self.clip, self.head = clip, head

    @property
    def tokenizer(self) -> Any:
        """The CLIP's."""
        return self.clip.tokenizer

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], ids and mask (B, L) -> logits (B, C)."""
        return self.head(encode_pairs(self.clip, pixels, TokenBatch(ids, mask), self.head.reads_states))

    @torch.no_grad()
    def probabilities(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] and B texts -> (B, C), rows that add up to 1.

        A text longer than the context is cut, and that is said once. Raises FloatingPointError for broken numbers.
        """
        logits = self.head(encode_pairs(self.clip, pixels, texts, self.head.reads_states)).float()
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the head's logits are not finite; its weights are damaged.")
        return logits.softmax(dim=-1)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """The head as diffusers saves it, with the identity that its CLIP has now, and the CLIP in a folder inside."""
        self.head.register_to_config(clip_identity=weights_identity(self.clip))
        self.head.save_pretrained(save_directory, **kwargs)
        save_part(self.clip, Path(save_directory) / CLIP_FOLDER)


def classify_files_with_text(
    classifier: ImageTextClassifier,
    paths: Sequence[str | os.PathLike[str]],
    text: str,
    top: int = 5,
    chunk_size: int = 32,
    report: Callable[[int, int], None] | None = None,
) -> ClassifiedFiles:
    """The `top` likeliest classes of each picture in `paths` (files, or folders of them) together with `text`.

    Skips, reports and raises as genpipe.clip.zero_shot.classify_files does.
    """

    def predict(pictures: Iterator[Tensor]) -> Iterator[Tensor]:
        while pixels := list(islice(pictures, chunk_size)):
            yield classifier.probabilities(torch.stack(pixels), [text] * len(pixels))

    return label_files(classifier.clip, paths, classifier.head.names, predict, top, report)


def load_head(folder: str | os.PathLike[str]) -> PairHead:
    """A head of any kind, in eval mode. Raises InputError, one sentence, for what `load_part` refuses."""
    kind = peek_json(Path(folder) / CONFIG_NAME).get("_class_name")
    cls = next((head for head in HEADS.values() if head.__name__ == kind), None)
    if cls is None:
        raise InputError(f"{str(folder)!r} is not the folder of an image-text head; train one with image-text.")
    head = load_part(cls, folder)
    if not all(bool(tensor.isfinite().all()) for tensor in head.state_dict().values()):
        raise InputError(f"The weights in {str(folder)!r} are not finite, they are damaged; train the head anew.")
    return head


def has_own_clip(folder: str | os.PathLike[str]) -> bool:
    """Whether a head's folder holds the CLIP that was fine-tuned with it."""
    return (Path(folder) / CLIP_FOLDER).is_dir()


def load_image_text_classifier(folder: str | os.PathLike[str], clip: CLIP | None = None) -> ImageTextClassifier:
    """A saved head with its CLIP: the one in the head's folder, or the given one, which must be the one it read.

    Raises InputError for damaged folders, another CLIP, and where a CLIP is missing or given without need.
    """
    head = load_head(folder)
    if has_own_clip(folder):
        if clip is not None:
            raise InputError(f"The head in {str(folder)!r} has a CLIP of its own, tuned with it; give no other.")
        clip = load_part(CLIP, Path(folder) / CLIP_FOLDER)
    if clip is None:
        raise InputError(f"The head in {str(folder)!r} needs the CLIP that it was trained beside; give that, too.")
    return ImageTextClassifier(clip, head.to(clip.device)).eval()
