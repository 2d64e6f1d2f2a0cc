"""`torchrun --nproc_per_node 2 -m genpipe.training RECIPE --set key=value`: `genpipe train` on several processes.

`accelerate launch` starts them, too, on GPUs; without one it starts a single process, however many are asked for.
"""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

from genpipe.errors import InputError

INTERRUPTED = 130  # what a shell expects of a command that Ctrl-C ended


def run(recipe: str, overrides: list[str], minutes: float | None, out: Path | None, resume: bool) -> None:
    """Train a shipped recipe with overrides in folder `out` (default runs/RECIPE).

    Raises InputError for bad input, FloatingPointError for a training that diverged, and KeyboardInterrupt after an
    interrupted run was saved and its checkpoint named on standard error.
    """
    from genpipe.training.config import apply_overrides  # torch is imported only once the arguments were read
    from genpipe.training.recipes import recipe as shipped

    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes is {minutes}; it must be above 0.")
    resolved = apply_overrides(shipped(recipe), overrides)

    from genpipe.training.loop import Trainer

    trainer = Trainer(resolved, out or Path("runs") / recipe, minutes=minutes, resume=resume)
    if trainer.main:
        print(json.dumps(resolved.to_dict(), indent=1), file=sys.stderr)
        if trainer.bent:
            print(f"resumed with other settings than before: {', '.join(trainer.bent)}", file=sys.stderr)
    result = trainer.run()
    trainer.accelerator.end_training()
    if trainer.main:
        steps = resolved.run.steps
        if result.report.read:
            print(f"data: {result.report}", file=sys.stderr)
        if result.stopped_early:
            print(f"stopped early at step {result.step} of {steps}: validation no longer got better", file=sys.stderr)
        elif result.step < steps:
            print(
                f"stopped at step {result.step} of {steps}; the same command goes on from {result.checkpoint}",
                file=sys.stderr,
            )
        made = f"{result.step} of {steps} steps" if result.step <= steps else f"{result.step} steps were made before"
        print(f"{made}; weights in {result.part}")
    if result.interrupted:
        raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(prog="genpipe.training", description="Train one part of a family.")
    parser.add_argument("recipe", help="name of a shipped recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a setting"
    )
    parser.add_argument("--minutes", type=float, help="stop after this many minutes, with a checkpoint")
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/RECIPE)")
    parser.add_argument("--no-resume", action="store_true", help="start anew even if the folder has a checkpoint")
    arguments = parser.parse_args()
    code = 0
    try:
        run(arguments.recipe, arguments.overrides, arguments.minutes, arguments.out, not arguments.no_resume)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:
        traceback.print_exc()
        code = 1
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the other processes wait for this one; a clean interpreter exit would wait with them
    sys.exit(code)


if __name__ == "__main__":
    main()
