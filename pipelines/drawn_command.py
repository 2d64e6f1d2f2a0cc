"""`genpipe data draw`: pictures that a family draws for captions of training scenes, for its CLIP to learn from."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genpipe.errors import InputError
from pipelines import request
from pipelines.options import DeviceOption, ObjectsOption
from pipelines.terminal import INTERRUPTED, polite_interrupt, progress_bar, say, show

_AT_ONCE = 32
_UNPLACED_SHARE = 0.3  # pairs without a stated place are the hardest to draw, and rare among captions


def draw_data(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A shipped family, a folder, or a Hub id.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A new file, NAME.safetensors.", show_default=False)],
    pipeline: Annotated[str, typer.Option(help="dalle1 or dalle2.")] = "dalle1",
    count: Annotated[int, typer.Option(help="Pictures, one for each scene.")] = 4096,
    objects: ObjectsOption = "common",
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Draw training scenes by their captions; CLIP learns to rank the scenes above such pictures.

    The folder of the files is what `genpipe train clip --set objective.drawn=FOLDER` takes. Ctrl-C keeps what is drawn.
    """
    request.check_positive("The number of pictures", count)
    request.check_counts(1, 1, seed, None)
    import numpy as np

    from genpipe.data.drawn import SUFFIX, DrawnSettings, save_drawn
    from pipelines.devices import choose_device
    from pipelines.family import load_family
    from pipelines.family_info import describe_family
    from pipelines.output import OutputFolder

    if out.suffix != SUFFIX:
        raise InputError(f"{str(out)!r} must end in {SUFFIX}.")
    if out.exists():
        raise InputError(f"There is a file {str(out)!r} already, which took its time to draw; name another one.")
    described = describe_family(family)
    described.check_has(pipeline)
    scenes = DrawnSettings(seed, 32, objects, _UNPLACED_SHARE).scenes()  # captions do not depend on the size
    folder = OutputFolder(out.parent)  # one that cannot be written is refused before hours of drawing
    family_there = load_family(described.folder, device=choose_device(device), pipelines=[pipeline])
    loaded: Any = family_there.pipeline(pipeline)  # either kind, with its own settings
    sampling = loaded.resolve_sampling({"upsample": False})
    drawn: list[np.ndarray] = []
    with polite_interrupt() as interrupt, progress_bar("drawing", count) as bar:
        for first in range(0, count, _AT_ONCE):
            captions = [scenes.example(index).caption for index in range(first, min(first + _AT_ONCE, count))]
            output = loaded(
                captions, num_candidates=1, keep=1, seed=first, sampling=sampling, callback=lambda _: interrupt.pressed
            )
            if not output.complete:
                break
            drawn += [np.asarray(images[0]).transpose(2, 0, 1) for images in output.images]
            bar.update(len(captions))
    if not drawn:
        folder.discard_if_empty()
        say("interrupted", "nothing was drawn yet")
        raise typer.Exit(INTERRUPTED)
    save_drawn(out, np.stack(drawn), DrawnSettings(seed, drawn[0].shape[-1], objects, _UNPLACED_SHARE))
    show(str(out))
    say("drawn", f"{len(drawn):,} of {count:,} pictures")
    if len(drawn) < count:
        raise typer.Exit(INTERRUPTED)
