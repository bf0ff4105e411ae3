"""The ``dfs`` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dfs
from dfs.cost import FULL_BITS
from dfs.data import AUTO, DATASETS, DataError, DataSplits, load_dataset, recognise
from dfs.data.load import FOLDER
from dfs.data.picture import PictureError
from dfs.engine import Engine, freeze, load_engine, time_engine
from dfs.engine.budget import BudgetCurve
from dfs.latency import LatencyTable
from dfs.launch import describe_waiting
from dfs.models import DynamicResNet, build_model
from dfs.nn import replicas
from dfs.predict import Predictor, predictions_table
from dfs.progress import run_control
from dfs.report import (
    PLOTS,
    REPORT_NAME,
    TABLE_NAMES,
    Comparison,
    ResultRow,
    SummaryRow,
    compare_with_rivals,
    describe_result,
    engine_times_table,
    plot_engine_times,
    plot_run,
    plot_sweep,
    require_plotting,
    results_table,
    rich_summary,
    summarise,
    write_run_report,
    write_sweep_report,
    write_tables,
)
from dfs.settings import configure, contradictions, parse_numbers, parse_widths
from dfs.train import StageError, TrainConfig, Trainer, evaluate
from dfs.train.checkpoint import CheckpointError
from dfs.train.distributed import choose_device, joined
from dfs.train.network import CHECKPOINT_NAME, load_network
from dfs.train.plan import TimePlan
from dfs.train.sweep import METHODS, Sweep

RUN_FAILED = 1
USER_ERROR = 2
UNFINISHED = 3
# How many validation images budgets are measured on at most.
_CALIBRATION_IMAGES = 1024
# How many test images an engine is timed on at most.
_TIMED_IMAGES = 1024

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
Preset = Annotated[
    str | None,
    typer.Option(
        help="Settings to start from: paper, default, fast, digits, or a TOML file such as a run's "
        "config.toml. Without it: digits for the digits, else fast."
    ),
]
LatencyFile = Annotated[
    Path | None,
    typer.Option(help="What dfs bench --latency-table wrote; makes latency the cost of a run."),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU if there is one."),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as name=value; may be repeated."),
]
MaxMinutes = Annotated[
    float | None, typer.Option(min=0, help="Save and exit with 3 after so many minutes.")
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

    with run_control() as control:
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
    preset: Preset = None,
    target: Annotated[
        float | None, typer.Option(help="Cost target as a fraction of full precision.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Such as resnet20 or resnet50.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Widths on offer, such as 0,2,4,8 or 0,2,4,8,32.")
    ] = None,
    gate: Annotated[str | None, typer.Option(help="rnn, feedforward or constant.")] = None,
    cost: Annotated[
        str | None, typer.Option(help="What the target counts: paper, bitops or latency.")
    ] = None,
    latency_table: LatencyFile = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything random.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.")] = None,
    dataset: Dataset = None,
    data: Data = None,
    waived: Waived = None,
    setting: Setting = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
    device: Device = "auto",
    max_minutes: MaxMinutes = None,
    as_json: Json = False,
) -> None:
    """Train a dynamic network to a cost target, stage by stage; can be stopped and resumed.

    Exits with 0 when done, 1 if a stage or the target was missed, 2 for a mistake, and 3 if it was
    stopped, by a signal or --max-minutes, and saved. Under torchrun, processes share every batch.
    """
    given: dict[str, Any] = {
        "target": target,
        "model": model,
        "gate": gate,
        "cost": cost,
        "seed": seed,
        "batch_size": batch_size,
    }
    overrides = {name: value for name, value in given.items() if value is not None}
    if choices is not None:
        overrides["choices"] = _parse_choices(choices)
    if latency_table is not None:
        overrides |= {"latency_table": str(latency_table.resolve()), "cost": cost or "latency"}
    place = _device(device)
    with joined(place):
        if resume:
            trainer = _resume(out, preset, overrides, dataset, data, waived, setting or [], place)
        else:
            if (out / CHECKPOINT_NAME).exists():
                raise UserError(f"{out} already holds a run; use --resume, or another --out")
            overrides |= _data_settings(dataset, data, waived)
            with _user_errors():
                config = configure(preset, overrides, setting or [])
            trainer = _make_trainer(config, out, place)
        with run_control(max_minutes) as control:
            if not trainer.done:
                at = (trainer.stage_index, trainer.step)
                control.follow(TimePlan(trainer.config, trainer.data, *at))
            finished = trainer.run(None, control.progress, control.stopping)
        if not finished:
            stage = trainer.stages[trainer.stage_index].name
            again = f"dfs train --out {out} --resume goes on"
            raise typer.Exit(_stopped(f"saved in {stage}, step {trainer.step}; {again}"))
        if replicas.rank() == 0:
            _report_run(trainer, "test", as_json)


def _resume(
    out: Path,
    preset: str | None,
    overrides: dict[str, Any],
    dataset: str | None,
    data: Path | None,
    waived: list[str] | None,
    settings: list[str],
    device: torch.device,
) -> Trainer:
    """The run in ``out``; what is given beside it must agree with its settings."""
    trainer = Trainer.load(out, data_folder=data, device=device)
    if dataset not in (None, AUTO):
        overrides["dataset"] = dataset
    if waived:
        overrides["allow_unverified"] = tuple(waived)
    with _user_errors():
        found = contradictions(trainer.config, preset, overrides, settings)
    if found:
        raise UserError(f"--resume: {'; '.join(found)}")
    return trainer


@app.command(name="eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or a checkpoint.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    data: Data = None,
    waived: Waived = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Accuracy, cost and measured time of a trained run, beside its float network."""
    if split not in ("val", "test"):
        raise UserError(f"--split must be val or test, got {split!r}")
    if run.is_file():
        _report_network(run, split, data, waived or [], as_json, _device(device))
        return
    if waived:
        raise UserError("--allow-unverified-data is for checkpoints; a run keeps its own")
    trainer = Trainer.load(run, data_folder=data, device=_device(device))
    if not trainer.done:
        raise UserError(
            f"{run} is not finished: it is in stage {trainer.stages[trainer.stage_index].name!r}; "
            "dfs train --resume goes on with it"
        )
    _report_run(trainer, split, as_json)


