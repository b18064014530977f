"""`mobula keys`: make and list API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.errors import InvalidConfig
from gateway.keys import add_key, read_keys

app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="FILE", help="File of hashed keys.")]


@app.command()
def add(file: File, tenant: Annotated[str, typer.Option(help="On whose account its requests go.")]) -> None:
    """Make a key, append its hash to FILE, and print it. It is shown this once."""
    try:
        typer.echo(add_key(file, tenant))
    except InvalidConfig as error:
        raise typer.BadParameter(str(error)) from error


@app.command("list")
def list_keys(file: File) -> None:
    """Print the id and tenant of each key in FILE."""
    try:
        records = read_keys(file)
    except InvalidConfig as error:
        raise typer.BadParameter(str(error)) from error
    for record in records:
        typer.echo(f"{record.key_id}  {record.tenant}")
