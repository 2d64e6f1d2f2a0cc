"""The composition score: whether pictures show what their prompts say, by GenEval's protocol (2310.11513, 3).

Six tasks of held-out combinations of emoji scenes; a picture is right or wrong; a task's score is the share of right
ones, the overall score the mean of the tasks. What is in a picture, a detector says that shares nothing with the models
that are judged.

Legend: B pictures, H W their sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from genpipe.data.captions import Wording, write_caption
from genpipe.data.layout import Scene
from genpipe.data.scenes import EmojiScenes, Objects
from genpipe.data.vocabulary import vocabulary
from genpipe.errors import InputError
from genpipe.evaluation.detector import Detection, SceneDetector
from genpipe.images import lab, resize, stack_levels, to_unit
from genpipe.parts import load_part

TASKS = ("single object", "two objects", "counting", "background", "position", "all together")
_KINDS = {"single object": "single", "background": "single", "counting": "count"}  # of the scene; "pair" for the others
_PLACED = ("position", "all together")
_AND = 0.945  # a number that picks the wording "a cat and a dog", which says nothing of places
_FAR = 20.0  # CIE76 difference from which on a colour goes by no name
_RING = 1 / 16  # width of the border in which the background is looked for, as a share of the side


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt, and the held-out scene whose caption it is: a picture must show of it what the task asks for."""

    task: str
    prompt: str
    scene: Scene


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, what was seen in it, and if it is wrong, why."""

    right: bool
    seen: tuple[str, ...]
    background: str | None
    reason: str


def task_prompts(per_task: int, seed: int = 0, objects: Objects = "all") -> list[TaskPrompt]:
    """`per_task` different prompts of each task, all of held-out combinations; prompts always name the background.

    objects: of the scenes, "all" or the "common" ones alone. Raises InputError for a number below 1.
    """
    if per_task < 1:
        raise InputError(f"{per_task} prompts per task are asked for; at least 1 is needed.")
    prompts: list[TaskPrompt] = []
    for number, task in enumerate(TASKS):
        scenes = EmojiScenes(split="heldout", seed=seed * len(TASKS) + number, objects=objects)
        found: dict[str, TaskPrompt] = {}
        index = 0
        while len(found) < per_task:
            scene, generator = scenes.scene(index), np.random.default_rng((seed, number, index))
            index += 1
            if scene.kind == _KINDS.get(task, "pair") and scene.size is None:
                prompt = _caption(task, scene, Wording.draw(generator))
                found.setdefault(prompt, TaskPrompt(task, prompt, scene))
        prompts += found.values()
    return prompts


def _caption(task: str, scene: Scene, wording: Wording) -> str:
    if task == "two objects":
        wording = wording._replace(form=_AND)
    return write_caption(scene, wording, mention_background=True, state_relation=task in _PLACED)


def load_detector() -> SceneDetector:
    """The judge's detector, which comes with genpipe. Raises InputError where its files are missing or damaged."""
    return load_part(SceneDetector, Path(__file__).parent / "judge")


def judge(prompt: TaskPrompt, seen: Sequence[Detection], background: str | None) -> Verdict:
    """What a task asks for, and no more: other objects do harm to "all together" only, which asks for nothing else."""
    names, scene = [each.name for each in seen], prompt.scene
    reason = ""
    missing = [name for name in scene.objects if name not in names]
    if missing:
        reason = f"no {missing[0]}"
    elif prompt.task == "counting" and names.count(scene.objects[0]) != scene.count:
        reason = f"{names.count(scene.objects[0])} instead of {scene.count}"
    elif prompt.task in ("background", "all together") and background != scene.background:
        reason = f"the background is {background or 'of no known colour'}"
    elif prompt.task in _PLACED and not _placed(scene, seen):
        reason = f"not {scene.relation}"
    elif prompt.task == "all together" and len(names) > len(scene.objects):
        reason = "more than was asked for"
    return Verdict(not reason, tuple(names), background, reason)


