"""The composition score: prompts, verdicts by hand, backgrounds, scores, the report and its continuation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from genpipe.data.layout import RELATIONS
from genpipe.data.scenes import EmojiScenes, is_held_out
from genpipe.errors import InputError
from genpipe.evaluation.composition import (
    TASKS,
    TaskPrompt,
    Verdict,
    background_names,
    judge,
    judged,
    scores,
    task_prompts,
)
from genpipe.evaluation.detector import Detection, SceneDetector
from genpipe.evaluation.report import RunFolder, record
from genpipe.images import stack_levels, to_unit


def test_prompts_are_held_out_different_and_the_same_again() -> None:
    prompts = task_prompts(12, seed=3)
    assert [p.task for p in prompts] == [task for task in TASKS for _ in range(12)]
    assert all(is_held_out(p.scene) for p in prompts)
    for task in TASKS:
        assert len({p.prompt for p in prompts if p.task == task}) == 12
    assert [p.prompt for p in prompts] == [p.prompt for p in task_prompts(12, seed=3)]
    assert [p.prompt for p in prompts] != [p.prompt for p in task_prompts(12, seed=4)]
    words = ("left", "right", "above", "below", "under", "over", "next to", "top", "bottom", "beneath")
    for p in prompts:
        assert (p.task in ("position", "all together")) == any(word in p.prompt for word in words), p.prompt
        assert (p.scene.kind == "count") == (p.task == "counting")
    with pytest.raises(InputError, match="at least 1"):
        task_prompts(0)


def prompt_of(task: str, relation: str = "left of") -> TaskPrompt:
    found = (p for p in task_prompts(40) if p.task == task)
    return next(p for p in found if p.scene.kind != "pair" or p.scene.relation == relation)


def seen_in(prompt: TaskPrompt) -> list[Detection]:
    return [Detection(p.object, p.x, p.y, 0.9) for p in prompt.scene.placements]


@pytest.mark.parametrize("task", TASKS)
def test_a_real_scene_is_right(task: str) -> None:
    prompt = prompt_of(task)
    assert judge(prompt, seen_in(prompt), prompt.scene.background) == Verdict(
        True, tuple(p.object for p in prompt.scene.placements), prompt.scene.background, ""
    )
    nothing = judge(prompt, [], prompt.scene.background)
    assert not nothing.right and nothing.reason == f"no {prompt.scene.objects[0]}"


@pytest.mark.parametrize("relation", RELATIONS)
def test_places(relation: str) -> None:
    prompt = prompt_of("position", relation)
    first, second = seen_in(prompt)
    assert judge(prompt, [first, second], None).right
    exchanged = [Detection(first.name, second.x, second.y, 0.9), Detection(second.name, first.x, first.y, 0.9)]
    assert judge(prompt, exchanged, None).reason == f"not {relation}"
    turned = [Detection(each.name, each.y, each.x, 0.9) for each in (first, second)]
    assert not judge(prompt, turned, None).right


def test_what_each_task_asks_for() -> None:
    counting, background, two = prompt_of("counting"), prompt_of("background"), prompt_of("two objects")
    more = [*seen_in(counting), Detection(counting.scene.objects[0], 0.5, 0.5, 0.5)]
    assert judge(counting, more, None).reason == f"{counting.scene.count + 1} instead of {counting.scene.count}"
    stranger = Detection("somebody else", 0.1, 0.1, 0.9)
    assert judge(counting, [*seen_in(counting), stranger], None).right
    assert judge(background, seen_in(background), None).reason == "the background is of no known colour"
    assert not judge(background, seen_in(background), "another").right
    assert not judge(two, seen_in(two)[:1], two.scene.background).right
    everything = prompt_of("all together")
    assert not judge(everything, [*seen_in(everything), stranger], everything.scene.background).right


def test_backgrounds_of_scenes_and_of_none() -> None:
    scenes = EmojiScenes(48, split="all")
    drawn = [scenes.scene(i) for i in range(60)]
    pixels = to_unit(stack_levels([scenes.draw(scene) for scene in drawn]))
    before = pixels.clone()
    assert background_names(pixels) == [scene.background for scene in drawn]
    assert torch.equal(pixels, before)
    assert background_names(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))) in ([None], ["grey"])
    odd = torch.tensor([0.2, 0.45, 0.45])[None, :, None, None].expand(1, 3, 32, 32)
    assert background_names(odd) == [None]


def test_scores_are_shares_of_pictures() -> None:
    right, wrong = Verdict(True, (), None, ""), Verdict(False, (), None, "no cat")
    prompts = [prompt_of("counting"), prompt_of("counting"), prompt_of("position")]
    figures = scores(prompts, [[right, wrong], [wrong, wrong], [right, right]])
    assert figures == {"counting": 0.25, "position": 1.0, "overall": 0.625}


def test_pictures_and_prompts_must_be_as_many() -> None:
    with pytest.raises(InputError, match="as many prompts"):
        judged(SceneDetector(["cat"], size=32, width=8), task_prompts(1), torch.rand(2, 3, 32, 32))


def test_a_report_goes_on_where_it_stopped(tmp_path) -> None:
    settings = {"family": "tiny", "pipeline": "dalle1", "candidates": 4}
    prompts = [p for p in task_prompts(1) if p.task in ("counting", "position")]
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    right, wrong = Verdict(True, ("cat",), "red", ""), Verdict(False, (), None, "no <cat>")
    folder = RunFolder(tmp_path / "run", settings)
    folder.add(0, [picture, picture], [record(right, 0.5, 0), record(wrong, 0.25, 1)])
    with (tmp_path / "run" / "verdicts.jsonl").open("a") as file:
        file.write('{"number": 1, "pict')  # killed while it wrote
    again = RunFolder(tmp_path / "run", settings)
    assert set(again.done()) == {0}
    with (tmp_path / "run" / "verdicts.jsonl").open("a") as file:
        file.write("\n")
    again.add(1, [picture], [record(right, None, 0)])
    texts = [p.prompt for p in prompts]
    summary = again.finish(texts, prompts, {"noise": 0.0})
    assert summary["tasks"] == {"counting": 0.5, "position": 1.0} and summary["overall"] == 0.75
    assert summary["clip_score"] == 0.375 and summary["detector_accuracy"] == {"noise": 0.0}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.index("no &lt;cat&gt;") < page.index(": right") and "<cat>" not in page
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [len(row["pictures"]) for row in report["pictures"]] == [2, 1]
    assert (tmp_path / "run" / report["pictures"][0]["pictures"][1]["file"]).is_file()
    with pytest.raises(InputError, match="other settings"):
        RunFolder(tmp_path / "run", {**settings, "candidates": 16})


def test_a_report_without_a_judge_has_scores_alone(tmp_path) -> None:
    folder = RunFolder(tmp_path, {"family": "tiny", "pipeline": "dalle1", "candidates": 1})
    folder.add(0, [Image.new("RGB", (8, 8))], [record(None, 0.5, 0)])
    summary = folder.finish(["a cat"], None, {})
    assert summary["clip_score"] == 0.5 and "tasks" not in summary
