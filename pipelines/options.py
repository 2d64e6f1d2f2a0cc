"""Options that several verbs of the command line share: the same name and the same help wherever they appear."""

from typing import Annotated

import typer

FamilyOption = Annotated[
    str, typer.Option(help="Weights to use: a shipped family, a folder, or a Hub id (owner/name).")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, or an accelerator as listed by `genpipe info`.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")
]
ObjectsOption = Annotated[
    str,
    typer.Option(
        help="Of emoji scenes: common, the forty that small models have time to learn, all, or mixed: half common."
    ),
]
ClipOption = Annotated[
    str,
    typer.Option(
        help="A family, a published CLIP's folder, file or Hub id, or open_clip's MODEL:WEIGHTS, as ViT-B-32:openai."
    ),
]
