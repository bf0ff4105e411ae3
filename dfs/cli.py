"""The ``dfs`` command."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import dfs
from dfs.data import AUTO, DATASETS, DataError, DataSplits, load_dataset, recognise
from dfs.data.picture import PictureError
from dfs.engine import freeze
from dfs.engine.budget import BudgetCurve
from dfs.latency import LatencyTable
from dfs.models import DynamicResNet, build_model
from dfs.predict import Predictor, predictions_table
from dfs.report import ResultRow, results_table
from dfs.train import StageError, TrainConfig, Trainer, evaluate
from dfs.train.checkpoint import CheckpointError
from dfs.train.config import PRESETS
from dfs.train.network import load_network
from dfs.train.trainer import stage_names

USER_ERROR = 2
# How many validation images budgets are measured on at most.
_CALIBRATION_IMAGES = 1024
RUN_FAILED = 1

app = typer.Typer(
    name="dfs",
    help="Train, look at and run networks that choose a bitwidth per image and block.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Older releases of typer take this class from click, newer ones carry it themselves.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


_DATASET_HELP = f"Kind of data set: {', '.join((AUTO, *DATASETS))}."
Dataset = Annotated[str | None, typer.Option(help=_DATASET_HELP)]
Data = Annotated[Path | None, typer.Option(help="Folder of the data set's files.")]
Waived = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-unverified-data",
        help="A data set or file that may differ from its published checksum; may be repeated.",
    ),
]


class UserError(Exception):
    """A mistake of the user's, told in one line."""


def main() -> None:
    """Entry point: a user's mistake prints one line and exits with 2."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message(), USER_ERROR)
    except (UserError, CheckpointError, DataError, ImportError, OSError) as error:
        _fail(str(error), USER_ERROR)
    except StageError as error:
        _fail(str(error), RUN_FAILED)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"dfs: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, table and plot.")] = Path(
        "runs/demo"
    ),
    as_json: Json = False,
) -> None:
    """Train a small dynamic network on scanned digits to two cost targets and compare."""
    from dfs.demo import run_demo

    with _run_control() as control:
        result = run_demo(out, control.progress, control.stopping)
    if result is None:
        raise typer.Exit(_stopped("the demonstration starts afresh next time"))
    if as_json:
        _print_json(result.to_dict())
    else:
        console = Console()
        console.print(result.table())
        console.print(f"Layer-wise decisions: {result.plot}", soft_wrap=True)
        console.print(f"The same figures for machines: {result.results}", soft_wrap=True)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    preset: Annotated[str, typer.Option(help="Settings to start from.")] = "digits",
    target: Annotated[
        float | None, typer.Option(help="Cost target as a fraction of full precision.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Such as resnet20: depth 6n + 2.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Widths on offer, such as 0,2,4,8 or 0,2,4,8,32.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything random.")] = None,
    dataset: Dataset = None,
    data: Data = None,
    waived: Waived = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, as name=value; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a dynamic network to a cost target, stage by stage; can be stopped and resumed."""
    given = {"target": target, "model": model, "choices": choices, "seed": seed}
    overrides = {name: value for name, value in given.items() if value is not None}
    checkpoint = out / "checkpoint.pt"
    if resume:
        if overrides or setting or dataset or waived:
            raise UserError("--resume takes its settings from the run; give none but --data")
        trainer = Trainer.load(out, data_folder=data)
    else:
        if checkpoint.exists():
            raise UserError(f"{out} already holds a run; use --resume, or another --out")
        overrides |= _data_settings(dataset, data, waived)
        trainer = _make_trainer(_configure(preset, overrides, setting or []), out)
    with _run_control() as control:
        finished = trainer.run(None, control.progress, control.stopping)
    if not finished:
        stage = stage_names()[trainer.stage_index]
        advice = f"saved in {stage}, step {trainer.step}; dfs train --out {out} --resume goes on"
        raise typer.Exit(_stopped(advice))
    _report_run(trainer, "test", as_json)


