"""DALL-E 2 put together (2204.06125, 2): caption -> prior -> decoder -> upsampler, the best of many by CLIP.

Legend: B prompts, P of them in a block, n candidates per prompt, R rows of a block, L text positions, D CLIP width, W
width of its text states, H W pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.clip.noise_aware import NoiseAwareCLIP
from genpipe.dalle2.prior import Prior
from genpipe.dalle2.sampling import DECODER, Step, denoise, noise_of, scheduler_for
from genpipe.errors import InputError
from genpipe.images import to_pil
from pipelines import imagining, request
from pipelines.base import FamilyPipeline
from pipelines.candidates import Best, Block, Tracker, as_pictures, blocks, grey, in_blocks
from pipelines.encoding import EncodedPrompts, check_fit, encode_prompts
from pipelines.enlarging import Enlarging, upsampled
from pipelines.imagining import filled_up
from pipelines.protocols import Enlarger, PictureDecoder
from pipelines.request import Callback, GenerationOutput
from pipelines.settings import MODES, PICTURE_MODE, DALLE2Sampling, resolved, sampling_of, upsampling_of
from pipelines.steering import Filling, Steering, check_filling, check_guide

# Rows of a batch that is filled up where it is not full, so that a candidate is the same whatever ran beside it. On a
# processor also the size of a block: larger ones are no faster there.
ROWS_TOGETHER = 4
ACCELERATOR_PIXELS = 64 * 64 * 64  # of a block elsewhere: 64 rows of 64 x 64 pixels; halved where memory runs out
PRIOR_SHARE, DECODER_SHARE = 0.05, 0.5  # of drawing a candidate; the latter where it is upsampled before it is ranked

# What the steps of a call report to: stage, what part of the drawing it is (from, to), the step that was done
Report = Callable[[str, tuple[float, float], Step], None]


class DALLE2Pipeline(FamilyPipeline):
    """Prompts -> pictures, best first.

    Args:
        clip: encodes prompts and pictures, and ranks; may lack its image tower, or be None beside a decoder that has
            a text encoder of its own: then pictures come back in order, and no more are drawn than are kept.
        decoder: must have been trained beside this CLIP. Any class that does what pipelines.protocols says.
        prior: makes image embeddings from captions, trained beside the same CLIP; None: only the modes without it.
        upsampler: enlarges pictures, the same part as DALL-E 1's; None: they stay as they are.
        guide: a CLIP that knows noise, whose gradient can lead the decoder; trained on the decoder's noise.
        defaults: settings by name, fields of DALLE2Sampling, to use where a call leaves them out.
        family: name of the family the parts belong to, for messages.
        known_words: all words, lower case, of the captions that the parts were trained on; words of a prompt that are
            not among them are warned about. None: no warning.

    Pictures are ranked before they are upsampled where CLIP sees no more pixels than the decoder draws, so that only
    those that are kept need to be upsampled; otherwise all are upsampled first, and so they are where nothing is
    ranked, since all are kept.

    Raises InputError where the parts do not fit one another.
    """

    decoder: PictureDecoder
    prior: Prior | None
    upsampler: Enlarger | None
    guide: NoiseAwareCLIP | None

    _optional_components = ["clip", "prior", "upsampler", "guide"]
    model_cpu_offload_seq = "clip->prior->decoder->upsampler"

    def __init__(
        self,
        clip: CLIP | None,
        decoder: ModelMixin,
        prior: Prior | None = None,
        upsampler: ModelMixin | None = None,
        defaults: Mapping[str, Any] | None = None,
        family: str = "",
        known_words: Sequence[str] | None = None,
        guide: NoiseAwareCLIP | None = None,
    ) -> None:
        super().__init__()
        check_fit(clip, decoder, prior)
        if guide is not None:
            check_guide(guide, decoder)
        sampling_of("dalle2", defaults or {})
        self.register_modules(clip=clip, decoder=decoder, prior=prior, upsampler=upsampler, guide=guide)
        self.register_family(defaults, family, known_words)

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        num_candidates: int = 16,
        keep: int = 4,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        negative_prompt: str | None = None,
        mode: str | None = None,
        image: Image.Image | None = None,
        fill: Image.Image | None = None,
        sampling: DALLE2Sampling | None = None,
        chunk_size: int | None = None,
        callback: Callback | None = None,
    ) -> GenerationOutput:
        """Draw `num_candidates` pictures per prompt and return the best `keep` of each.

        Args:
            prompts: one or several; text beyond what CLIP reads is cut, with a warning. None with an `image` alone.
            seed: of the first candidate of every prompt; candidate i has seed + i and is the same picture whatever
                was drawn beside it.
            guidance_scale, num_inference_steps: of the decoder; None takes the pipeline's default. Guidance 1 is the
                conditional prediction alone.
            negative_prompt: what the pictures should be led away from.
            mode: where the image embedding comes from: "prior", "caption", "text"; see DALLE2Sampling.
            image: a picture whose embedding takes the prior's place. Without a prompt the text is dropped, as for the
                paper's variations (3.1), and the scores compare with this picture.
            fill: a mask of the `image`'s size, white where that is to be drawn anew and the rest of it kept; only for
                decoders that fill holes. Both are cut to the square in their middle.
            sampling: all settings at once, in place of the defaults; see `resolve_sampling`.
            chunk_size: candidates drawn at once; None chooses. Halved when memory runs out.
            callback: called with a `Progress` after every step; stops the call by returning True.
        Raises InputError for empty prompts and numbers out of range, FloatingPointError that names part and step where
            a part's output is not finite.
        """
        request.check_counts(num_candidates, keep, seed, chunk_size)
        given = {
            "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps,
            "negative_prompt": negative_prompt, "mode": mode,
        }  # fmt: skip
        sampling = self.resolve_sampling(given, sampling, image, fill)
        prompts = [""] if image is not None and not prompts else request.check_prompts(prompts or [])
        self.warn([*prompts, sampling.negative_prompt])
        encoded = self.encode_prompts(prompts, sampling.negative_prompt, None if fill is not None else image)
        filling = None if image is None or fill is None else Filling.of(image, fill, self.decoder.resolution_of_pixels)
        steering = Steering.of(self.guide, prompts, sampling.clip_guidance_scale, filling)
        num_candidates = num_candidates if self.ranks else keep

        first, enlarging = self.upsamples_first(sampling), Enlarging.of(self.upsampler, sampling, filling)
        best = Best(self.clip, encoded.ranked_by, len(prompts), keep, seed)
        tracker = Tracker(callback, len(prompts) * num_candidates, bool(sampling.upsample) and not first)

        def draw(block: Block, finished: int) -> None:
            report = self.reporter(tracker, block, finished)
            embedding = self.image_embeddings(encoded, block, seed, sampling, report)  # P, n, D, or None
            pixels = self.decode(encoded, embedding, block, seed, sampling, report, steering)  # P, n, 3, H, W
            best.rank(
                block, self.upsample(pixels, prompts, block, seed, enlarging, report) if enlarging and first else pixels
            )

        rows = chunk_size or self.rows_at_once()
        complete = in_blocks(draw, blocks(len(prompts), num_candidates, rows, ROWS_TOGETHER))
        output = best.output(prompts, complete)
        if enlarging is not None and not first:
            output = upsampled(output, enlarging, tracker, self.computes_on)
        self.maybe_free_model_hooks()
        return output

    def resolve_sampling(
        self,
        given: Mapping[str, Any] | None = None,
        sampling: DALLE2Sampling | None = None,
        image: Image.Image | None = None,
        fill: Image.Image | None = None,
    ) -> DALLE2Sampling:
        """What a call uses: settings that are given by name, the rest as in `sampling`, or without one the defaults.

        Raises InputError for numbers out of range, unknown names, parts that are asked for and not there, and a mode
        that does not go with the `image` and the `fill` of the call.
        """
        if fill is not None:
            check_filling(image, fill, self.decoder)
            image = None  # it is no embedding that is drawn from
        asked = (given or {}).get("mode") or (sampling.mode if sampling is not None else None)
        result = resolved("dalle2", given or {}, sampling, self.config.defaults)
        if image is not None and asked not in (None, PICTURE_MODE):
            raise InputError(f"A given picture takes the place of the prior; leave the mode {asked!r} out.")
        without_prior = "text" if self.decoder.reads_image else "caption"
        mode = PICTURE_MODE if image is not None else result.mode or ("prior" if self.prior else without_prior)
        if mode == PICTURE_MODE and not isinstance(image, Image.Image):
            raise InputError(f"The mode {PICTURE_MODE!r} needs a picture; give one, or choose from {', '.join(MODES)}.")
        if mode == "prior" and self.prior is None:
            raise InputError(f"These weights have no prior; choose the mode {without_prior!r}.")
        if not self.decoder.reads_image and mode != "caption":
            with_mask = "; to fill holes of a picture give a mask too" if self.decoder.fills and image else ""
            raise InputError(
                f"These weights draw from the caption alone, without the mode {mode!r}; leave it out{with_mask}."
            )
        if result.clip_guidance_scale and self.guide is None:
            raise InputError("These weights have no CLIP that knows noise; leave the scale of CLIP guidance at 0.")
        if self.decoder.null_picture and mode == "caption":
            raise InputError("These weights draw from image embeddings alone; choose another mode than 'caption'.")
        negative = request.clean_prompt(result.negative_prompt)
        return upsampling_of(dataclasses.replace(result, mode=mode, negative_prompt=negative), self.upsampler)

    def upsamples_first(self, sampling: DALLE2Sampling) -> bool:
        """Whether pictures are upsampled before they are ranked: see the class."""
        if not sampling.upsample:
            return False
        if self.clip is None or not self.ranks:
            return True
        return self.decoder.resolution_of_pixels < max(self.clip.image_size)

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompt: str = "", image: Image.Image | None = None
    ) -> EncodedPrompts:
        """Clean prompts, which may be empty beside an image -> what CLIP says; warns of prompts that are too long."""
        return encode_prompts(self.clip, self.decoder, prompts, negative_prompt, image)

    def image_embeddings(
        self, encoded: EncodedPrompts, block: Block, seed: int, sampling: DALLE2Sampling, report: Report | None = None
    ) -> Tensor | None:
        """The image embeddings (P, n, D) that a block is drawn from, as the mode says; None for the mode "caption"."""

        def tell(begin: float, end: float, step: Step) -> None:
            if report is not None:
                report("prior", (PRIOR_SHARE * begin, PRIOR_SHARE * end), step)

        return imagining.image_embeddings(self.prior, encoded, block, seed, sampling, tell)

    def decode(
        self,
        encoded: EncodedPrompts,
        image_embedding: Tensor | None,
        block: Block,
        seed: int,
        sampling: DALLE2Sampling,
        report: Report | None = None,
        steering: Steering | None = None,
    ) -> Tensor:
        """Image embeddings (P, n, D), or None, and the block's texts -> pixels (P, n, 3, H, W) in [0, 1]."""
        prompts, candidates = len(block.prompts), len(block.candidates)
        rows = filled_up(list(range(prompts * candidates)), block.together)
        seeds = [seed + block.candidates[row % candidates] for row in rows]
        null_embedding = imagining.null_embeddings(self.prior, encoded, block, seed, sampling)
        embedding, opposite = (
            None if each is None else each.flatten(0, 1)[rows] for each in (image_embedding, null_embedding)
        )  # R, D
        texts, led = [block.prompts[row // candidates] for row in rows], steering or Steering()
        side = self.decoder.resolution_of_pixels
        kept: dict[str, Any] = {} if led.filling is None else led.filling.at(side, self.computes_on)
        condition = self.decoder.condition(embedding, *encoded.text.rows(texts), **kept)
        null = self.decoder.condition(opposite, *encoded.null.rows([0] * len(rows)), **kept)
        x_0 = denoise(
            self.predictor(condition),
            scheduler_for(sampling.scheduler, self.decoder),
            noise_of(seeds, self.decoder.latent_shape, DECODER).to(self.computes_on),
            sampling.num_inference_steps,
            null_predict=self.predictor(null),
            guidance_scale=sampling.guidance_scale,
            guidance_interval=sampling.guidance_interval,
            dynamic_threshold=sampling.dynamic_threshold,
            clamp=self.decoder.clamp,
            eta=sampling.eta,
            gradient=led.gradient(texts),
            known=getattr(condition, "known", None),
            seeds=seeds,
            stream=DECODER,
            callback=None
            if report is None
            else partial(report, "decoder", (PRIOR_SHARE, DECODER_SHARE if self.upsamples_first(sampling) else 1.0)),
        )
        # One at a time: see `Block.together`.
        pixels = torch.cat([self.decoder.to_pixels(row) for row in x_0[: prompts * candidates].split(1)])
        return pixels.unflatten(0, (prompts, candidates))

    def predictor(self, condition: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The decoder under a condition, as the denoising loop calls it."""
        return lambda x_t, t: self.decoder.denoise(x_t, t, condition)

    def upsample(
        self,
        pixels: Tensor,
        prompts: Sequence[str],
        block: Block,
        seed: int,
        enlarging: Enlarging,
        report: Report | None = None,
    ) -> Tensor:
        """Pixels (P, n, 3, H, W) of a whole block -> (P, n, 3, f H, f W), both in [0, 1]."""
        large: list[Tensor] = []
        for prompt, row in zip(block.prompts, pixels, strict=True):
            text = enlarging.read(prompts[prompt])
            for index, picture in zip(block.candidates, row.split(1), strict=True):
                begin, end = (DECODER_SHARE * (1 + done / len(block)) for done in (len(large), len(large) + 1))
                tell = None if report is None else partial(report, "upsampler", (begin, end))
                large.append(enlarging.enlarge(picture, seed + index, text, tell))
        return torch.cat(large).unflatten(0, pixels.shape[:2])

    def rows_at_once(self) -> int:
        """Candidates that are drawn at once where a call does not say."""
        if self.computes_on.type == "cpu":
            return ROWS_TOGETHER
        _, height, width = self.decoder.latent_shape
        return max(ROWS_TOGETHER, ACCELERATOR_PIXELS // (height * width))

    def reporter(self, tracker: Tracker, block: Block, finished: int) -> Report:
        """What tells the callback about the steps of a block, after `finished` candidates of earlier blocks."""

        def report(stage: str, span: tuple[float, float], step: Step) -> None:
            def preview() -> list[Image.Image]:
                if stage == "prior":
                    return grey(len(block), self.decoder.resolution_of_pixels)
                if stage == "upsampler":
                    return as_pictures(step.x_0)
                return [to_pil(self.decoder.to_pixels(row))[0] for row in step.x_0[: len(block)].split(1)]

            tracker.drawing(stage, finished, len(block), (step.index + 1, step.num_steps), preview, span)

        return report
