"""The known weakness of CLIP, measured: counting, position, binding (2103.00020, section 6; 2204.06125, section 7).

Each question shows a held-out emoji scene and asks which of K captions is its own; they are word by word the same but
for the fact asked. Captions are plain English and scenes are drawn at the side that the model sees, so that any CLIP
can be asked. A right answer is a caption that scores above all others by more than TIE: captions that a CLIP does not
tell apart, because it gives them one embedding, count as wrong.
Legend: B pictures, K captions of a picture, D embedding width.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as whole_numbers
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genpipe.clip.model import CLIP
from genpipe.clip.zero_shot import embed_pictures
from genpipe.data.captions import Wording, write_caption
from genpipe.data.layout import MAX_COUNT, RELATIONS, Kind, Scene, place_count, place_pair, place_single
from genpipe.data.scenes import EmojiScenes
from genpipe.data.vocabulary import vocabulary
from genpipe.errors import InputError
from genpipe.evaluation.retrieval import TIE
from genpipe.images import stack_levels, to_unit

# "a picture of {thing} on a white background": usual names, no sizes, "to the left of", "to the right of", "above",
# "below". A wording that writes numerals would write "one" and "2": the captions that say "one" take ONE's.
WORDING = Wording(*[0.5] * len(Wording._fields))._replace(
    frame=0.7, prefix=0.0, on=0.0, say_size=0.99, form=0.0, relation_word=0.0
)
ONE = WORDING._replace(number=0.0)
COUNTS = ("one", "two", "three", "four")
NUM_OTHERS = 3  # other objects, so that the control has as many captions as counting
CONFIDENCE = 1.959964  # the 97.5 % quantile of the standard normal distribution
_UNIFORM = 16  # numbers for a layout: more than any takes
_TEXTS_AT_ONCE = 128
_TEXTS_KEPT = 4096  # above 198 objects on 14 backgrounds, whose captions come again and again

Answers = dict[str, bool]


def _chances() -> dict[str, float]:
    rows = {"counting": 1 / MAX_COUNT, **{f"counting, {word}": 1 / MAX_COUNT for word in COUNTS}}
    rows |= {"position": 1 / len(RELATIONS)}
    rows |= {"position, opposite": 1 / 2, "position, exchanged": 1 / 2, "position, axis": 1 / 2}
    return rows | {"background": 1 / len(vocabulary().backgrounds), "binding": 1 / 4, "object": 1 / (1 + NUM_OTHERS)}


def wilson(right: int, count: int, z: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share right / count, within [0, 1] also near its ends. z: 1.96 for 95 %."""
    p = right / count
    centre = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class Share:
    """`right` of `count` answers, and the share that guessing gets."""

    right: int
    count: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(self.right, self.count)

    def to_json(self) -> dict[str, Any]:
        """All of it; the interval as [low, high]."""
        both = {"accuracy": self.accuracy, "interval": list(self.interval)}
        return {**both, "right": self.right, "count": self.count, "chance": self.chance}


class Question(NamedTuple):
    """What the picture shows, K captions, and the number of its own."""

    scene: Scene
    captions: tuple[str, ...]
    own: int


def caption_of(scene: Scene, wording: Wording = WORDING) -> str:
    """The caption in the one fixed wording, background named. A pair's objects[0] comes first whatever the relation."""
    return write_caption(scene, wording, True, True, plain_share=float(scene.relation in ("left of", "above")))


def ask_count(scene: Scene, number: int, uniform: list[float]) -> Question:
    """One, two, three or four of the scene's object; right in turn, so that no constant answer gets above 1/4."""
    name = scene.objects[0]
    one = replace(scene, kind="single", count=1, size=None, placements=place_single(name, None, iter(uniform)))
    scenes = [one]
    for n in range(2, MAX_COUNT + 1):
        scenes.append(replace(one, kind="count", count=n, placements=place_count(name, n, iter(uniform))))
    own = number % MAX_COUNT
    return Question(scenes[own], (caption_of(one, ONE), *map(caption_of, scenes[1:])), own)