@app.command(name="eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or a checkpoint.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    data: Data = None,
    waived: Waived = None,
    as_json: Json = False,
) -> None:
    """Accuracy, cost and measured time of a trained run, beside its float network."""
    if split not in ("val", "test"):
        raise UserError(f"--split must be val or test, got {split!r}")
    if run.is_file():
        _report_network(run, split, data, waived or [], as_json)
        return
    if waived:
        raise UserError("--allow-unverified-data is for checkpoints; a run keeps its own")
    trainer = Trainer.load(run, data_folder=data)
    if not trainer.done:
        raise UserError(
            f"{run} is not finished: it is in stage {stage_names()[trainer.stage_index]!r}; "
            "dfs train --resume goes on with it"
        )
    _report_run(trainer, split, as_json)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures of any common format and size.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a finished run, or a checkpoint.")
    ] = None,
    engine: Annotated[Path | None, typer.Option(help="File that dfs freeze wrote.")] = None,
    as_json: Json = False,
) -> None:
    """Class, confidence, every block's bits, cost and time of each picture."""
    found = list(_make_predictor(checkpoint, engine).predict(images))
    unreadable = [error for error in found if isinstance(error, PictureError)]
    predictions = [one for one in found if not isinstance(one, PictureError)]
    if as_json:
        _print_json(
            {
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "engine": None if engine is None else str(engine),
                "predictions": [one.to_dict() for one in predictions],
                "unreadable": [str(error) for error in unreadable],
            }
        )
    elif predictions:
        Console().print(predictions_table(predictions))
    for error in unreadable:
        print(f"dfs: {error}", file=sys.stderr)
    if unreadable:
        raise typer.Exit(USER_ERROR)


def _make_predictor(checkpoint: Path | None, engine: Path | None) -> Predictor:
    if (checkpoint is None) == (engine is None):
        raise UserError("give --checkpoint or --engine, one of them")
    if checkpoint is not None:
        return Predictor.from_checkpoint(checkpoint)
    assert engine is not None
    try:
        return Predictor.from_engine(engine)
    except ValueError as error:
        raise UserError(str(error)) from error


@app.command(name="freeze")
def freeze_run(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="The engine file to write.")],
    calibrate_budget: Annotated[
        bool,
        typer.Option(
            "--calibrate-budget",
            help="Measure cost, time and accuracy of the budgets that can be set, on the "
            "validation images.",
        ),
    ] = False,
    data: Data = None,
    waived: Waived = None,
    as_json: Json = False,
) -> None:
    """Make a trained network into one file that only runs: folded, packed, fast."""
    if out.exists():
        raise UserError(f"--out {out} is there already")
    network = load_network(run)
    side = network.preprocessing.size
    try:
        engine = freeze(network.model, (side, side), network.preprocessing)
        if calibrate_budget:
            splits = _data_of(network.config, data, waived or [])
            val = splits.prepared(network.preprocessing).val
            with Console(stderr=True).status("calibrating budgets"):
                images = val.first(_CALIBRATION_IMAGES)
                engine.calibrate_budget(images, val.labels[: len(images)])
    except ValueError as error:
        raise UserError(f"{run}: {error}") from error
    engine.save(out)
    curve = engine.budget_curve
    if as_json:
        points = None if curve is None else curve.to_json()
        _print_json({"engine": str(out), "bytes": out.stat().st_size, "budgets": points})
        return
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")
    if curve is not None:
        Console().print(_budget_table(curve))