@app.command()
def sweep(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the sweep; one that was stopped goes on. By default sweeps/DATASET, or "
            "sweeps/DATASET-PRESET."
        ),
    ] = None,
    preset: Preset = None,
    targets: Annotated[
        str, typer.Option(help="Cost targets, as fractions of full precision.")
    ] = "0.04,0.02,0.01",
    seeds: Annotated[str, typer.Option(help="One run of everything for each.")] = "0",
    methods: Annotated[
        str,
        typer.Option(help=f"What to compare, out of {','.join(METHODS)}, or all."),
    ] = "all",
    model: Annotated[str | None, typer.Option(help="Such as resnet20 or resnet50.")] = None,
    dataset: Dataset = None,
    data: Data = None,
    waived: Waived = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="What dfs bench --latency-table wrote; adds a column.")
    ] = None,
    latency_targets: Annotated[
        str,
        typer.Option(help="Targets of latency by that table, fractions of full precision, too."),
    ] = "",
    setting: Setting = None,
    device: Device = "auto",
    max_minutes: MaxMinutes = None,
    as_json: Json = False,
) -> None:
    """Dynamic networks at several targets, beside what they must beat, in one table.

    All are trained with the same teacher and as many sample passes; what they can share is trained
    once. Killed at any moment, the same command goes on. Writes table.md, table.csv, table.json,
    plots, and report.html.
    """
    overrides: dict[str, Any] = {} if model is None else {"model": model}
    overrides |= _data_settings(dataset, data, waived)
    with _user_errors():
        config = configure(preset, overrides, setting or [])
        if out is None:
            name = "" if preset is None else f"-{Path(preset).stem}"
            out = Path("sweeps") / f"{config.dataset}{name}"
        planned = Sweep(
            config,
            out,
            parse_numbers(targets, "--targets", float),
            parse_numbers(seeds, "--seeds", int),
            tuple(METHODS) if methods == "all" else tuple(methods.split(",")),
            latency_table=latency_table,
            device=_device(device),
            latency_targets=parse_numbers(latency_targets, "--latency-targets", float),
        )
        planned.check()

    def write(comparisons: Sequence[Comparison] = ()) -> list[SummaryRow]:
        rows = summarise(planned.results())
        about = planned.about() | {"comparisons": [asdict(one) for one in comparisons]}
        write_tables(planned.folder, rows, about)
        return rows

    with run_control(max_minutes) as control:
        for reason in planned.skipped:
            control.say(f"left out: {reason}")

        def finished(result: dict[str, Any]) -> None:
            write()
            control.say(describe_result(result))

        done = planned.run(control.sweep_progress, control.stopping, finished)
    if not done:
        write()
        raise typer.Exit(_stopped(f"{len(planned.results())} results; the same command goes on"))
    rows = write(compare_with_rivals(planned.results()))
    page = _show_sweep(planned)
    if as_json:
        _print_json({"rows": [asdict(row) for row in rows], "report": page})
    else:
        console = Console()
        console.print(rich_summary(rows, planned.about()["title"], console.width))
        print(page or "no plots and no page: matplotlib is not installed")


