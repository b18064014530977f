"""`mobula keys`: make and list API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.errors import InvalidConfig
from cluster.request import MAX_PRIORITY
from gateway.keys import add_key, read_keys

app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True, add_completion=False)

File = Annotated[str, typer.Argument(metavar="FILE", help="File of hashed keys.")]


@app.command()
def add(
    file: File,
    tenant: Annotated[str, typer.Option(help="On whose account its requests go.")],
    max_priority: Annotated[int, typer.Option(help="Highest priority its requests may ask for.", max=MAX_PRIORITY)] = 0,
) -> None:
    """Make a key, append its hash to FILE, and print it. It is shown this once.

    Example: mobula keys add keys.json --tenant research
    """
    if not tenant or not tenant.isprintable():
        raise InvalidConfig(f"--tenant {tenant!r} is empty or not printable")
    typer.echo(add_key(file, tenant, max_priority))


@app.command("list")
def list_keys(file: File) -> None:
    """Print the id, tenant and highest priority of each key in FILE."""
    for record in read_keys(file):
        typer.echo(f"{record.key_id}  {record.tenant}  {record.max_priority}")
