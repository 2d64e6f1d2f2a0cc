"""What a person asks of a pipeline and what comes back: checks of prompts and numbers, progress, the output.

Shared by the pipelines, so that the same words and numbers are accepted, refused and warned about by each.
"""

import math
import numbers
import re
import unicodedata
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from genpipe.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import, and a bad request should be refused at once
    from genpipe.tokenizer import TokenBatch

MAX_PROMPT_CHARACTERS = 2000  # more than any text encoder here reads; longer prompts are cut before they cost time
MAX_SEED = 2**63 - 1  # what a torch generator takes


@dataclass(frozen=True)
class GenerationOutput:
    """Pictures of B prompts, best first.

    `images`, `scores` (cosine similarity of picture and prompt under CLIP, in [-1, 1]) and `seeds` are B lists of at
    most `keep` entries. Where DALL-E 2's decoder helps to rank, the order is not that of the scores alone. Where there
    is no CLIP to rank them, scores are None and pictures stand in the order of seeds. `complete` is False where the
    callback stopped the call: the lists then hold what was finished.
    """

    images: list[list[Image.Image]]
    scores: list[list[float | None]]
    seeds: list[list[int]]
    prompts: list[str]
    complete: bool = True


@dataclass(frozen=True)
class Progress:
    """Handed to the callback after every step. `preview()` draws the running candidates as far as they have come."""

    finished: int  # candidates that are drawn
    total: int  # candidates of the whole call
    running: int  # candidates that are being drawn, or upsampled, now
    step: int  # steps of the stage done for them
    num_steps: int
    fraction: float  # share of the whole call that is done, in [0, 1]
    preview: Callable[[], list[Image.Image]] = field(repr=False)
    stage: str  # the part that is at work: transformer; prior, decoder; upsampler


# Called after every step; returning True stops the call, which then returns what was finished.
Callback = Callable[[Progress], bool | None]


class Stopped(Exception):
    """Raised inside a pipeline when its callback asks to stop; never leaves the pipeline."""


class Tokenizer(Protocol):
    """What every tokenizer of a part offers (genpipe.tokenizer)."""

    def __call__(self, texts: Sequence[str], context_length: int) -> "TokenBatch": ...


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several -> clean prompts: no control characters, no white space around or doubled.

    Warns where control characters were taken out. Raises InputError for no prompt, one that is not a string and one
    that is empty.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise InputError("No prompt was given; give at least one sentence that says what to draw.")
    return [_check_prompt(prompt) for prompt in listed]


def _check_prompt(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise InputError(f"A prompt must be a string, got {type(prompt).__name__}.")
    clean = clean_prompt(prompt)
    if all(unicodedata.category(character) == "Cf" for character in clean):  # also true of nothing at all
        raise InputError("The prompt is empty; say in a few words what to draw.")
    return clean


def clean_prompt(prompt: str) -> str:
    """A prompt without control characters, white space around it or doubled. Warns where characters were taken out."""
    spaced = "".join(" " if character.isspace() else character for character in prompt)
    # Cc: control characters; Cs: halves of a surrogate pair, which a terminal passes on for bytes that are not UTF-8.
    kept = "".join(character for character in spaced if unicodedata.category(character) not in ("Cc", "Cs"))
    clean = " ".join(kept.split())
    if kept != spaced:
        warnings.warn(f"Control characters were taken out of the prompt {brief(clean)}.", stacklevel=5)
    return clean


def shorten(prompt: str, tokenizer: Tokenizer, context_length: int) -> str:
    """The longest beginning of the prompt that the tokenizer does not truncate, cut between words where it can be.

    Done here so that a person gets one warning that says what was read, in place of one from each text encoder.
    """
    text = prompt[:MAX_PROMPT_CHARACTERS]

    def fits(length: int) -> bool:
        beginning = text[:length]
        room = (
            3 * len(beginning.encode("utf-8", "replace")) + 3
        )  # no text has more tokens, even if lower case is longer
        return int(tokenizer([beginning], max(room, context_length)).mask.sum()) <= context_length

    if not fits(len(text)):
        low, high = 0, len(text)  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        text = text[:low]
    if text != prompt and " " in text and prompt[len(text)] != " ":
        text = text.rpartition(" ")[0]
    return text.rstrip()


def unknown_words(prompt: str, known: Collection[str]) -> list[str]:
    """Words and emoji of the prompt that are not among the `known` words (lower case), each once, in order."""
    unknown = []
    for word in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", prompt.lower()):
        parts = re.split(r"['’-]", word)
        if word.replace("’", "'") not in known and not all(part in known for part in parts):
            unknown.append(word)
    unknown += [character for character in prompt if unicodedata.category(character) == "So"]
    return list(dict.fromkeys(unknown))


def warn_of_unknown_words(prompts: Sequence[str], known: Collection[str], family: str) -> None:
    """One warning that names all words of the prompts that the family was never trained on."""
    unknown = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt, known)))
    if unknown:
        shown = ", ".join(brief(word, 40) for word in unknown[:10]) + (
            f" and {len(unknown) - 10} more" * (len(unknown) > 10)
        )
        warnings.warn(f"The family {family!r} was never trained on {shown}; it draws what it can.", stacklevel=4)


