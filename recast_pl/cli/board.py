"""The command `board`: methods on several streams with several seeds, into JSON files and one page."""

import json
import pkgutil
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.cli.comparing import declare_fit_options, fit_options, run_studies
from recast_pl.cli.parser import command_parser
from recast_pl.config.elements import parse_options
from recast_pl.config.files import find_config
from recast_pl.config.run import config_text, til
from recast_pl.errors import RunError
from recast_pl.files import write_atomic
from recast_pl.methods.piece import Piece
from recast_pl.reporting.board import PAGE, has_results, write_board
from recast_pl.studies.board import Board, BoardConfig, Trial, read_board
from recast_pl.studies.comparison import Point, config_words
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    file = "YAML file of the board; also in configs/. Without it, the page is written from the results in --output."
    parser.add_argument("-c", "--config", type=str | None, help=file)
    output = "Folder for STREAM/METHOD.json and the page; a method with results is not trained again."
    parser.add_argument("--output", type=str, required=True, help=output)
    runs = "Folder for the runs, as STREAM/METHOD/RATE/SEED."
    parser.add_argument("--runs", type=str, default="logs/board", help=runs)
    parser.add_argument("--streams", type=str, nargs="+", default=[], help="Streams to train (default: all).")
    parser.add_argument("--methods", type=str, nargs="+", default=[], help="Methods to train (default: all).")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="Seeds to train with (default: the board's).")
    parser.add_argument("--data_root", type=str | None, help="Folder of data sets known by name.")
    variables = "Values of the board's variables: NAME=VALUE."
    parser.add_argument("--variables", type=str, nargs="+", default=[], help=variables)
    declare_fit_options(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Trains what has no results yet, writes results and the page, and prints tables."""
    output = Path(config.output)
    if config.config is not None:
        command = _command(parser, config)
        config.engine = parser.instantiate(config).engine
        trials = list(_trials(config, output, command))
        if trials and (status := run_studies([Board(output, trials)], config.engine)):
            return status
    write_board(output)
    open_console().print(f"page: {output / PAGE}.md", soft_wrap=True)
    return 0


def _command(parser: ArgumentParser, config: Namespace) -> str:
    """Returns the command line without the options that have their defaults."""
    words = ["board"]
    for name, value in vars(config).items():
        if value != parser.get_default(name):
            text = json.dumps(value.as_dict()) if isinstance(value, Namespace) else value
            words += [f"--{name}", *map(str, text if isinstance(text, list) else [text])]
    return f"python -m recast_pl {shlex.join(words)}"


def _trials(config: Namespace, output: Path, command: str) -> Iterator[Trial]:
    """Yields the chosen methods on the chosen streams that have no results yet for some seeds."""
    board = read_board(Path(find_config(config.config)), _variables(config.variables))
    options = fit_options(config.options, config.engine)
    if config.data_root is not None:
        options = ["--data.root", config.data_root, *options]
    _check_names(config, board)
    seeds, fit = list(dict.fromkeys(config.seeds or board.seeds)), command_parser("fit")
    for stream in dict.fromkeys(config.streams or board.streams):
        entry, runs = board.streams[stream], Path(config.runs) / stream
        for method in [name for name in entry.methods if name in (config.methods or entry.methods)]:
            if has_results(output, stream, method, seeds, entry.settings[method]):
                continue
            base = [*entry.base, *_write(runs / "stream.yaml", entry.config)]
            words = config_words([*base, *_method_configs(entry.methods[method].config, runs / method)])
            points = _points(fit, words, options, entry.methods[method].rates, runs / method)
            yield Trial(output, runs / method, stream, method, points, seeds, options, command, entry.settings[method])


def _variables(words: Sequence[str]) -> dict[str, str]:
    """Splits NAME=VALUE."""
    for word in words:
        if "=" not in word:
            raise RunError(f"--variables has {word!r}; write NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def _check_names(config: Namespace, board: BoardConfig) -> None:
    """Raises RunError if a chosen stream or method is unknown."""
    methods = dict.fromkeys(name for entry in board.streams.values() for name in entry.methods)
    for what, chosen, known in (("stream", config.streams, board.streams), ("method", config.methods, methods)):
        for name in chosen:
            if name not in known:
                raise RunError(f"{config.config} has no {what} {name!r}; choose from {', '.join(known)}")


def _write(path: Path, content: Any) -> list[str]:
    """Writes a config; returns its path, or nothing if it would be empty."""
    if content:
        write_atomic(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return [str(path)] if content else []


def _method_configs(method: str | list[Any], folder: Path) -> list[str]:
    """Returns the config of a method, which is written if the board lists its pieces."""
    return [method] if isinstance(method, str) else _write(folder / "method.yaml", _model(method))


def _model(pieces: Sequence[Any], class_path: str = "recast_pl.TILModule") -> dict[str, Any]:
    return {"model": {"class_path": class_path, "init_args": {"pieces": list(pieces)}}}


def _points(
    fit: LightningArgumentParser, words: list[str], options: list[str], rates: Sequence[float], folder: Path
) -> list[Point]:
    """Returns a point for each rate, which all pieces that train numbers have; a single one if no piece does.

    Raises:
        RecastError: If the options cannot be used, images of a task are missing, or tasks share weights.
    """
    parsed = parse_options(fit, [*words, *options])
    _check_run(fit.instantiate(parsed))
    model = get_loader("yaml")(config_text(fit, parsed))["model"]
    pieces = model["init_args"]["pieces"]
    trained = [piece["init_args"] for piece in pieces if _has_rate(piece)]
    if not trained:
        return [Point("fixed", words, {})]
    points = []
    for rate in map(float, rates):
        for settings in trained:
            settings["learning_rate"] = rate
        name = f"rate-{rate:g}"
        config = _write(folder / name / "point.yaml", _model(pieces, model["class_path"]))
        points.append(Point(name, [*words, *config_words(config)], {"rate": rate}))
    return points


def _check_run(init: Namespace) -> None:
    """Raises RecastError if the images of a task are missing, or later tasks change the earlier ones."""
    init.data.check()
    sharing = [type(piece).__name__ for piece in til(init.model).pieces if not piece.isolated]
    if sharing and len(init.data.tasks) > 1:
        raise RunError(
            f"tasks share what {sharing[0]} trains, and a board chooses the rate by validation just after each task, "
            "before later tasks change it; use 'compare' for this method"
        )


def _has_rate(piece: Mapping[str, Any]) -> bool:
    """Whether a piece trains numbers: then their rate is an argument of its own class."""
    cls = pkgutil.resolve_name(piece["class_path"])
    return "learning_rate" in piece.get("init_args", {}) and cls.__init__ is not Piece.__init__
