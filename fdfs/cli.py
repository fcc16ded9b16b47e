"""The `dutchman` command: which commands there are and how errors look.

Floor 7. Only here: the table of commands (each loaded when it is used, so that `dutchman ps` starts quickly) and the
one place where a Failure becomes text on stderr and an exit code. Commands live in cli_daemon, cli_images,
cli_containers, cli_logs, cli_verbs, cli_volumes, cli_store, cli_events, cli_about.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from fdfs.cli_mount import Failure

COMPLETING = "_DUTCHMAN_COMPLETE"  # click's, set while a shell asks what could follow
COMMANDS = {
    "up": "fdfs.cli_daemon",
    "down": "fdfs.cli_daemon",
    "status": "fdfs.cli_daemon",
    "doctor": "fdfs.cli_daemon",
    "unshare": "fdfs.cli_daemon",
    "pull": "fdfs.cli_images",
    "load": "fdfs.cli_images",
    "import": "fdfs.cli_images",
    "images": "fdfs.cli_images",
    "rmi": "fdfs.cli_images",
    "prune": "fdfs.cli_store",
    "gc": "fdfs.cli_store",
    "tag": "fdfs.cli_images",
    "push": "fdfs.cli_images",
    "save": "fdfs.cli_images",
    "export": "fdfs.cli_images",
    "commit": "fdfs.cli_images",
    "network": "fdfs.cli_networks",
    "volume": "fdfs.cli_volumes",
    "kernels": "fdfs.cli_kernels",
    "run": "fdfs.cli_containers",
    "create": "fdfs.cli_containers",
    "exec": "fdfs.cli_exec",
    "attach": "fdfs.cli_exec",
    "cp": "fdfs.cli_copy",
    "ps": "fdfs.cli_containers",
    "logs": "fdfs.cli_logs",
    "start": "fdfs.cli_containers",
    "stop": "fdfs.cli_verbs",
    "rm": "fdfs.cli_verbs",
    "kill": "fdfs.cli_verbs",
    "pause": "fdfs.cli_verbs",
    "resume": "fdfs.cli_verbs",
    "unpause": "fdfs.cli_verbs",
    "restart": "fdfs.cli_verbs",
    "port": "fdfs.cli_verbs",
    "rename": "fdfs.cli_verbs",
    "update": "fdfs.cli_verbs",
    "wait": "fdfs.cli_verbs",
    "top": "fdfs.cli_verbs",
    "stats": "fdfs.cli_verbs",
    "diff": "fdfs.cli_verbs",
    "inspect": "fdfs.cli_about",
    "history": "fdfs.cli_about",
    "version": "fdfs.cli_about",
    "info": "fdfs.cli_about",
    "events": "fdfs.cli_events",
}


class Lazy(click.Group):
    """A group whose commands are functions named `<name>_command` in the module of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        import importlib

        command = getattr(importlib.import_module(COMMANDS[cmd_name]), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        if COMPLETING in os.environ:
            from fdfs.cli_complete import dress

            dress(command)
        return command


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        click.echo(f"dutchman {version('flying-dutchman')}")
        ctx.exit()


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def cli() -> None:
    """A container engine whose interface is a filesystem.

    Every command here does its work through the files of the mount; whatever it does, `cat` and `echo` can do too.
    Start with `dutchman up`, then look into ~/FlyingDutchman.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, the container's exit code for `run`, 2 for bad usage, 130 after Ctrl-C, else 1."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    if COMPLETING in os.environ:
        import fdfs.cli_complete  # noqa: F401  # it has a bash of its own
    try:
        result = cli.main(args=None if argv is None else list(argv), prog_name="dutchman", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except Failure as failure:
        click.echo(f"dutchman: {failure.reason}", err=True)
        for line in failure.more:
            click.echo(line, err=True)
        return failure.code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        click.echo(f"dutchman: {name + ': ' if name else ''}{error.strerror or error}", err=True)
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            click.echo("hint: the daemon is gone; bring it back: dutchman up", err=True)
        return 1


if __name__ == "__main__":
    main()
