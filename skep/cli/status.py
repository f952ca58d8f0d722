"""``skep status``: one screen about the cluster, as one of its nodes sees it."""

import click


@click.command()
@click.pass_obj
def status(host: str) -> None:
    """How this node and its cluster are.

    \b
    Examples:
      skep status
      skep --host unix:///var/tmp/bees/m1/skep.sock status
    """
