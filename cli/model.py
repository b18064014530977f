"""`mobula model`: checkpoints for trying things out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make a small model, without a download.")


@app.callback()
def model() -> None:
    """Make a small model, without a download."""


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it: a new or empty directory.")],
    preset: Annotated[str, typer.Option(help="tiny-dense (Llama) or tiny-moe (Qwen3-MoE, 8 experts).")] = "tiny-dense",
) -> None:
    """Write a small checkpoint with its tokenizer, trained on a book for about a minute and a half the first time.

    Example: mobula model init model --preset tiny-moe
    """
    # torch and transformers take seconds to import: not for --help.
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from workers.engines.torch_engine import tiny_model

    logging.disable_progress_bar()
    columns = (
        "training",
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("loss {task.fields[loss]:.2f}"),
    )
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("training", total=None, loss=float("nan"), visible=False)

        def progress(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done, total=total, loss=loss, visible=True)

        tiny_model.init(preset, directory, progress=progress)
    print(f"{preset} is in {directory}. It says:")
    print(tiny_model.sample(directory))