def judge_count(similarity: list[float], own: int) -> Answers:
    right = _is_best(similarity, own)
    return {"counting": right, f"counting, {COUNTS[own]}": right}


def ask_position(scene: Scene, number: int, uniform: list[float]) -> Question:
    """Left, right, above or below; right in turn. The fifth caption exchanges the objects, the same words reordered."""
    scenes = [replace(scene, relation=r, placements=place_pair(_pair(scene), r, iter(uniform))) for r in RELATIONS]
    own = number % len(RELATIONS)
    exchanged = replace(scenes[own], objects=scene.objects[::-1])
    return Question(scenes[own], tuple(map(caption_of, [*scenes, exchanged])), own)


def judge_position(similarity: list[float], own: int) -> Answers:
    four, exchanged = similarity[:-1], similarity[-1]
    axis = own // 2 * 2  # RELATIONS hold two axes, a relation beside its opposite
    best_along, best_across = max(four[axis : axis + 2]), max(four[:axis] + four[axis + 2 :])
    return {
        "position": _is_best(four, own),
        "position, opposite": _is_best([four[own], four[own ^ 1]]),
        "position, exchanged": _is_best([four[own], exchanged]),
        "position, axis": _is_best([best_along, best_across]),
    }


def ask_single(scene: Scene, number: int, uniform: list[float]) -> Question:
    """The object on each background, three other objects on its own background, and one of these on another.

    The last holds what no other caption does: neither the object nor the background is right.
    """
    names = list(vocabulary().backgrounds)
    own = names.index(scene.background)
    others = _others(list(vocabulary().objects), scene.objects[0], uniform[1 : 1 + NUM_OTHERS])
    (elsewhere,) = _others(names, scene.background, uniform[:1])
    scenes = [replace(scene, background=name) for name in names]
    scenes += [replace(scene, objects=(name,)) for name in others]
    # Captions number own, of `elsewhere`, and of others[0] on both: what binding is judged by.
    scenes += [replace(scene, background=elsewhere), replace(scene, objects=others[:1], background=elsewhere)]
    return Question(scene, tuple(map(caption_of, scenes)), own)


def judge_single(similarity: list[float], own: int) -> Answers:
    backgrounds, (*objects, elsewhere, neither) = similarity[: -NUM_OTHERS - 2], similarity[-NUM_OTHERS - 2 :]
    return {
        "background": _is_best(backgrounds, own),
        "binding": _is_best([backgrounds[own], objects[0], elsewhere, neither]),
        "object": _is_best([backgrounds[own], *objects]),
    }


class Subject(NamedTuple):
    """Questions on scenes of some kinds, and how their K similarities and the own caption's number are judged."""

    kinds: tuple[Kind, ...]
    ask: Callable[[Scene, int, list[float]], Question]
    judge: Callable[[list[float], int], Answers]

    def questions(self, scenes: EmojiScenes, stream: int) -> Iterator[Question]:
        """Endless; a pure function of the scenes' seed and the number of the subject."""
        numbers = whole_numbers()
        for scene in map(scenes.scene, whole_numbers()):
            if scene.kind in self.kinds:
                number = next(numbers)
                uniform = np.random.default_rng((scenes.seed, stream, number)).random(_UNIFORM)
                yield self.ask(scene, number, uniform.tolist())


SUBJECTS = (
    Subject(("single", "count"), ask_count, judge_count),
    Subject(("pair",), ask_position, judge_position),
    Subject(("single",), ask_single, judge_single),
)


