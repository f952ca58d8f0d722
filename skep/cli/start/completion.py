"""``skep completion``: prints the script with which a shell completes the words of a command."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      skep completion bash > /etc/bash_completion.d/skep
      skep completion zsh > "${fpath[1]}/_skep"
      skep completion fish > ~/.config/fish/completions/skep.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "skep", "_SKEP_COMPLETE").source())
