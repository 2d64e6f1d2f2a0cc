"""`accelerate launch -m genpipe.training RECIPE --set key=value`: the same as `genpipe train`, on any number of processes."""

import argparse
import json
import os
import sys
from pathlib import Path

from genpipe.errors import InputError


def run(recipe: str, overrides: list[str], minutes: float | None, out: Path | None, resume: bool) -> None:
    """Train a shipped recipe with overrides in folder `out` (default runs/RECIPE). Raises InputError for bad input."""
    from genpipe.training.config import apply_overrides  # torch is imported only once the arguments were read
    from genpipe.training.loop import Trainer
    from genpipe.training.recipes import recipe as shipped

    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes is {minutes}; it must be above 0")
    resolved = apply_overrides(shipped(recipe), overrides)
    trainer = Trainer(resolved, out or Path("runs") / recipe, minutes=minutes, resume=resume)
    if trainer.main:
        print(json.dumps(resolved.to_dict(), indent=1), file=sys.stderr)
    result = trainer.run()
    if trainer.main:
        print(f"{result.step} of {resolved.run.steps} steps; weights in {result.part}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="genpipe.training", description="Train one part of a family.")
    parser.add_argument("recipe", help="name of a shipped recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a setting")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes, with a checkpoint")
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/RECIPE)")
    parser.add_argument("--no-resume", action="store_true", help="start anew even if the folder has a checkpoint")
    arguments = parser.parse_args()
    try:
        run(arguments.recipe, arguments.overrides, arguments.minutes, arguments.out, not arguments.no_resume)
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)  # other ranks may wait in a collective; a clean interpreter exit would wait with them


if __name__ == "__main__":
    main()
