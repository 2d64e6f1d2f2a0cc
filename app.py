"""The page in the browser over the pipelines: a prompt in, pictures of both systems out, best first.

Widgets and callbacks only. `genpipe demo` starts it, for this machine alone unless it is told otherwise.
"""

import base64
import html
import io
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from genpipe.errors import InputError
from genpipe.images import make_grid, save_png
from pipelines.background import Drawing, Finished, Line, Order, View
from pipelines.devices import choose_device
from pipelines.family import Family, load_family
from pipelines.request import unknown_words

LABELS = {"dalle1": "DALL-E 1", "dalle2": "DALL-E 2"}
BOTH = "both"
STAGES = {
    "transformer": "drawing token by token",
    "prior": "imagining (prior)",
    "decoder": "drawing (decoder)",
    "upsampler": "enlarging the best (upsampler)",
}
EXAMPLES = [
    "three strawberries on a white background",
    "a penguin above a rocket on a grey background",
    "two pandas on a red background",
    "a small rocket on a navy background",
    "a carrot left of a strawberry on a yellow background",
]
MAX_CANDIDATES = 64
PREVIEW_COLUMNS = 8
CACHE_SECONDS = (3600, 24 * 3600)  # how often the server looks for old pictures, and how old they may become
MAX_VISITORS = 20  # drawing and waiting at a time; each takes one of the server's 40 threads
UNEXPECTED = "Something went wrong that should not have; the terminal that the page was started from says what."