def _show_sweep(done: Sweep) -> str | None:
    """Plots and the page of a sweep that is done; None without matplotlib."""
    try:
        require_plotting()
    except ImportError:
        return None
    for entry in done.about()["decisions"]:
        run = done.folder / entry["run"]
        trainer = Trainer.load(run, done.data(done.seeds[0]), device=done.device)
        plot_run(trainer, run / PLOTS)
    page = done.folder / REPORT_NAME
    write_sweep_report(done.folder, page)
    return str(page)


@app.command()
def plot(
    source: Annotated[Path, typer.Argument(help="Folder of a sweep or of a finished run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the PNGs; by default plots in SOURCE.")
    ] = None,
    data: Data = None,
) -> None:
    """PNGs: of a sweep, accuracy over each cost; of a run, its decisions and extreme images."""
    folder = out or source / "plots"
    with _user_errors():
        if _is_sweep(source):
            written = plot_sweep(source, folder)
        else:
            written = plot_run(Trainer.load(source, data_folder=data), folder)
    for path in written:
        print(path)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a sweep.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; by default report.html in SOURCE.")
    ] = None,
    data: Data = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="What dfs bench --latency-table wrote; adds a column.")
    ] = None,
) -> None:
    """One self-contained HTML page on a run or a sweep."""
    path = out or source / REPORT_NAME
    with _user_errors():
        if _is_sweep(source):
            write_sweep_report(source, path)
        else:
            table = None if latency_table is None else LatencyTable.load(latency_table)
            write_run_report(Trainer.load(source, data_folder=data), path, table)
    print(path)


def _is_sweep(folder: Path) -> bool:
    return (folder / TABLE_NAMES[-1]).exists()


@app.command()
def bench(
    latency_table: Annotated[
        Path | None,
        typer.Option(help="File to write, milliseconds per block shape and width of --model."),
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="File that dfs freeze wrote, to time at every width.")
    ] = None,
    model: Annotated[str, typer.Option(help="Such as resnet20.")] = "resnet20",
    image_size: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    classes: Annotated[int, typer.Option(help="How many there are.")] = 10,
    choices: Annotated[str, typer.Option(help="Widths that the gate picks from.")] = "0,2,4,8",
    gate: Annotated[str, typer.Option(help="rnn, feedforward or constant.")] = "rnn",
    stream: Annotated[str, typer.Option(help="uint8 or float32.")] = "uint8",
    batch: Annotated[int, typer.Option(help="Images in a batch of --latency-table.")] = 64,
    batches: Annotated[
        str, typer.Option(help="Images in a batch of --engine, several sizes.")
    ] = "1,8,64,256",
    peers: Annotated[
        bool,
        typer.Option(help="Time PyTorch, ONNX Runtime and OpenVINO beside --engine."),
    ] = True,
    dataset: Dataset = None,
    data: Data = None,
    waived: Waived = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw the times of --engine to.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the kernels.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure on this machine: what a network's parts take, or a frozen network beside others.

    With --latency-table, the table that a cost needs. With --engine, the time per image as its
    gates decide (on the test images of --dataset or --data, else on random ones), with every width
    forced, and of static networks of the same shape in other runtimes, where they are installed.
    Those run on a CPU, so that a GPU's times have nothing beside them.
    """
    if (latency_table is None) == (engine is None):
        raise UserError("give --latency-table or --engine, one of them")
    place = _device(device)
    if engine is not None:
        given = _data_settings(dataset, data, waived)
        sizes = _parse_sizes(batches)
        _bench_engine(engine, place, given, sizes, threads, peers, plot, as_json)
        return
    assert latency_table is not None
    if place.type != "cpu":
        raise UserError("--device: a latency table is measured on the CPU; a GPU times an --engine")
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


def _bench_engine(
    path: Path,
    device: torch.device,
    data: dict[str, Any],
    batches: Sequence[int],
    threads: int | None,
    peers: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    if plot is not None:
        require_plotting()
    with _user_errors():
        engine = load_engine(path, device)
        images = _images_for(engine, data).to(device) if data else None
        with Console(stderr=True).status("measuring") as status:
            found = time_engine(engine, images, batches, threads, peers, status.update)
    title = f"{path.name} ({engine.graph.architecture.name})"
    if plot is not None:
        plot_engine_times(plot, found, title)
    if as_json:
        _print_json({"engine": str(path), **found.to_dict()})
        return
    Console().print(engine_times_table(found, title))
    for label, reason in found.missing.items():
        print(f"dfs: {label} left out: {reason}", file=sys.stderr)


def _images_for(engine: Engine, settings: dict[str, Any]) -> Tensor:
    """Test images as the engine takes them."""
    if engine.preprocessing is None:
        raise UserError("the engine doesn't say how pictures become its input")
    folder = Path(settings["data"]) if "data" in settings else None
    waived = settings.get("allow_unverified", ())
    size = engine.preprocessing.size if settings["dataset"] == FOLDER else 0
    found = load_dataset(settings["dataset"], folder=folder, image_size=size, waived=waived)
    return found.prepared(engine.preprocessing).test.first(_TIMED_IMAGES)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures of any common format and size.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a finished run, or a checkpoint.")
    ] = None,
    engine: Annotated[Path | None, typer.Option(help="File that dfs freeze wrote.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Class, confidence, every block's bits, cost and time of each picture."""
    found = list(_make_predictor(checkpoint, engine, _device(device)).predict(images))
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