def _placed(scene: Scene, seen: Sequence[Detection]) -> bool:
    """Whether the surest of the two objects stand as they should, along that axis more than along the other."""
    first, second = (next(each for each in seen if each.name == name) for name in scene.objects)
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if scene.relation in ("left of", "right of") else (down, right)
    forward = along if scene.relation in ("left of", "above") else -along
    return forward > abs(across)


def judged(
    detector: SceneDetector, prompts: Sequence[TaskPrompt], pixels: Tensor, threshold: float = 0.3
) -> list[Verdict]:
    """Pixels (B, 3, H, W) in [0, 1], the i-th drawn for the i-th of B prompts -> their verdicts."""
    if len(prompts) != len(pixels):
        raise InputError(f"{len(pixels)} pictures need as many prompts, got {len(prompts)}.")
    rows = zip(prompts, detector.detect(pixels, threshold), background_names(pixels), strict=True)
    return [judge(prompt, seen, background) for prompt, seen, background in rows]


def background_names(pixels: Tensor) -> list[str | None]:
    """The name of each background of pixels (B, 3, H, W) in [0, 1]; None where no named colour is near.

    The background is the median colour of the border, which objects cover at a few places only.
    """
    names = list(vocabulary().backgrounds)
    colours = torch.tensor([vocabulary().backgrounds[name].colour for name in names]) / 255
    known = lab(colours.T[None, :, :, None])[0, :, :, 0].T  # names, 3
    small = resize(pixels, (64, 64), mode="area")
    width = round(64 * _RING)
    ring = torch.ones(64, 64, dtype=torch.bool)
    ring[width:-width, width:-width] = False
    colour = small[:, :, ring].median(dim=-1).values  # B, 3
    distance = torch.cdist(lab(colour[:, :, None, None])[:, :, 0, 0].cpu(), known)  # B, names
    nearest, index = distance.min(dim=1)
    return [names[int(i)] if float(d) < _FAR else None for d, i in zip(nearest, index, strict=True)]


def scores(prompts: Sequence[TaskPrompt], verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """Task -> share of right pictures, and "overall", their mean; `verdicts`: those of each prompt's pictures."""
    right: dict[str, list[bool]] = {}
    for prompt, own in zip(prompts, verdicts, strict=True):
        right.setdefault(prompt.task, []).extend(verdict.right for verdict in own)
    tasks = {task: mean(map(float, hits)) for task, hits in right.items()}
    return {**tasks, "overall": mean(tasks.values())}


def detector_accuracy(
    detector: SceneDetector, per_task: int = 200, seed: int = 1, objects: Objects = "all"
) -> dict[str, float]:
    """How often the judge calls a real scene right for its own prompt, by task; and what it must refuse.

    "wrong prompt": real scenes it calls right for another scene's prompt of the same task; "noise": pictures of noise
    in which it sees anything.
    """
    prompts, scenes = task_prompts(per_task, seed, objects), EmojiScenes(size=detector.config.size)
    right: dict[str, list[float]] = {task: [] for task in TASKS}
    wrong: list[float] = []
    for start in range(0, len(prompts), 100):
        own = prompts[start : start + 100]
        pixels = to_unit(stack_levels([scenes.draw(prompt.scene) for prompt in own]))
        for prompt, verdict in zip(own, judged(detector, own, pixels), strict=True):
            right[prompt.task].append(verdict.right)
        others = [*own[1:], own[0]]
        for prompt, other, verdict in zip(own, others, judged(detector, others, pixels), strict=True):
            if prompt.task == other.task and prompt.scene.objects != other.scene.objects:
                wrong.append(verdict.right)
    noise = torch.rand(100, 3, scenes.size, scenes.size, generator=torch.Generator().manual_seed(seed))
    seen = [float(bool(found)) for found in detector.detect(noise)]
    return {**{task: mean(hits) for task, hits in right.items()}, "wrong prompt": mean(wrong), "noise": mean(seen)}
