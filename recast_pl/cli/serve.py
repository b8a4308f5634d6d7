"""The command `serve`: serves trained tasks over HTTP."""

import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.interruption import interruptible
from recast_pl.cli.options import chosen_device, declare_device, declare_trust
from recast_pl.errors import RunError
from recast_pl.inference.following import Follower, following, forget_received, keep_received
from recast_pl.inference.predictor import Predictor, load
from recast_pl.inference.server.limits import Limits
from recast_pl.optional_imports import extra
from recast_pl.runs.folder import RunFolder
from recast_pl.terminal import open_console

_LIBRARIES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")

_FOLLOW = 2.0  # seconds between two looks at the run folder

_LINES = 100  # of the access log in a second

_IDLE = 5  # seconds until an idle connection is closed


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 for any free one.")
    hosts = "Host names that requests may use, * for any (default: any, or localhost if the server listens only there)."
    parser.add_argument("--allowed_hosts", type=str, nargs="+", default=[], help=hosts)
    patches = "Patch files to serve beside the tasks of the run; signatures/NAME beside patches/NAME is used, too."
    parser.add_argument("--patches", type=str, nargs="+", default=[], help=patches)
    origins = "Origins whose pages may use the server, such as https://www.example.org, or * for all (default: none)."
    parser.add_argument("--allowed_origins", type=str, nargs="+", default=[], help=origins)
    root_path = "Path under which a proxy shows the server, such as /recast (default: the root)."
    parser.add_argument("--root_path", type=str, default="", help=root_path)
    parser.add_class_arguments(Limits)
    declare_device(parser)
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Serves until a signal arrives, and still answers the requests that have arrived by then."""
    for library in _LIBRARIES:
        extra(library, "serve")
    import uvicorn  # noqa: PLC0415

    limits = Limits(**{field.name: config[field.name] for field in fields(Limits)})
    _check_root_path(config.root_path)
    with _listening(config.host, config.port) as (listener, address), interruptible():
        predictor = load(config.run_dir, device=chosen_device(config), trust=config.trust)
        for file in map(Path, config.patches):
            signature = file.parent.parent / "signatures" / file.with_suffix(".safetensors").name
            predictor.add_patch(file, signature if signature.is_file() else None)
        log, folder = open_console(stderr=True), RunFolder(config.run_dir)
        follower = Follower(predictor, folder, lambda text: log.print(text, soft_wrap=True, markup=False))
        settings = _settings(config, limits, predictor, folder)
        follower.look()
        _set_up_logs()
        open_console().print(f"serving {', '.join(predictor.tasks)} at {address}; Ctrl-C stops it", soft_wrap=True)
        with following(follower, _FOLLOW):
            uvicorn.Server(settings).run([listener])  # answers pending requests, then raises the signal again
    return 0


def _check_root_path(path: str) -> None:
    """Raises RunError unless a path begins with a slash; it may be empty."""
    if path and not re.fullmatch(r"(/[\w.~-]+)+/?", path, re.ASCII):
        raise RunError(f"root_path is {path!r}; give a path that begins with a slash, such as /recast")


def _settings(config: Namespace, limits: Limits, predictor: Predictor, folder: RunFolder) -> Any:
    """The application and its settings for uvicorn."""
    import uvicorn  # noqa: PLC0415

    from recast_pl.compat.uvicorn import BoundedProtocol  # noqa: PLC0415
    from recast_pl.inference.server.app import create_app  # noqa: PLC0415
    from recast_pl.inference.server.request_filter import LOCAL_HOSTS  # noqa: PLC0415
    from recast_pl.inference.server.schema import TOKEN_VARIABLE  # noqa: PLC0415

    seconds = math.ceil(limits.timeout)
    app = create_app(
        predictor,
        limits,
        os.environ.get(TOKEN_VARIABLE) or None,
        config.allowed_hosts or (LOCAL_HOSTS if config.host in LOCAL_HOSTS else ["*"]),
        partial(keep_received, folder),
        partial(forget_received, folder),
        config.allowed_origins,
        config.root_path,
    )
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,  # the application has one
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=min(_IDLE, seconds),
        timeout_graceful_shutdown=seconds,
    )


def _set_up_logs() -> None:
    """Writes a line for each request to standard error, and keeps the log short."""
    from recast_pl.inference.server.log_filter import LogFilter, RateFilter  # noqa: PLC0415
    from recast_pl.inference.server.request_log import ACCESS_LOG  # noqa: PLC0415

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the client gets its warnings as an error
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(LogFilter())
    access, handler = logging.getLogger(ACCESS_LOG), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(RateFilter(_LINES))
    access.setLevel(logging.INFO)
    access.handlers = [handler]


@contextmanager
def _listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Opens a socket, and yields it with its URL; called before anything is loaded, so that errors show at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as cause:
        raise RunError(f"cannot listen at {host}, port {port} ({cause}); choose another --host or --port") from cause
    with listener:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        yield listener, f"http://{shown}:{listener.getsockname()[1]}"
