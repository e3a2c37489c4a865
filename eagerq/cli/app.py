"""The commands."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer

import eagerq
from eagerq.cli.data import random_batches, read_batches
from eagerq.cli.inputs import inputs_for
from eagerq.cli.render import show_plan, show_verification, summary
from eagerq.cli.specs import is_model_file, load_model, read_model
from eagerq.errors import EagerqError, InputsError

app = typer.Typer(
    name="eagerq",
    help="Quantization-aware training for PyTorch by module swap, without tracing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eagerq {eagerq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="timm:NAME, or package.module:factory, called without arguments.")],
    json: Annotated[bool, typer.Option("--json", help="Print the plan and its summary as JSON, and nothing else.")] = False,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="CxHxW",
            help="Shape of one example; once for each argument of the model. Left out: what the model's library says.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Examples in the batch that is watched.")] = 2,
    train: Annotated[
        bool | None, typer.Option("--train/--eval", help="The model's mode. Left out: as the factory returns it.")
    ] = None,
) -> None:
    """Print which chains of a model would be fused, and why others would not."""
    with contextlib.redirect_stdout(sys.stderr):  # whatever a factory prints
        model = load_model(spec)
        if train is not None:
            model.train(train)
        plan = eagerq.plan_fusion(model, example_inputs=inputs_for(model, input or [], batch))
    if json:
        typer.echo(json_module.dumps({"model": spec, **plan.as_dict(), "summary": summary(plan)}, indent=2))
    else:
        show_plan(plan)


@app.command()
def verify(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="package.module:factory, called without arguments, of the QAT or deployed model; or a .pt or .pth file that"
            " torch.save wrote of the whole model, with --trust.",
        ),
    ],
    onnx: Annotated[Path, typer.Argument(metavar="ONNX", help="The file that eagerq.export_onnx wrote of this model.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help=".npy: one batch. .npz: a batch by the names of the model's arguments, else each array is a batch. .pt: a"
            " tensor, a tuple or dict of arguments, or a list of these. May be given several times.",
        ),
    ] = None,
    random: Annotated[int | None, typer.Option("--random", min=1, help="Compare on so many batches of normal numbers.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Examples in a batch: 2 of --random; --data is taken as it lies.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Fixes the numbers of --random.")] = 0,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="CxHxW",
            help="Shape of one example of --random; once for each argument. Left out: as the model was converted.",
        ),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle the model's file, which may run any code: for files of your own.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Compare an ONNX file in ONNX Runtime with the model's exact mode, code by code. Ends with 1 if anything differs."""
    if bool(data) == bool(random):
        raise typer.BadParameter("wanted --data FILE or --random N, one of them.")
    if input and data:
        raise typer.BadParameter("--input is the shape of what --random draws; leave it out with --data.")
    with contextlib.redirect_stdout(sys.stderr):  # whatever a factory prints
        model = read_model(spec, trust) if is_model_file(spec) else load_model(spec)
        if random:
            batches = random_batches(model, random, batch or 2, seed, input or [])
        else:
            batches = [run for path in data or [] for run in read_batches(path, model, batch)]
        try:
            found = eagerq.verify_deployment(model, onnx, batches)
        except EagerqError:
            raise
        except Exception as error:  # the user's model
            raise InputsError(
                f"comparing {spec} with {onnx} raised {type(error).__name__}: {error}; pass inputs as model(...) takes them."
            ) from error
    if json:
        typer.echo(json_module.dumps({"model": spec, "file": str(onnx), **found.as_dict()}, indent=2))
    else:
        show_verification(found)
    if not found.same:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("eagerq-demo"),
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Fixes the split, the initial weights and the order of the images.")
    ] = 0,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs of float training.")] = 8,
    qat_epochs: Annotated[int, typer.Option("--qat-epochs", min=1, help="Epochs of quantization-aware fine-tuning.")] = 4,
    images: Annotated[int | None, typer.Option("--images", min=100, help="Use only so many of the 1,797 images.")] = None,
) -> None:
    """Train, fuse, fine-tune and deploy a small network on real digits, and measure it in ONNX Runtime."""
    from eagerq.demo import run_demo

    figures = run_demo(out, seed, epochs=epochs, qat_epochs=qat_epochs, images=images)
    if not all(figures["targets"].values()):
        raise typer.Exit(1)
