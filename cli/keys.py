"""`mobula keys`: make and list API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.errors import InvalidConfig
from gateway.keys import add_key, read_keys

app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True, add_completion=False)

File = Annotated[str, typer.Argument(metavar="FILE", help="File of hashed keys.")]


@app.command()
def add(file: File, tenant: Annotated[str, typer.Option(help="On whose account its requests go.")]) -> None:
    """Make a key, append its hash to FILE, and print it. It is shown this once.

    Example: mobula keys add keys.json --tenant research
    """
    if not tenant or not tenant.isprintable():
        raise InvalidConfig(f"--tenant {tenant!r} is empty or not printable")
    typer.echo(add_key(file, tenant))


@app.command("list")
def list_keys(file: File) -> None:
    """Print the id and tenant of each key in FILE."""
    for record in read_keys(file):
        typer.echo(f"{record.key_id}  {record.tenant}")
