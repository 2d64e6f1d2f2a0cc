"""`genpipe evaluate FAMILY`: prompts from a file, judged prompts, a run that goes on, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from command_line import Run, refused

import genpipe.evaluation.composition as composition
from genpipe.data.scenes import EmojiScenes
from genpipe.evaluation.detector import SceneDetector


def test_prompts_of_a_file_are_drawn_and_scored(run: Run, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  two dogs  \n", encoding="utf-8")
    result = run("evaluate", tiny_folder, "--prompts", file, "--candidates", 1, "--out", tmp_path / "out", "--json")
    assert result.code == 0
    one, two = json.loads(result.out)
    assert (one["pipeline"], two["pipeline"], one["prompts"]) == ("dalle1", "dalle2", ["a cat", "two dogs"])
    assert "tasks" not in one and -1 <= one["clip_score"] <= 1
    report = json.loads((tmp_path / "out" / "dalle1-1" / "report.json").read_text())
    assert [len(row["pictures"]) for row in report["pictures"]] == [4, 4]
    assert sorted(p["seed"] for p in report["pictures"][0]["pictures"]) == [0, 1, 2, 3]


def test_six_tasks_are_judged_and_a_second_call_draws_nothing_again(
    run: Run,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    judge = SceneDetector(list(EmojiScenes().objects), size=32, width=8).eval()
    monkeypatch.setattr(composition, "load_detector", lambda: judge)
    accuracy = composition.detector_accuracy
    monkeypatch.setattr(composition, "detector_accuracy", lambda detector, objects: accuracy(detector, per_task=2))
    command = ("evaluate", tiny_folder, "--pipeline", "dalle1", "--per-task", 1, "--out", tmp_path / "out")
    result = run(*command, "--candidates", 5)
    assert result.code == 0 and "overall" in result.out and "all together" in result.out
    folder = tmp_path / "out" / "dalle1-5"
    report = json.loads((folder / "report.json").read_text())
    assert set(report["tasks"]) == set(composition.TASKS) and report["overall"] == 0  # untrained parts draw nothing
    assert set(report["detector_accuracy"]) == {*composition.TASKS, "wrong prompt", "noise"}
    pictures = {path: path.stat().st_mtime_ns for path in (folder / "pictures").iterdir()}
    assert len(pictures) == 24
    assert run(*command, "--candidates", 5).out == result.out
    assert {path: path.stat().st_mtime_ns for path in (folder / "pictures").iterdir()} == pictures
    assert "other settings" in refused(run(*command, "--candidates", 5, "--seed", 1))
    assert report["objects"] == "common" and set(report["best_alone"]) == {*composition.TASKS, "overall"}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small judge in place of the shipped one."""
    detector = SceneDetector(list(EmojiScenes().objects), size=32, width=8).eval()
    monkeypatch.setattr(composition, "load_detector", lambda: detector)
    monkeypatch.setattr(composition, "detector_accuracy", lambda detector, objects: {"noise": 0.0})


@pytest.mark.usefixtures("judge")
def test_a_curve_judges_every_candidate(run: Run, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    command = ("evaluate", tiny_folder, "--pipeline", "dalle1", "--per-task", 1, "--out", tmp_path / "out", "--curve")
    assert run(*command, "--candidates", 6).code == 0
    report = json.loads((tmp_path / "out" / "dalle1-6-curve" / "report.json").read_text())
    assert [len(row["pictures"]) for row in report["pictures"]] == [6] * 6
    clip = [point["score"] for point in report["curve"]["clip_score"]]
    assert clip[0] == pytest.approx(report["clip_score"]) and clip == sorted(clip) and len(clip) == 3
    assert report["curve"]["composition"][0]["score"] == pytest.approx(report["overall"])


@pytest.mark.usefixtures("judge")
def test_the_summary_keeps_one_entry_of_each_run(run: Run, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    summary = tmp_path / "composition.json"
    command = ("evaluate", tiny_folder, "--pipeline", "dalle1", "--per-task", 1, "--candidates", 6)
    command = (*command, "--summary", summary, "--out", tmp_path / "out")
    assert run(*command, "--objects", "all").code == run(*command, "--objects", "all").code == 0
    (entry,) = json.loads(summary.read_text())
    assert (entry["pipeline"], entry["candidates"], entry["seed"], entry["prompts"]) == ("dalle1", 6, 0, 1)
    assert set(entry["tasks"]) == set(composition.TASKS) and entry["detector_accuracy"] == {"noise": 0.0}
    assert run(*command[:-1], tmp_path / "common").code == 0
    both = json.loads(summary.read_text())
    assert both[0] == entry and [each["objects"] for each in both] == ["all", "common"]
    assert "without --curve" in refused(run(*command, "--curve"))
    assert "must be one of all, common" in refused(run(*command, "--objects", "rare"))
    for broken in ("{}", "[1]", "no JSON"):
        summary.write_text(broken)
        assert "cannot be used for the summary" in refused(run(*command))
        assert summary.read_text() == broken


@pytest.mark.usefixtures("judge")
def test_verdicts_of_another_judge_are_not_mixed_in(
    run: Run,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("evaluate", tiny_folder, "--pipeline", "dalle1", "--per-task", 1, "--out", tmp_path / "out")
    assert run(*command, "--candidates", 1).code == 0
    other = SceneDetector(list(EmojiScenes().objects), size=32, width=16).eval()
    monkeypatch.setattr(composition, "load_detector", lambda: other)
    assert "other settings" in refused(run(*command, "--candidates", 1))


def test_what_is_refused(run: Run, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "holds no prompt" in refused(run("evaluate", tiny_folder, "--prompts", empty))
    assert "cannot be read" in refused(run("evaluate", tiny_folder, "--prompts", binary))
    assert "cannot be read" in refused(run("evaluate", tiny_folder, "--prompts", tmp_path / "none.txt"))
    assert "per task" in refused(run("evaluate", tiny_folder, "--per-task", 0))
    assert "candidates" in refused(run("evaluate", tiny_folder, "--candidates", 0))
    assert "no pipeline" in refused(run("evaluate", tiny_folder, "--pipeline", "dalle3"))
    assert "no family" in refused(run("evaluate", "nobody"))