def _make_predictor(
    checkpoint: Path | None, engine: Path | None, device: torch.device
) -> Predictor:
    if (checkpoint is None) == (engine is None):
        raise UserError("give --checkpoint or --engine, one of them")
    if checkpoint is not None:
        return Predictor.from_checkpoint(checkpoint, device)
    assert engine is not None
    try:
        return Predictor.from_engine(engine, device)
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
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make a trained network into one file that only runs: folded, packed, fast.

    The file is the same for every device; --device is where --calibrate-budget measures.
    """
    if out.exists():
        raise UserError(f"--out {out} is there already")
    place = _device(device)
    network = load_network(run)
    side = network.preprocessing.size
    try:
        engine = freeze(network.model, (side, side), network.preprocessing)
        if calibrate_budget:
            splits = _data_of(network.config, data, waived or [])
            val = splits.prepared(network.preprocessing).val
            with Console(stderr=True).status("calibrating budgets"):
                images = val.first(_CALIBRATION_IMAGES).to(place)
                engine.to(place).calibrate_budget(images, val.labels[: len(images)])
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
    """Make a checkpoint of the paper's authors (Torment123/DFS) into one of this project's.

    Decisions and logits are theirs up to float32's rounding, which differs as much between two
    batch sizes of theirs: by about 1e-4 of the largest logit. In float64 they agree to 1e-6.
    """
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
        "waiting": describe_waiting(),
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


def _stopped(advice: str) -> int:
    print(f"dfs: stopped; {advice}", file=sys.stderr)
    return UNFINISHED


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


def _device(name: str) -> torch.device:
    """Where to compute; the process's own GPU under torchrun."""
    with _user_errors():
        return choose_device(name)


def _parse_choices(text: str) -> tuple[int, ...]:
    try:
        return parse_widths(text, "--choices")
    except ValueError as error:
        raise UserError(str(error)) from error


def _parse_sizes(text: str) -> Sequence[int]:
    with _user_errors():
        return parse_numbers(text, "--batches", int)


@contextmanager
def _user_errors() -> Iterator[None]:
    """A bad value within it is the user's mistake."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def _make_trainer(config: TrainConfig, out: Path, device: torch.device) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    with _user_errors():
        trainer = Trainer(config, out, device=device)
        trainer.check_target()
    return trainer


def _report_run(trainer: Trainer, split: str, as_json: bool) -> None:
    images = trainer.data.val if split == "val" else trainer.data.test
    rows = [ResultRow("static, 32 bits", evaluate(trainer.plain, images))]
    if trainer.config.recipe == "static":
        for width in trainer.config.static_widths:
            # 32 bits alone are the float network, which is above.
            if trainer.config.static_widths != (FULL_BITS,):
                found = evaluate(trainer.model, images, width)
                rows.append(ResultRow(f"static, {width} bits", found))
    else:
        name = f"DFS, target {trainer.config.target:.2%}"
        rows.append(ResultRow(name, evaluate(trainer.model, images)))
    _print_results(trainer.config, trainer.data, split, rows, as_json)


def _report_network(
    path: Path,
    split: str,
    data: Path | None,
    waived: Sequence[str],
    as_json: bool,
    device: torch.device,
) -> None:
    """A checkpoint that no run surrounds: there is no float network beside it."""
    network = load_network(path)
    config = network.config
    found = _data_of(config, data, waived).prepared(network.preprocessing).to(device)
    images = found.val if split == "val" else found.test
    rows = [ResultRow("DFS", evaluate(network.model.to(device), images))]
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