def warn_of_cut_prompt(prompt: str, *read: str) -> None:
    """Warn where what a part read of the prompt is not all of it; `read` holds the beginnings that the parts read."""
    shortest = min(read, key=len)
    if shortest != prompt:
        warnings.warn(
            f"The prompt has {len(prompt):,} characters and only its beginning was read: {brief(shortest)}.",
            stacklevel=4,
        )


def warn_of_untrained(components: Mapping[str, Any]) -> None:
    """One warning that names the parts whose weights were not loaded; None stands for a part that is not there."""
    fresh = [name for name, part in components.items() if part is not None and not part.config.get("_name_or_path")]
    if fresh:
        warnings.warn(
            f"The weights of {', '.join(fresh)} were not loaded from a folder; "
            "unless they were trained in this process, the pictures will be noise.",
            stacklevel=4,
        )


def warn_of_no_ranking(lacking: str) -> None:
    """Say why the pictures come back in the order of their seeds."""
    warnings.warn(
        f"Not ranked: these weights have no {lacking}, so no more candidates are drawn than are kept.", stacklevel=4
    )


def check_counts(num_candidates: int, keep: int, seed: int, chunk_size: int | None) -> None:
    """Raises InputError for counts below 1, keep above num_candidates, and seeds outside [0, 2^63)."""
    check_positive("The number of candidates", num_candidates)
    check_positive("The number of pictures to keep", keep)
    if keep > num_candidates:
        raise InputError(
            f"{keep} pictures cannot be kept of {num_candidates} candidates; draw more candidates or keep fewer."
        )
    if chunk_size is not None:
        check_positive("The chunk size", chunk_size)
    if not is_whole(seed) or not 0 <= seed <= MAX_SEED - num_candidates:
        raise InputError(f"The seed must be a whole number from 0 to {MAX_SEED - num_candidates}, got {seed!r}.")


def check_sampling(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
) -> None:
    """Raises InputError for a temperature or top_k not above 0, top_p outside (0, 1], a guidance scale below 0."""
    if temperature is not None and not (is_finite(temperature) and temperature > 0):
        raise InputError(f"The temperature must be a number above 0, got {temperature!r}.")
    if top_k is not None:
        check_positive("Top-k", top_k)
    if top_p is not None and not (is_finite(top_p) and 0 < top_p <= 1):
        raise InputError(f"Top-p must be a number above 0 and at most 1, got {top_p!r}.")
    if guidance_scale is not None and not (is_finite(guidance_scale) and guidance_scale >= 0):
        raise InputError(f"The guidance scale must be 0 or more (1 is no guidance), got {guidance_scale!r}.")


def check_positive(name: str, value: object) -> None:
    """Raises InputError unless `value` is a whole number of at least 1."""
    if not is_whole(value) or value < 1:  # type: ignore[operator]
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}.")


def brief(prompt: str, limit: int = 60) -> str:
    """A prompt as shown in a message: quoted, and cut in its middle where it is long."""
    half = limit // 2
    return repr(prompt if len(prompt) <= limit else f"{prompt[:half]} ... {prompt[-half:]}")


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether `value` is a number, neither infinite nor NaN."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
