"""The page: drawings in the background, what each visitor sees, and the whole of it served to two clients at once."""

import ast
import base64
import dataclasses
import io
import json
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import app
from genpipe.errors import InputError
from genpipe.images import open_picture, read_recipe
from pipelines import background
from pipelines.background import Drawing, Line, Order, View
from pipelines.demo_command import check_address, page_module
from pipelines.family import Family
from pipelines.recipe import Recipe, redraw, same_pixels

PROMPT = "two dogs on a red background"
SECONDS = 60  # that a busy machine may take to answer


@pytest.fixture(scope="module")
def page(tiny_family: Family) -> app.Page:
    return app.Page(tiny_family, Line())


@pytest.fixture
def somebody(page: app.Page) -> Iterator[str]:
    """Another visitor, whose turn it is."""
    page.line.join("somebody")
    yield "somebody"
    page.line.leave("somebody")


@pytest.fixture
def quick_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views and previews a hundred times a second, so that even tiny pipelines are seen at work."""
    monkeypatch.setattr(background, "NEWS_SECONDS", 0.01)
    monkeypatch.setattr(background, "PREVIEW_SHARE", 1e9)


@dataclasses.dataclass
class Seen:
    """What a visitor saw in one gallery: pictures with recipes, and captions."""

    pictures: list[Image.Image]
    recipes: list[dict[str, Any]]
    captions: list[str]


def watch(page: app.Page, *request: Any) -> tuple[dict[str, Seen], list[dict[Any, Any]]]:
    """Press Draw and read everything that appears, while it is there."""
    seen, updates = {}, []
    names = {gallery: name for name, gallery in page.galleries.items()}
    for update in page.draw(*request):
        updates.append(update)
        for widget, value in update.items():
            if widget in names and isinstance(value, list):
                paths = [path for path, _ in value]
                seen[names[widget]] = Seen(
                    [open_picture(path) for path in paths],
                    [read_recipe(path) for path in paths],
                    [caption for _, caption in value],
                )
    return seen, updates


@pytest.mark.parametrize("choice", ["dalle1", "dalle2", "both"])
def test_pictures_come_best_first_and_are_the_pipelines_own(page: app.Page, tiny_family: Family, choice: str) -> None:
    seen, updates = watch(page, PROMPT, choice, 3, 2, 7)
    assert list(seen) == (["dalle1", "dalle2"] if choice == "both" else [choice])
    for name, gallery in seen.items():
        drawn = tiny_family.pipeline(name)(PROMPT, num_candidates=3, keep=2, seed=7)
        assert [recipe["seed"] for recipe in gallery.recipes] == drawn.seeds[0]
        scores = [recipe["score"] for recipe in gallery.recipes]
        assert scores == sorted(scores, reverse=True)
        expected = [f"{score:.3f}, seed {seed}" for score, seed in zip(drawn.scores[0], drawn.seeds[0], strict=True)]
        assert gallery.captions == expected
        assert all(same_pixels(*pair) for pair in zip(gallery.pictures, drawn.images[0], strict=True))
        assert {recipe["prompt"] for recipe in gallery.recipes} == {PROMPT}
    visible = {name: updates[0][gallery]["visible"] for name, gallery in page.galleries.items()}
    assert visible == {name: name in seen for name in ("dalle1", "dalle2")}
    assert updates[-1][page.status].startswith("Done: the best of 3")
    assert updates[-1][page.start]["interactive"] and not updates[-1][page.stop]["visible"]


@pytest.mark.parametrize("name", ["dalle1", "dalle2"])
def test_a_picture_of_the_page_can_be_drawn_again_from_its_recipe(
    page: app.Page, tiny_family: Family, name: str
) -> None:
    seen, _ = watch(page, PROMPT, name, 3, 2, 1)
    picture, recipe = seen[name].pictures[1], Recipe.from_json(seen[name].recipes[1], "it")
    assert redraw(tiny_family, recipe, picture)[1]


def test_the_seed_decides(page: app.Page) -> None:
    first, again, other = (watch(page, PROMPT, "dalle1", 2, 1, seed)[0]["dalle1"].pictures[0] for seed in (1, 1, 5))
    assert same_pixels(first, again) and not same_pixels(first, other)


@pytest.mark.parametrize(
    "request_, sentence",
    [
        (("  ", "both", 4, 2, 0), "The prompt is empty; say in a few words what to draw."),
        ((None, "dalle1", 4, 2, 0), "The prompt is empty; say in a few words what to draw."),
        ((PROMPT, "dalle1", 2, 4, 0), "4 pictures cannot be kept of 2 candidates"),
        ((PROMPT, "dalle2", 2, 1, None), "The seed must be a whole number"),
    ],
)
def test_a_bad_request_is_answered_in_one_sentence_and_the_next_is_served(
    page: app.Page, request_: tuple, sentence: str
) -> None:
    updates = []
    with pytest.raises(gr.Error) as raised:
        for update in page.draw(*request_):
            updates.append(update)
    assert sentence in str(raised.value)
    assert sentence in updates[-1][page.status] and updates[-1][page.start]["interactive"]
    assert watch(page, PROMPT, "dalle1", 1, 1, 0)[0]["dalle1"].pictures


def test_words_never_seen_are_told_to_the_one_who_wrote_them(page: app.Page, recwarn: pytest.WarningsRecorder) -> None:
    over = threading.Event()

    def others() -> None:
        while not over.wait(0.001):
            warnings.warn("of another thread", stacklevel=1)

    noise = threading.Thread(target=others)
    drawing = Drawing(page.family, Order("a <b>zebroid", ("dalle1", "dalle2"), 1, 1, 0), page.line)
    noise.start()
    drawing.start()
    *_, view = drawing.follow()
    over.set()
    noise.join()
    (message,) = view.warnings  # once, though both pipelines say it
    assert "'zebroid'" in message
    assert not [each for each in recwarn if "zebroid" in str(each.message)]  # nobody else heard it
    warnings.warn("still heard", stacklevel=1)
    assert "still heard" in [str(each.message) for each in recwarn]


def test_the_preview_grows_and_no_view_changes_later(page: app.Page, quick_news: None) -> None:
    drawing = Drawing(page.family, Order(PROMPT, ("dalle1", "dalle2"), 5, 2, 0), page.line)
    drawing.start()
    views = list(drawing.follow())
    fractions = [view.fraction for view in views]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert any(0 < fraction < 1 for fraction in fractions)
    assert {len(view.preview) for view in views} > {0, 5}
    assert views[0].finished == {} and views[-1].preview == ()
    looked = next(view for view in views if view.preview)
    data = app.preview_of(looked).partition("base64,")[2].partition('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).width >= 16 * min(len(looked.preview), 8)
    assert "DALL-E 1: drawing token by token, candidates 1 to 5 of 5, step" in app.status_line(looked, 5)
    done = "Done: the best of 5, each with CLIP's score (more is closer) and its seed"
    assert app.last_line(views[-1], drawing.order) == f"{done}."
    first = views[-1].finished["dalle1"]
    recipes = [dataclasses.replace(each, settings={**each.settings, "decoder_weight": 0.1}) for each in first.recipes]
    led = View("dalle2", finished={**views[-1].finished, "dalle1": dataclasses.replace(first, recipes=recipes)})
    assert app.last_line(led, drawing.order) == f"{done}; DALL-E 2's decoder had a say in DALL-E 1's order."


def test_stop_keeps_what_is_finished(page: app.Page, quick_news: None) -> None:
    drawing = Drawing(page.family, Order(PROMPT, ("dalle1", "dalle2"), 64, 2, 0), page.line)
    drawing.start()
    for view in drawing.follow():
        if "dalle1" in view.finished:
            page.end(drawing)
    assert view.finished["dalle1"].complete
    assert "dalle2" not in view.finished or not view.finished["dalle2"].complete
    assert re.fullmatch(r"Stopped: \d finished pictures\.", app.last_line(view, drawing.order))


def test_those_who_wait_are_told_their_place_and_can_leave(page: app.Page, somebody: str) -> None:
    request = page.draw(PROMPT, "dalle1", 1, 1, 0)
    drawing = next(request)[page.running]
    assert next(request)[page.status] == "Waiting: 1 before you."
    page.end(drawing)
    assert list(request)[-1][page.status] == "Stopped: no finished pictures."
    page.end(None)  # Stop of a visitor for whom nothing is drawn


def test_the_drawing_of_a_visitor_who_leaves_is_stopped(page: app.Page, somebody: str) -> None:
    request = page.draw(PROMPT, "dalle1", 1, 1, 0)
    drawing = next(request)[page.running]
    request.close()
    assert drawing.stopping
    *_, last = drawing.follow()
    assert last == View("dalle1")


def test_a_line_is_first_come_first_served() -> None:
    line = Line()
    for ticket in "abc":
        line.join(ticket)
    assert [line.before(ticket) for ticket in "abcd"] == [0, 1, 2, 0]
    assert line.wait("a", 0) and not line.wait("b", 0.01)
    line.leave("b")
    line.leave("a")
    assert line.wait("c", 0)


def test_examples_are_prompts_that_the_family_knows(tiny_family: Family) -> None:
    def examples(words: list[str] | None) -> list[str]:
        return app.examples_for(dataclasses.replace(tiny_family, info={**tiny_family.info, "words": words}))

    assert examples("two pandas on a red background".split()) == ["two pandas on a red background"]
    assert examples(["tigers"]) == examples(None) == []


def test_only_the_pipelines_of_the_family_are_offered(page: app.Page, tiny_family: Family) -> None:
    assert [value for _, value in page.choice.choices] == ["dalle1", "dalle2", "both"]
    parts = {part: tiny_family.info["parts"][part] for part in ("clip", "dvae", "transformer")}
    half = dataclasses.replace(tiny_family, info={**tiny_family.info, "parts": parts}, dalle2=None)
    alone = app.Page(half, Line())
    assert [value for _, value in alone.choice.choices] == ["dalle1"] and list(alone.galleries) == ["dalle1"]


def test_the_page_stands_above_the_pipelines() -> None:
    modules = set()
    for node in ast.walk(ast.parse(Path(app.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    ours = {module for module in modules if module.split(".")[0] in ("genpipe", "pipelines")}
    assert {module for module in ours if not module.startswith("pipelines.")} == {"genpipe.errors", "genpipe.images"}
    assert page_module().__file__ == app.__file__


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_that_cannot_be_used_is_refused_in_one_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InputError, match="choose another --port or --host"):
            check_address("127.0.0.1", other.getsockname()[1])
    with pytest.raises(InputError, match="cannot be served at nowhere.invalid:7860"):
        check_address("nowhere.invalid", 7860)
    check_address("127.0.0.1", free_port())


@pytest.fixture(scope="module")
def served(tiny_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[gr.Blocks, str, Line]]:
    """The page on a free port."""
    line = Line()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("cache")))
        blocks = app.build(tiny_family, line)
        url = app.serve(blocks, "127.0.0.1", free_port())
        yield blocks, url, line
        blocks.close(verbose=False)


def test_two_clients_at_once_get_their_own(served: tuple[gr.Blocks, str, Line], tmp_path: Path) -> None:
    _, url, _ = served
    orders = {"a cat on a white background": ("dalle1", 3), "two dogs on a blue background": ("dalle2", 40)}

    def visit(prompt: str) -> list[Path]:
        client = Client(url, verbose=False, download_files=str(tmp_path), httpx_kwargs={"timeout": SECONDS})
        choice, seed = orders[prompt]
        *_, first, second = client.predict(prompt, choice, 3, 2, seed, api_name="/draw")
        return [Path(each["image"]) for each in (first if choice == "dalle1" else second)]

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(orders, pool.map(visit, orders), strict=True))
    for prompt, paths in results.items():
        recipes = [read_recipe(path) for path in paths]  # as served: the bytes have kept it
        assert {(recipe["prompt"], recipe["pipeline"]) for recipe in recipes} == {(prompt, orders[prompt][0])}
        assert {recipe["call"]["first_seed"] for recipe in recipes} == {orders[prompt][1]} and len(recipes) == 2
        assert recipes[0]["score"] >= recipes[1]["score"]


def test_a_client_is_told_what_is_wrong(served: tuple[gr.Blocks, str, Line]) -> None:
    client = Client(served[1], verbose=False, httpx_kwargs={"timeout": SECONDS})
    with pytest.raises(AppError, match="The prompt is empty; say in a few words what to draw."):
        client.predict(" ", "both", 3, 2, 0, api_name="/draw")


def test_a_closed_tab_stops_its_drawing(served: tuple[gr.Blocks, str, Line]) -> None:
    blocks, url, line = served
    (number,) = [each["id"] for each in blocks.config["dependencies"] if each["api_name"] == "draw"]
    ticket, after = "somebody", "somebody after"
    line.join(ticket)
    try:
        body = {"data": [PROMPT, "dalle1", 1, 1, 0], "fn_index": number, "session_hash": "tab"}
        httpx.post(f"{url}gradio_api/queue/join", json=body, timeout=SECONDS).raise_for_status()
        address = f"{url}gradio_api/queue/data?session_hash=tab"
        with httpx.stream("GET", address, timeout=SECONDS) as events:
            next(text for text in events.iter_lines() if "Waiting: 1 before you." in text)
            line.join(after)
            assert line.before(after) == 2
        end = time.monotonic() + SECONDS
        while line.before(after) == 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert line.before(after) == 1
        line.leave(after)
    finally:
        line.leave(ticket)


def test_the_page_needs_no_network_and_tells_nobody(served: tuple[gr.Blocks, str, Line]) -> None:
    blocks, url, _ = served
    assert blocks.share is False and blocks.share_url is None
    assert blocks.config["analytics_enabled"] is False and blocks.server_name == "127.0.0.1"
    text = httpx.get(url, timeout=SECONDS).text
    assert "genpipe" in text
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\W*(https?:[^\s\"'>]*)", text)
    theme = httpx.get(f"{url}theme.css", timeout=SECONDS).text
    imported = re.findall(r"(?:@import|url\()\W*(https?:[^\s\"')]*)", theme + json.dumps(blocks.config["css"]))
    assert [each for each in loaded + imported if not each.startswith(url)] == []
