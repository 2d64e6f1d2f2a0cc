"""The verb that opens the page in the browser: demo.

The page, app.py, stands above the pipelines and imports them. Like the trainer, it is handed over to when the verb is
called: no module of the pipelines needs it.
"""

import importlib.util
import os
import socket
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from genpipe.errors import InputError
from pipelines.options import DeviceOption, FamilyOption


def register(app: typer.Typer) -> None:
    """Give the command this verb."""
    app.command()(demo)


def demo(
    family: FamilyOption = "nano",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets everybody who can reach this machine draw on it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Draw in the browser: a page served from this machine, for this machine alone unless --host says otherwise."""
    from pipelines.family_info import describe_family

    described = describe_family(family)  # refused, if need be, before anything heavy is imported
    check_address(host, port)
    page_module().main(described.folder, host=host, port=port, open_browser=open_browser, device=device)


def check_address(host: str, port: int) -> None:
    """Raises InputError where no page can be served at this address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # what has just ended is no obstacle; elsewhere this would allow what is in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"The page cannot be served at {host[:80]}:{port} ({reason}); choose another --port or --host."
        ) from error


def page_module() -> ModuleType:
    """app.py, found beside the packages and not by its name: many a folder has another app.py.

    Raises InputError where it is missing.
    """
    path = Path(__file__).parent.parent / "app.py"
    spec = importlib.util.spec_from_file_location("app", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"The page {str(path)!r} is missing; install genpipe again.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
