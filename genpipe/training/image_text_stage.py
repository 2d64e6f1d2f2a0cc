"""The stage of image-text classification: a head over a frozen CLIP, or head and CLIP together.

Legend: B pairs, C classes, L text positions.
"""

import re
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import genpipe
from genpipe.clip.image_text import (
    CLIP_FOLDER,
    ImageTextClassifier,
    build_head,
    encode_pairs,
    has_own_clip,
    load_head,
)
from genpipe.clip.model import CLIP
from genpipe.clip.retrieval import fit_for_clip
from genpipe.data.labelled_pairs import LabelledPairs
from genpipe.data.samples import Report
from genpipe.errors import InputError
from genpipe.evaluation.image_text import PairTable, classify_pairs, inverse_frequencies, label_figures, tabulate
from genpipe.images import make_grid, to_pil
from genpipe.parts import load_part
from genpipe.published.clip import read_clip
from genpipe.tokenizer import TokenBatch
from genpipe.training.config import Recipe
from genpipe.training.data import Batch
from genpipe.training.early_stopping import EarlyStopping
from genpipe.training.stage import Logs, Stage, build

# Settings of `model` that each kind of head takes.
HEAD_SETTINGS = {
    "sum": ("linear",),
    "mlp": ("width", "dropout"),
    "transformer": ("width", "num_layers", "num_heads", "dropout"),
}


class PairBatches:
    """Batches of labelled pairs by number; every epoch is a new permutation of `rows`.

    A batch holds "label" (B,) and "place" (B,), which counts `rows`; unless `places_alone`, also "pixels" (B, 3, H, W),
    "ids" and "mask" (B, L). A broken picture's place is taken by the pair behind it, label and all.
    """

    def __init__(
        self, clip: CLIP, pairs: LabelledPairs, rows: list[int], batch_size: int, seed: int, places_alone: bool
    ) -> None:
        self.clip, self.pairs, self.rows = clip, pairs, rows
        self.batch_size, self.seed, self.places_alone = batch_size, seed, places_alone
        self.left_out = pairs.left_out

    @property
    def report(self) -> Report:
        """What was read in this process."""
        return self.pairs.report()

    def __getitem__(self, number: int) -> Batch:
        first = number * self.batch_size
        places = [self._place(position) for position in range(first, first + self.batch_size)]
        batch = {"place": torch.tensor(places)}
        if self.places_alone:
            return batch
        found = [self.pairs[self.rows[place]] for place in places]
        tokens = self.clip.tokenize([pair.text for pair in found])
        batch["label"] = torch.tensor([pair.label for pair in found])
        batch["pixels"] = torch.stack([fit_for_clip(self.clip, pair.picture) for pair in found])
        return {**batch, "ids": tokens.ids, "mask": tokens.mask}

    def _place(self, position: int) -> int:
        epoch, place = divmod(position, len(self.rows))
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, order = epoch, np.random.default_rng((self.seed, 2, epoch))
            self._permutation = order.permutation(len(self.rows))
        return self._permutation