@torch.no_grad()
def weakness_figures(
    clip: CLIP,
    count: int = 1000,
    seed: int = 0,
    chunk_size: int = 64,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Share]:
    """How often `clip` picks the caption of a held-out scene among its twins, in each of `count` questions.

    counting: which of one, two, three, four (K = 4), also per true count. position: left, right, above, below (K = 4);
    opposite: against the caption with the opposite relation; exchanged: against the same words with the two objects
    exchanged; axis: whether the best of the four is one of the right axis. background: which of all 14. binding: own or
    another object on the own or another background (K = 4). object: own or one of three others (K = 4), the control.

    One chunk of pictures and 4,096 embeddings of captions are held (more only where one chunk has more). The scenes
    depend on the seed alone, so that several models answer the same questions. `report(done, total)` counts questions.
    Raises InputError for a count below 1 and for what EmojiScenes refuses; FloatingPointError for broken numbers.
    """
    if min(count, chunk_size) < 1:
        raise InputError(f"The number of questions and chunk_size must be at least 1, got {count} and {chunk_size}.")
    scenes = EmojiScenes(size=min(clip.image_size), split="heldout", seed=seed)
    texts = _Texts(clip)
    asked, right = Counter[str](), Counter[str]()
    for stream, subject in enumerate(SUBJECTS):
        questions = islice(subject.questions(scenes, stream), count)
        done = stream * count
        while chunk := list(islice(questions, chunk_size)):
            pixels = to_unit(stack_levels([scenes.draw(question.scene) for question in chunk]))
            images = torch.cat(list(embed_pictures(clip, pixels, chunk_size)))  # B, D
            known = texts.read([caption for question in chunk for caption in question.captions])
            for image, question in zip(images, chunk, strict=True):
                similarity = torch.stack([known[caption] for caption in question.captions]) @ image  # K
                answers = subject.judge(similarity.tolist(), question.own)
                asked.update(answers.keys())
                right.update(row for row, is_right in answers.items() if is_right)
            done += len(chunk)
            if report is not None:
                report(done, len(SUBJECTS) * count)
    return {row: Share(right[row], asked[row], chance) for row, chance in _chances().items() if asked[row]}


def table(columns: Sequence[tuple[str, Mapping[str, Share]]]) -> str:
    """One line per figure, one column per model: accuracy with its 95 % interval, and chance. For people."""
    heads = ["", *(_tail(name) for name, _ in columns), "chance"]
    rows = [heads]
    for row, first in columns[0][1].items():
        shares = (figures[row] for _, figures in columns)
        rows.append([row, *(_cell(share) for share in shares), f"{first.chance:.1%}"])
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(heads))]
    lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in rows]
    most = max(share.count for _, figures in columns for share in figures.values())
    note = f"{most:,} questions on held-out scenes; in brackets the 95 % interval"
    return "\n".join([*lines, note])


def _cell(share: Share) -> str:
    low, high = share.interval
    return f"{share.accuracy:6.1%} ({100 * low:4.1f} - {100 * high:5.1f})"


def _tail(name: str, limit: int = 28) -> str:
    """The end of a name, which is where folders differ."""
    return name if len(name) <= limit else "..." + name[3 - limit :]


class _Texts:
    """Embeddings of captions, of length 1; those read last are kept, as many come again."""

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip
        self._known: dict[str, Tensor] = {}

    def read(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """At least these captions, each with its embedding (D,)."""
        wanted = dict.fromkeys(captions)
        if len(self._known.keys() | wanted.keys()) > _TEXTS_KEPT:
            self._known.clear()
        new = [caption for caption in wanted if caption not in self._known]
        for start in range(0, len(new), _TEXTS_AT_ONCE):
            some = new[start : start + _TEXTS_AT_ONCE]
            embedding = self._clip.encode_text(some).normalized
            if not bool(embedding.isfinite().all()):
                raise FloatingPointError("CLIP's text embeddings are not finite; its weights are damaged.")
            self._known.update(zip(some, embedding, strict=True))
        return self._known


def _is_best(similarity: Sequence[float], own: int = 0) -> bool:
    """Whether the own caption is clearly ahead of all others."""
    return similarity[own] > max(s for k, s in enumerate(similarity) if k != own) + TIE


def _pair(scene: Scene) -> tuple[str, str]:
    first, second = scene.objects
    return first, second


def _others(names: list[str], own: str, uniform: Sequence[float]) -> tuple[str, ...]:
    """One name for each uniform number: all different, none of them `own`."""
    left = [name for name in names if name != own]
    return tuple(left.pop(int(u * len(left))) for u in uniform)