@app.command(name="import-authors")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="Such as the authors' model_best.pth.tar.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    choices: Annotated[
        str | None, typer.Option(help="What the gate's outputs mean, such as 0,4,8,16,32.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a checkpoint of the paper's authors (Torment123/DFS) into one of this project's."""
    from dfs.import_authors import import_authors

    if out.exists():
        raise UserError(f"--out {out} is there already")
    found = import_authors(file, out, None if choices is None else _parse_choices(choices))
    if as_json:
        _print_json({"checkpoint": str(out), **found.to_dict()})
    else:
        widths = "/".join(map(str, found.choices))
        print(f"{out}: ResNet-{found.depth} for {found.dataset}, choices {widths}")


@app.command()
def bench(
    latency_table: Annotated[
        Path, typer.Option(help="File to write, milliseconds per block shape and width.")
    ],
    model: Annotated[str, typer.Option(help="Such as resnet20.")] = "resnet20",
    image_size: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    classes: Annotated[int, typer.Option(help="How many there are.")] = 10,
    choices: Annotated[str, typer.Option(help="Widths that the gate picks from.")] = "0,2,4,8",
    gate: Annotated[str, typer.Option(help="rnn, feedforward or constant.")] = "rnn",
    stream: Annotated[str, typer.Option(help="uint8 or float32.")] = "uint8",
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Of the kernels.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what a network's parts take on this machine, as the table that a cost needs."""
    try:
        network = build_model(
            model, classes, channels, _parse_choices(choices), stream, gate=gate
        ).eval()
        assert isinstance(network, DynamicResNet)
        with Console(stderr=True).status("measuring") as status:
            table = LatencyTable.measure(
                network, (image_size, image_size), batch, threads, progress=status.update
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    table.save(latency_table)
    if as_json:
        _print_json(table.to_dict())
    else:
        Console().print(_latency_summary(table))


@app.command()
def info(as_json: Json = False) -> None:
    """What this machine runs on: backends, instruction set, threads, GPU."""
    from dfs_kernels import available_backends, backend_info

    try:
        backends = backend_info()
    except ValueError as error:
        raise UserError(str(error)) from error
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {
        "version": dfs.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "available_backends": list(available_backends()),
        "backends": backends,
        "gpus": gpus,
        "cuda_module": _cuda_module(),
    }
    if as_json:
        _print_json(found)
        return
    table = Table(title=f"dfs {dfs.__version__}", title_justify="left", show_header=False)
    for name, value in found.items():
        if name == "backends":
            for backend, details in backends.items():
                table.add_row(f"backend {backend}", _describe(details))
        elif name != "version":
            table.add_row(name, _describe(value))
    Console().print(table)


class _Control:
    """Progress bars and the wish to stop of one command."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: Any = None
        self._stage = ""
        self._stop = False

    def progress(self, stage: str, step: int, total: int, measured: dict[str, float]) -> None:
        shown = "  ".join(f"{k} {v:.3g}" for k, v in measured.items())
        if stage != self._stage or step == 1:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=total, shown="")
        self._bars.update(self._task, completed=step, shown=shown)

    def stopping(self) -> bool:
        return self._stop

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self._bars.console.print("stopping after this step; once more to stop at once")


@contextmanager
def _run_control() -> Iterator[_Control]:
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[shown]}"),
        console=Console(stderr=True),
    )
    control = _Control(bars)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, control.request_stop)
    try:
        with bars:
            yield control
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stopped(advice: str) -> int:
    print(f"dfs: stopped; {advice}", file=sys.stderr)
    return RUN_FAILED


def _data_settings(
    dataset: str | None, data: Path | None, waived: list[str] | None
) -> dict[str, Any]:
    """The settings that say which data to train on; a folder alone says what it holds."""
    settings: dict[str, Any] = {}
    if data is None and dataset == AUTO:
        raise UserError("--dataset auto needs --data, the folder to look into")
    if data is not None and dataset in (None, AUTO):
        dataset = recognise(data)
    if dataset is not None:
        settings["dataset"] = dataset
    if data is not None:
        settings["data"] = str(data.resolve())
    if waived:
        settings["allow_unverified"] = tuple(waived)
    return settings


def _configure(preset: str, overrides: dict[str, Any], settings: list[str]) -> TrainConfig:
    if preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    config = PRESETS[preset]
    if "choices" in overrides:
        overrides["choices"] = _parse_choices(overrides["choices"])
    types = {f.name: type(getattr(config, f.name)) for f in fields(config)}
    for text in settings:
        name, separator, value = text.partition("=")
        settable = sorted(
            n for n, kind in types.items() if kind in (int, float, str) or n == "exit_points"
        )
        if not separator or name not in settable:
            wrong = "names no setting" if separator else "must be name=value"
            names = ", ".join(settable)
            raise UserError(f"--set {wrong}, got {text!r}; the names are {names}")
        if name == "exit_points":
            overrides[name] = _parse_exit_points(value)
            continue
        try:
            overrides[name] = types[name](value)
        except ValueError as error:
            raise UserError(f"--set {name}: {value!r} is not {types[name].__name__}") from error
    try:
        return replace(config, **overrides)
    except ValueError as error:
        raise UserError(str(error)) from error


def _parse_exit_points(text: str) -> tuple[tuple[int, float], ...]:
    """Such as "4:1.7,8:1.2"; empty for no check."""
    try:
        pairs = [item.split(":") for item in text.split(",") if item]
        return tuple((int(width), float(points)) for width, points in pairs)
    except ValueError as error:
        raise UserError(
            f"--set exit_points takes WIDTH:POINTS pairs such as 4:1.7,8:1.2, got {text!r}"
        ) from error


def _parse_choices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--choices must be widths such as 0,2,4,8, got {text!r}") from error


def _make_trainer(config: TrainConfig, out: Path) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    try:
        return Trainer(config, out)
    except ValueError as error:
        raise UserError(str(error)) from error


def _report_run(trainer: Trainer, split: str, as_json: bool) -> None:
    images = trainer.data.val if split == "val" else trainer.data.test
    rows = [ResultRow("static, 32 bits", evaluate(trainer.plain, images))]
    name = f"DFS, target {trainer.config.target:.2%}"
    rows.append(ResultRow(name, evaluate(trainer.model, images)))
    _print_results(trainer.config, trainer.data, split, rows, as_json)


def _report_network(
    path: Path, split: str, data: Path | None, waived: Sequence[str], as_json: bool
) -> None:
    """A checkpoint that no run surrounds: there is no float network beside it."""
    network = load_network(path)
    config = network.config
    found = _data_of(config, data, waived).prepared(network.preprocessing)
    rows = [ResultRow("DFS", evaluate(network.model, found.val if split == "val" else found.test))]
    _print_results(config, found, split, rows, as_json)


def _data_of(config: TrainConfig, data: Path | None, waived: Sequence[str]) -> DataSplits:
    """The data set of a checkpoint, from its own folder unless another is given."""
    if data is None and config.data:
        data = Path(config.data)
    unverified = waived or config.allow_unverified
    try:
        return load_dataset(config.dataset, config.seed, data, config.image_size, unverified)
    except ValueError as error:
        raise UserError(str(error)) from error


def _budget_table(curve: BudgetCurve) -> Table:
    table = Table(title="Budgets that can be set")
    for column in ("paper cost %", "accuracy %", "ms per image, p50", "p99"):
        table.add_column(column, justify="right")
    for point in curve.points:
        accuracy = "" if point.accuracy is None else f"{point.accuracy:.2%}".rstrip("%")
        cells = (f"{point.cost * 100:.3f}", accuracy, f"{point.p50:.3f}", f"{point.p99:.3f}")
        table.add_row(*cells)
    return table


def _print_results(
    config: TrainConfig, data: DataSplits, split: str, rows: list[ResultRow], as_json: bool
) -> None:
    record = data.record()
    if as_json:
        shown = [row.to_dict() for row in rows]
        _print_json({"split": split, "config": config.to_dict(), "data": record, "rows": shown})
        return
    images = data.val if split == "val" else data.test
    title = f"{config.model} on {config.dataset}, {len(images)} {split} images"
    unverified = record["unverified"]
    if unverified:
        title += f"; not as published: {', '.join(unverified)}"
    Console().print(results_table(rows, title))


def _latency_summary(table: LatencyTable) -> Table:
    parts = table.to_dict()["milliseconds_per_image"]
    widths = sorted({int(bits) for times in parts.values() for bits in times})
    shown = Table(
        title=f"Milliseconds per image, batches of {table.batch}, {table.threads} threads"
    )
    shown.add_column("part")
    for bits in widths:
        shown.add_column(f"{bits} bits", justify="right")
    for part, times in parts.items():
        cells = (times.get(str(bits)) for bits in widths)
        shown.add_row(part, *("" if t is None else f"{t:.4f}" for t in cells))
    return shown


def _cuda_module() -> dict[str, Any]:
    try:
        import dfs_kernels._cuda as _cuda
    except ImportError:
        return {"built": False}
    return {"built": True, "architectures": _cuda.architectures(), **_cuda.probe()}


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_describe(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


if __name__ == "__main__":
    main()