class ImageTextStage(Stage):
    """Cross-entropy of the label, weighted by class if asked for.

    With objective.tune the CLIP learns with the head: the top layers of its towers at objective.tower_rate of the
    learning rate, every layer further down at objective.layer_decay of the one above it. Without, what CLIP makes of
    the pairs is computed once, if it fits in objective.cache_megabytes.
    """

    part = "head"

    def __init__(self, recipe: Recipe, resumed: Path | None) -> None:
        self.objective, self.data = recipe.objective, recipe.data
        self.batch_size = recipe.run.batch_size
        _check(recipe)
        clip = load_starting_clip(self.objective["clip"], recipe.init)
        head = load_head(recipe.init) if recipe.init else None
        self.pairs = LabelledPairs(self.data.source, names=None if head is None else head.names)
        if head is None:
            kind = self.objective["head"]
            settings = {key: recipe.model[key] for key in HEAD_SETTINGS[kind]}
            head = build(build_head, {"kind": kind, "clip": clip, "names": self.pairs.names, **settings})
        self.tune = self.objective["tune"]
        if not self.tune and not any(parameter.requires_grad for parameter in head.parameters()):
            raise InputError(
                "a sum head without a linear layer on a frozen CLIP has nothing to learn; set model.linear=true or "
                "objective.tune=true."
            )
        self.classifier = ImageTextClassifier(clip, head)
        self.model: nn.Module
        if self.tune:
            self.model = self.classifier
            freeze_unused(self.classifier)
        else:
            self.model = head
            clip.requires_grad_(False).eval()
        self._split(recipe.data.validation)

    def _split(self, validation: str) -> None:
        """The pairs to train on, and those to validate on: data.validation's, or a share of every class."""
        labels = np.array(self.pairs.labels)
        if validation:
            self.held, self.held_rows = LabelledPairs(validation, names=self.pairs.names), None
            self.rows = list(range(len(labels)))
        else:
            self.held = self.pairs
            held = held_out(labels, self.objective["validation_share"], self.data.seed)
            self.rows = np.flatnonzero(~held).tolist()
            self.held_rows = np.flatnonzero(held).tolist()
            if not self.held_rows:
                raise InputError(
                    f"{len(labels)} pairs are too few to hold {self.objective['validation_share']:.0%} of each class "
                    "back for validation; name other pairs with data.validation."
                )
        self.weights = None
        if self.objective["class_weights"] == "inverse_frequency":
            self.weights = inverse_frequencies((self.pairs.labels[row] for row in self.rows), len(self.pairs.names))

    # what the loop asks for -------------------------------------------------------------------------------------------

    def frozen(self) -> list[nn.Module]:
        return [] if self.tune else [self.classifier.clip]

    def batches(self) -> PairBatches:
        clip, seed = self.classifier.clip, self.data.seed
        return PairBatches(clip, self.pairs, self.rows, self.batch_size, seed, places_alone=self.is_cached)

    def rates(self) -> dict[str, float]:
        if not self.tune:
            return {}
        top, decay = self.objective["tower_rate"], self.objective["layer_decay"]
        return {f"clip.{name}": top * decay**depth for name, depth in tower_depths(self.classifier.clip).items()}

    def early_stopping(self) -> EarlyStopping:
        return EarlyStopping("heldout_loss", self.objective["patience"])

    def collate(self, pictures: np.ndarray, captions: list[str], generator: np.random.Generator) -> Batch:
        raise NotImplementedError("pairs with labels come from batches()")

    def loss(self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Logs]:
        device = batch["place"].device
        if self.is_cached:
            places = batch["place"].cpu()
            labels = self.table.labels[places].to(device)
            logits = model(self.table.at(places, device))
        elif self.tune:
            labels, logits = batch["label"], model(batch["pixels"], batch["ids"], batch["mask"])
        else:
            labels, tokens = batch["label"], TokenBatch(batch["ids"], batch["mask"])
            with torch.no_grad():
                states = self.classifier.head.reads_states
                pairs = encode_pairs(self.classifier.clip, batch["pixels"], tokens, states)
            logits = model(pairs)
        weights = None if self.weights is None else self.weights.to(device)
        loss = F.cross_entropy(logits.float(), labels, weight=weights)
        return loss, {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        logits, labels = self._held_out()
        return {f"heldout_{name}": value for name, value in label_figures(logits, labels, self.weights).items()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Sixteen validation pairs: picture, text, and the label that the head gives them."""
        rows = self._held_rows[:16]
        pairs = [self.held[row] for row in rows]
        clip, names = self.classifier.clip, self.classifier.head.names
        pixels = torch.stack([fit_for_clip(clip, pair.picture) for pair in pairs])
        likely = self.classifier.probabilities(pixels, [pair.text for pair in pairs]).max(dim=1)
        labels = [
            f"{pair.text}: {names[number]} ({value:.0%})"
            for pair, number, value in zip(pairs, likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]
        return make_grid(to_pil(pixels), columns=8, labels=labels, scale=max(1, 128 // pixels.shape[-1]))

    # features of a frozen CLIP ----------------------------------------------------------------------------------------

    @cached_property
    def is_cached(self) -> bool:
        """Whether the features of all pairs are kept."""
        if self.tune:
            return False
        pairs = self._tabulate(self.pairs, [0]).features
        size = sum(x.nbytes for x in pairs if x is not None)
        return size * (len(self.rows) + len(self._held_rows)) <= 1e6 * self.objective["cache_megabytes"]

    @cached_property
    def table(self) -> PairTable:
        """Features of the training pairs. In one order, so that a resumed run computes the same, bit for bit."""
        return self._tabulate(self.pairs, self.rows)

    @cached_property
    def held_table(self) -> PairTable:
        """Features of the validation pairs."""
        return self._tabulate(self.held, self._held_rows)

    @property
    def _held_rows(self) -> list[int]:
        return list(range(len(self.held))) if self.held_rows is None else self.held_rows

    def _tabulate(self, pairs: LabelledPairs, rows: list[int]) -> PairTable:
        return tabulate(self.classifier.clip, pairs, rows, self.classifier.head.reads_states)

    def _held_out(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n, C) and labels (n,) of the validation pairs."""
        if not self.is_cached:
            return classify_pairs(self.classifier, self.held, self._held_rows)
        device, table = self.classifier.clip.device, self.held_table
        chunks = torch.arange(len(table.labels)).split(256)
        logits = [self.classifier.head(table.at(places, device)).float().cpu() for places in chunks]
        return torch.cat(logits), table.labels


def _check(recipe: Recipe) -> None:
    objective, source = recipe.objective, recipe.data.source
    if source == "scenes" or recipe.data.validation == "scenes":
        raise InputError("image-text needs pictures with texts and labels; name a list or shards with --data FILE.")
    if recipe.data.crop != "centre":
        raise InputError(f'data.crop is "{recipe.data.crop}"; image-text reads pictures as CLIP does, with "centre".')
    if not recipe.data.validation and not objective["validation_share"]:
        raise InputError("image-text needs pairs to validate on; set objective.validation_share or data.validation.")


def load_starting_clip(name: str, init: str) -> CLIP:
    """The CLIP of an earlier head's folder `init`, if it has its own; else a family's folder or a shipped one's name, a
    folder or file of a CLIP, published ones too, or an open_clip model with its weights as in ViT-B-32:openai.
    """
    if init and has_own_clip(init):
        return load_part(CLIP, Path(init) / CLIP_FOLDER)
    shipped = Path(genpipe.__file__).parent / "families" / name
    for place in (Path(name), shipped):
        if name and place.exists():
            inside = place / CLIP_FOLDER
            return load_part(CLIP, inside) if inside.is_dir() else read_clip(place, torch.float32)
    model, separator, weights = name.partition(":")
    if not separator:
        raise InputError(
            f'there is no CLIP "{name}"; set objective.clip to a folder, a family, or an open_clip model and its '
            "weights as in ViT-B-32:openai."
        )
    return CLIP.from_open_clip(model, weights)


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which of the pairs, bool (n,), are kept from training: `share` of every class, rounded, never all of one."""
    held = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng((seed, 4))
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        held[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
    return held


_BLOCK = re.compile(r"\b(?:resblocks|blocks|layers?|stages)\.(\d+)\.|\blayer(\d+)\.")
_BELOW = re.compile(r"\b(conv1|conv2|conv3|bn1|bn2|bn3|ln_pre|class_embedding|positional_embedding|token_embedding|"
                    r"patch_embed|cls_token|pos_embed|embeddings|stem|cls_emb)\b")  # fmt: skip


def tower_depths(clip: CLIP) -> dict[str, int]:
    """Parameter name -> how many blocks of its tower lie above it: 0 for the last block and what follows it."""
    names = [name for name, _ in clip.named_parameters()]
    depths = {}
    for is_visual in (True, False):
        own = [name for name in names if name.startswith("towers.visual.") == is_visual]
        blocks = {name: int(found[1] or found[2]) for name in own if (found := _BLOCK.search(name))}
        top, bottom = max(blocks.values(), default=0), min(blocks.values(), default=0)
        for name in own:
            below = _BELOW.search(name) is not None and "attnpool" not in name
            depths[name] = top - blocks[name] if name in blocks else (top - bottom + 1 if below else 0)
    return depths


def freeze_unused(classifier: ImageTextClassifier) -> None:
    """Take what the head does not look at, such as CLIP's temperature, out of training: nothing would reach it."""
    classifier.eval()
    tokens = classifier.clip.tokenize(["a picture"])
    pixels = torch.zeros(1, 3, *classifier.clip.image_size)
    classifier(pixels, tokens.ids, tokens.mask).sum().backward()
    for parameter in classifier.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
