"""The recipe that every PNG carries: everything needed to draw the picture again, and the drawing again.

A recipe may come from a stranger's file. Its values are checked like anything typed by a person, and the family it
names is looked up among the shipped ones only: a picture must not make genpipe read a folder or fetch a Hub id.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

import genpipe
from genpipe.errors import InputError
from pipelines import request
from pipelines.family import Family, FamilyInfo, check_pipeline, describe_family, shipped_families
from pipelines.settings import PICTURE_MODE, DALLE1Sampling, DALLE2Sampling, sampling_of

MAX_NEIGHBOURS = 4096  # candidates that are drawn along, where a candidate alone does not come out the same


@dataclass(frozen=True)
class Recipe:
    """One picture: candidate `seed` of the call that drew `candidates` pictures of `prompt` from `first_seed` on."""

    pipeline: str
    family: str
    family_hash: str
    prompt: str
    seed: int
    score: float | None  # None: it was not ranked
    first_seed: int
    candidates: int
    settings: dict[str, Any]  # the pipeline's sampling, field by field
    device: str  # kind of device, as torch names it
    threads: int
    version: str
    image: str | None = None  # identity of the picture whose embedding it was drawn from, or whose holes were filled
    fill: str | None = None  # and that of their mask

    @property
    def sampling(self) -> Any:
        """The settings as the pipeline takes them."""
        return sampling_of(self.pipeline, {"upsample": False, **self.settings})  # old recipes do not mention it

    def check_image(self, image: Image.Image | None, fill: Image.Image | None = None) -> None:
        """Raises InputError unless this is the picture that the recipe was drawn from, or None where there was none.

        The same for the mask of its holes, `fill`.
        """
        if self.image is None and image is not None:
            raise InputError("The picture was drawn from a prompt alone; leave --image out.")
        if self.image is not None and image is None:
            raise InputError("The picture was drawn from another picture; give that one with --image.")
        if image is not None and identity_of(image) != self.image:
            raise InputError("The picture was drawn from another one than that of --image; give the right one.")
        if (self.fill is None) != (fill is None):
            raise InputError(
                "The picture was drawn into no holes; leave --fill out."
                if self.fill is None
                else "The picture was drawn into holes of another one; give their mask with --fill."
            )
        if fill is not None and identity_of(fill) != self.fill:
            raise InputError("The picture was drawn into other holes than those of --fill; give the right mask.")

    def to_json(self) -> dict[str, Any]:
        """As written into the PNG."""
        return {
            "genpipe": self.version,
            "pipeline": self.pipeline,
            "family": {"name": self.family, "hash": self.family_hash},
            "prompt": self.prompt,
            "seed": self.seed,
            "score": None if self.score is None else round(self.score, 6),
            "call": {"first_seed": self.first_seed, "candidates": self.candidates},
            "settings": self.settings,
            **({"image": self.image} if self.image is not None else {}),
            **({"fill": self.fill} if self.fill is not None else {}),
            "machine": {"device": self.device, "threads": self.threads},
        }

    @classmethod
    def from_json(cls, recipe: dict[str, Any], source: str) -> "Recipe":
        """Read what `to_json` wrote. Raises InputError that names `source` for anything missing or out of range."""
        if "pictures" in recipe:
            raise InputError(f"{source} is a grid of several pictures; give one of them: {_names(recipe['pictures'])}.")
        try:
            read = cls(
                pipeline=_text(recipe["pipeline"], r"\w{1,20}"),
                family=_text(recipe["family"]["name"], r"\w[\w. -]{0,95}"),
                family_hash=_text(recipe["family"]["hash"], r"[0-9a-f]{12}"),
                prompt=recipe["prompt"],
                seed=recipe["seed"],
                score=recipe["score"],
                first_seed=recipe["call"]["first_seed"],
                candidates=recipe["call"]["candidates"],
                settings=recipe["settings"],
                device=_text(recipe["machine"]["device"], r"[a-z]{1,20}"),
                threads=recipe["machine"]["threads"],
                version=_text(recipe["genpipe"], r"[\w.+-]{1,40}"),
                image=None if recipe.get("image") is None else _text(recipe["image"], r"[0-9a-f]{64}"),
                fill=None if recipe.get("fill") is None else _text(recipe["fill"], r"[0-9a-f]{64}"),
            )
            read._check()
        except (KeyError, TypeError, ValueError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise InputError(f"The recipe in {source} cannot be used: {what}.") from error
        return read

    def _check(self) -> None:
        check_pipeline(self.pipeline)
        if self.image is None or self.prompt != "":
            request.check_prompts(self.prompt)
        request.check_counts(self.candidates, 1, self.first_seed, None)
        request.check_counts(1, 1, self.seed, None)
        if not 0 <= self.seed - self.first_seed < self.candidates:
            raise InputError("its seed is not one of its call's candidates")
        if not isinstance(self.settings, dict):
            raise InputError("its settings are no object")
        from_picture = getattr(self.sampling, "mode", None) == PICTURE_MODE
        if (from_picture or self.fill is not None) != (self.image is not None) or (from_picture and self.fill):
            raise InputError("it tells of a given picture and of none")
        request.check_positive("The number of threads", self.threads)
        if self.score is not None and not request.is_finite(self.score):
            raise InputError("its score is not a number")


def _text(value: Any, pattern: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise InputError(f"{str(value)[:60]!r} stands where a text of another form belongs")
    return value


def _names(pictures: Any) -> str:
    names = pictures if isinstance(pictures, list) else []
    return ", ".join(re.sub(r"[^\w.-]", "?", str(name))[:40] for name in names[:8]) or "none is named"


def recipe_of_call(
    family: Family,
    pipeline: str,
    sampling: DALLE1Sampling | DALLE2Sampling,
    prompt: str,
    first_seed: int,
    candidates: int,
    image: Image.Image | None = None,
    fill: Image.Image | None = None,
) -> Recipe:
    """The recipe of a call's first candidate; `dataclasses.replace` its seed and score for the others.

    sampling: resolved, see `resolve_sampling` of the pipelines. image, fill: the pictures that were given to the call.
    """
    import torch

    return Recipe(
        pipeline=pipeline,
        family=family.name,
        family_hash=family.hash_of(pipeline, bool(sampling.upsample)),
        prompt=prompt,
        seed=first_seed,
        score=None,
        first_seed=first_seed,
        candidates=candidates,
        settings=asdict(sampling),
        device=family.pipeline(pipeline).computes_on.type,
        threads=torch.get_num_threads(),
        version=genpipe.__version__,
        image=None if image is None else identity_of(image),
        fill=None if fill is None else identity_of(fill),
    )


def identity_of(image: Image.Image) -> str:
    """SHA-256 in hex over size and RGB pixels: the same for any file format that loses nothing."""
    from genpipe.images import flatten

    pixels = flatten(image)
    return hashlib.sha256(f"{pixels.width}x{pixels.height} RGB\n".encode() + pixels.tobytes()).hexdigest()


def family_of(recipe: Recipe, given: str | None) -> FamilyInfo:
    """The family a recipe was drawn with, or the `given` one. Raises InputError where its weights are not the same."""
    if given is None and recipe.family not in shipped_families():
        raise InputError(
            f"The picture was drawn with the family {recipe.family!r}, which does not come with genpipe; "
            "say where it lies with --family."
        )
    described = describe_family(given or recipe.family)
    described.check_has(recipe.pipeline)
    present = described.hash_of(recipe.pipeline, bool(recipe.sampling.upsample))
    if present != recipe.family_hash:
        raise InputError(
            f"The picture was drawn with weights of hash {recipe.family_hash} and those of the family "
            f"{described.name!r} here have {present}; give the folder of the same version with --family."
        )
    return described


def redraw(
    family: Family,
    recipe: Recipe,
    original: Image.Image,
    image: Image.Image | None = None,
    fill: Image.Image | None = None,
) -> tuple[Image.Image, bool]:
    """Draw a recipe's picture again. Returns it, and whether every pixel equals the original's.

    image, fill: the picture that it was drawn from and its mask, checked by `Recipe.check_image`.

    The candidate is drawn alone first. Matrix products of another batch size may round differently, and now and then
    that moves a token: then the whole call is drawn again as it was.
    """
    pipeline: Any = family.pipeline(recipe.pipeline)
    attempts = [(recipe.seed, 1)]
    if 1 < recipe.candidates <= MAX_NEIGHBOURS:
        attempts.append((recipe.first_seed, recipe.candidates))
    pictures = {"image": image, "fill": fill}
    extra = {name: picture for name, picture in pictures.items() if picture is not None}
    for first_seed, candidates in attempts:
        output = pipeline(recipe.prompt, candidates, candidates, first_seed, sampling=recipe.sampling, **extra)
        picture = output.images[0][output.seeds[0].index(recipe.seed)]
        if same_pixels(picture, original):
            return picture, True
    return picture, False


def same_pixels(first: Image.Image, second: Image.Image) -> bool:
    """Whether two RGB pictures have the same size and the same value in every pixel."""
    return first.size == second.size and np.array_equal(np.asarray(first), np.asarray(second))