# Pictures of a few pixels are shown as they are, not blurred.
STYLE = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.pictures img, .preview img { image-rendering: pixelated; }
.pictures .grid-wrap { min-height: 0; max-height: none; padding-top: 36px; }
.pictures .caption-label { right: 0; bottom: 0; padding: 0 5px; font-size: 11px; }
.preview img { display: block; width: 100%; max-width: 640px; margin: 0 auto; }
.bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; margin-bottom: 6px; }
.bar div { height: 100%; background: var(--color-accent); }
"""

Updates = dict[Any, Any]  # component -> its new value or properties


def examples_for(family: Family) -> list[str]:
    """Prompts whose words this family was trained on."""
    words = family.words
    return [prompt for prompt in EXAMPLES if words is not None and not unknown_words(prompt, frozenset(words))]


def status_line(view: View, candidates: int) -> str:
    """How far the drawing is, as HTML: a bar, and a sentence below it."""
    if view.before:
        return f"Waiting: {view.before} before you."
    progress, what = view.progress, "starting"
    if progress is not None:
        first, last = progress.finished + 1, progress.finished + progress.running
        which = f", candidate {first}" if first == last else f", candidates {first} to {last}"
        where = "" if progress.stage == "upsampler" else f"{which} of {candidates}"
        what = f"{STAGES.get(progress.stage, 'drawing')}{where}, step {progress.step} of {progress.num_steps}"
    percent = round(100 * view.fraction)
    bar = f'<div class="bar" role="progressbar" aria-valuenow="{percent}"><div style="width: {percent}%"></div></div>'
    return f"{bar}<div>{LABELS[view.pipeline]}: {html.escape(what)}</div>"


def last_line(view: View, order: Order) -> str:
    """What a drawing that is over is summed up as."""
    complete = [each.complete for each in view.finished.values()]
    if len(complete) == len(order.pipelines) and all(complete):
        recipes = [recipe for each in view.finished.values() for recipe in each.recipes]
        if any(recipe.score is None for recipe in recipes):
            return "Done: not ranked, since these weights have no CLIP that sees pictures; each with its seed."
        judged = any(recipe.settings.get("decoder_weight") for recipe in recipes)
        order_by = "; DALL-E 2's decoder had a say in DALL-E 1's order" if judged else ""
        best = f"the best of {order.num_candidates}, each with CLIP's score (more is closer) and its seed"
        return f"Done: {best}{order_by}."
    kept = sum(len(each.images) for each in view.finished.values())
    return f"Stopped: {kept or 'no'} finished {'picture' if kept == 1 else 'pictures'}."


def preview_of(view: View) -> str:
    """The candidates that are being drawn, as one picture inside HTML: no file is written for it."""
    if not view.preview:
        return ""
    stream = io.BytesIO()
    make_grid(view.preview, columns=PREVIEW_COLUMNS).save(stream, format="PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="The candidates so far" src="data:image/png;base64,{data}">'


def saved(name: str, finished: Finished, folder: Path) -> list[tuple[str, str]]:
    """Write pictures with their recipes inside; (path, caption) for the gallery, best first."""
    items = []
    for image, recipe in zip(finished.images, finished.recipes, strict=True):
        path = folder / f"genpipe-{name}-seed{recipe.seed}.png"
        save_png(image, path, recipe.to_json())
        score = "" if recipe.score is None else f"{recipe.score:.3f}, "
        items.append((str(path), f"{score}seed {recipe.seed}"))
    return items


class Page:
    """The widgets, and what happens when they are used.

    It holds what visitors share: the family, the widgets, the line they wait in. What belongs to one press of Draw
    lives in that call and, so that Stop can find it, in the visitor's own `gr.State`.
    """

    def __init__(self, family: Family, line: Line) -> None:
        self.family, self.line = family, line
        self.names = tuple(family.pipelines)
        with gr.Blocks(title="genpipe", analytics_enabled=False, delete_cache=CACHE_SECONDS) as self.blocks:
            gr.HTML(f"<h1>genpipe</h1><p>{html.escape(str(family.info.get('description') or family.name))}</p>")
            self.running = gr.State(None)  # this visitor's Drawing
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self._place_questions()
                with gr.Column(scale=3, min_width=300):
                    self._place_answers()
            examples = [[each] for each in examples_for(family)]
            if examples:
                gr.Examples(examples, [self.prompt], cache_examples=False, label="For example")
            self._wire()

    def _place_questions(self) -> None:
        choices = [(LABELS[name], name) for name in self.names]
        if len(choices) > 1:
            choices.append(("both", BOTH))
        self.prompt = gr.Textbox(label="Prompt", placeholder="What should be drawn?", lines=1, max_lines=4)
        with gr.Row():
            self.start = gr.Button("Draw", variant="primary", min_width=120)
            self.stop = gr.Button("Stop", variant="stop", min_width=120, visible=False)
        self.choice = gr.Radio(choices, value=choices[-1][1], label="Drawn by")
        self.candidates = gr.Slider(1, MAX_CANDIDATES, 8, step=1, label="Candidates")
        self.keep = gr.Slider(1, MAX_CANDIDATES, 4, step=1, label="Keep the best")
        self.seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="The same seed draws the same pictures.")

    def _place_answers(self) -> None:
        self.status = gr.HTML("The pictures come here.", padding=True)
        self.preview = gr.HTML(visible=False, elem_classes="preview")
        self.galleries = {}
        with gr.Row():
            for name in self.names:
                self.galleries[name] = gr.Gallery(
                    label=LABELS[name],
                    columns=2,
                    height="auto",
                    min_width=240,
                    object_fit="contain",
                    format="png",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                    elem_classes="pictures",
                )

    def _wire(self) -> None:
        gr.on(
            [self.start.click, self.prompt.submit],
            self.draw,
            [self.prompt, self.choice, self.candidates, self.keep, self.seed],
            [self.running, self.start, self.stop, self.status, self.preview, *self.galleries.values()],
            api_name="draw",
            api_visibility="undocumented",  # callable, and in no browser's history of runs
            concurrency_limit=MAX_VISITORS,
            show_progress="hidden",  # the page shows its own
            trigger_mode="once",
        )
        self.stop.click(self.end, self.running, queue=False, show_progress="hidden", api_visibility="private")

    def end(self, running: Drawing | None) -> None:
        """Stop this visitor's drawing; what is finished is kept."""
        if running is not None:
            running.stop()

    def draw(self, prompt: str, choice: str, candidates: int, keep: int, seed: int) -> Iterator[Updates]:
        """Carry out one order, and show it as it goes. Closed early (the visitor left), it stops the drawing."""
        order = Order(prompt or "", self.names if choice == BOTH else (choice,), candidates, keep, seed)
        drawing = Drawing(self.family, order, self.line)
        shown: Updates = {}  # what the galleries show
        warned = 0
        with tempfile.TemporaryDirectory(prefix="genpipe-") as folder:
            try:
                drawing.start()
                yield self._first_look(drawing)
                for view in drawing.follow():
                    for message in view.warnings[warned:]:
                        gr.Warning(html.escape(message, quote=False))
                    warned = len(view.warnings)
                    yield self._look(view, order, Path(folder), shown)
                yield {**self._last_look(last_line(view, order)), **shown}  # all of it, for whoever calls as a client
            except Exception as error:
                expected = isinstance(error, InputError | FloatingPointError)
                message = html.escape(str(error) if expected else UNEXPECTED, quote=False)
                yield self._last_look(message)
                raise gr.Error(message, title="Not drawn", print_exception=not expected) from error
            finally:
                drawing.stop()

    def _first_look(self, drawing: Drawing) -> Updates:
        galleries = {
            gallery: gr.update(value=[], visible=name in drawing.order.pipelines)
            for name, gallery in self.galleries.items()
        }
        return {
            self.running: drawing,
            self.start: gr.update(interactive=False),
            self.stop: gr.update(visible=True),
            self.status: "",
            self.preview: gr.update(value="", visible=True),
            **galleries,
        }

    def _last_look(self, message: str) -> Updates:
        return {
            self.running: None,
            self.start: gr.update(interactive=True),
            self.stop: gr.update(visible=False),
            self.status: message,
            self.preview: gr.update(value="", visible=False),
        }

    def _look(self, view: View, order: Order, folder: Path, shown: Updates) -> Updates:
        updates: Updates = {
            self.status: status_line(view, order.num_candidates),
            self.preview: preview_of(view),
        }
        for name, finished in view.finished.items():
            gallery = self.galleries[name]
            if gallery not in shown:
                updates[gallery] = shown[gallery] = saved(name, finished, folder)
        return updates


def build(family: Family, line: Line | None = None) -> gr.Blocks:
    """The page over a family; pages that share a machine share a line."""
    return Page(family, line or Line()).blocks


def serve(blocks: gr.Blocks, host: str, port: int, open_browser: bool = False) -> str:
    """Serve a page in the background, without a share link and without telling anybody; returns its address.

    Raises InputError where it cannot be served.
    """
    try:
        _, url, _ = blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # nothing that has to be fetched
            css=STYLE,
        )
    except OSError as error:
        raise InputError(f"The page cannot be served at {host}:{port}; choose another --port or --host.") from error
    return url


def main(
    family: str | os.PathLike[str] = "nano",
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    device: str = "auto",
) -> None:
    """Serve the page until Ctrl-C. Raises InputError for a family, a device or an address that cannot be used."""
    loaded = load_family(family, device=choose_device(device))
    with tempfile.TemporaryDirectory(prefix="genpipe-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what visitors see lies in here: closed to other users, gone at the end
        no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        os.environ["no_proxy"] = f"{no_proxy},localhost,{host}"  # the server asks itself whether it is up
        blocks = build(loaded)
        print(f"The page is at {serve(blocks, host, port, open_browser)} (Ctrl-C ends it).", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the page as Ctrl-C does
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        blocks.close(verbose=False)


if __name__ == "__main__":
    main()
