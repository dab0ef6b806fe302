"""The command ``gpusvc``: it knows all commands, prints their errors, and exits.

A command is a function that raises; only ``main()`` prints an error and exits. A command imports what only it needs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

# Until 0.15 typer imports rich as soon as it is installed: 0.12 s for each command, for colours that are not used here.
# A module that is None counts as not installed.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

import typer  # noqa: E402

from gpusvc import __version__  # noqa: E402
from gpusvc.cli.commands import (  # noqa: E402
    add,
    check,
    doctor,
    edit,
    events,
    evict,
    import_,
    key,
    lifecycle,
    logs,
    pins,
    pull,
    remove,
    settings,
    show,
    use,
)
from gpusvc.cli.commands import run as running  # noqa: E402
from gpusvc.cli.top import top  # noqa: E402
from gpusvc.errors import GpusvcError  # noqa: E402
from gpusvc.paths import USER_INSTANCE, Paths, is_user_instance  # noqa: E402
from gpusvc.printable import printable  # noqa: E402

_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

# A command that a hint names. For a user's own models it needs --user.
_OWN_COMMAND = re.compile(r"`(gpusvc|systemctl) (?!--user )")

# click's ClickException. Newer typers carry click under a private name, so it is found through its subclass.
_ParserError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Model servers on GPUs, as systemd units that are proven gone when they are stopped.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such model, 4 not permitted. See gpusvc(1).",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpusvc {__version__}")
        raise typer.Exit


def _choose_instance(context: typer.Context, wanted: bool) -> None:
    # In the environment, so that this process and its children use the same instance.
    if wanted:
        os.environ[USER_INSTANCE] = "1"
        context.obj = Paths.here()


@app.callback()
def _options(
    *,
    user: bool = typer.Option(
        False, "--user", callback=_choose_instance, is_eager=True, help="Your own models, instead of the system's."
    ),
    version: bool = typer.Option(
        False, "--version", "-V", callback=_print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


app.command("add")(add.add)
app.command("pull")(pull.pull)
app.command("edit")(edit.edit)
app.command("rm")(remove.rm)
app.command("import")(import_.import_)
app.command("start")(lifecycle.start)
app.command("stop")(lifecycle.stop)
app.command("restart")(lifecycle.restart)
app.command("evict")(evict.evict)
app.command("pin")(pins.pin)
app.command("unpin")(pins.unpin)
app.command("use", context_settings=use.SETTINGS)(use.use)
app.command("run", context_settings=running.SETTINGS)(running.run)
app.command("ps")(show.ps)
app.command("top")(top.top)
app.command("list")(show.list_)
app.command("status")(show.status)
app.command("logs")(logs.logs)
app.command("events")(events.events)
app.command("gpus")(show.gpus)
app.command("config")(settings.config)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("release")(lifecycle.release)
app.add_typer(key.app, name="key")


def main() -> NoReturn:
    """Run the console script."""
    sys.exit(run(Paths.here(), sys.argv[1:]))


def run(paths: Paths, arguments: Sequence[str]) -> int:
    """Run one command, print its errors to stderr, and return the exit status."""
    if arguments[:1] == ["help"]:  # as git and cargo have it
        arguments = [*arguments[1:], "--help"]
    try:
        # Not standalone: typer then neither prints errors nor exits.
        code = app(list(arguments), prog_name="gpusvc", obj=paths, standalone_mode=False)
        sys.stdout.flush()
    except _ParserError as error:
        error.show()
        if type(error).__name__ == "NoSuchOption" and "add" in arguments[:2]:
            typer.echo("Options of the engine go behind --: gpusvc add NAME FILE.gguf -- -ngl 99", err=True)
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader closed the pipe. The flush at Python's exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except Exception as error:
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Print ``error``, or each error of a group. Return the highest of their exit statuses."""
    if isinstance(error, ExceptionGroup):
        return max(_report(part) for part in error.exceptions)
    if isinstance(error, GpusvcError):
        text = error.message if error.hint is None else f"{error.message}\n{error.hint}"
        if is_user_instance():
            text = _OWN_COMMAND.sub(r"`\1 --user ", text)
        # The text may quote engines and foreign processes.
        typer.echo("gpusvc: " + "\n  ".join(map(printable, text.split("\n"))), err=True)
        return error.exit_code
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "gpusvc":
        # dpkg replaces one file after the other.
        typer.echo("gpusvc: Its files are being replaced by another version.\nRun the command again.", err=True)
        return 1
    typer.echo(printable(f"gpusvc: {type(error).__name__}: {error}"), err=True)
    if os.environ.get("GPUSVC_DEBUG"):
        import traceback  # noqa: PLC0415

        traceback.print_exception(error)
    else:
        typer.echo("  This is a bug of gpusvc. With GPUSVC_DEBUG=1 in the environment it shows where.", err=True)
    return 1
