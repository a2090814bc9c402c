"""Help that fits a screen: one aligned line per option, in named groups, without frames.

typer's own layout spends three lines where one will do, and imports rich to do so.
"""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

LEFT = 27


class Command(TyperCommand):
    """A command whose help lists arguments, then options by panel, then examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        parameters: list[Any] = list(self.params)
        arguments = [p for p in parameters if p.param_type_name == "argument"]
        names = " ".join(p.metavar or str(p.name) for p in arguments)
        lines = [f"Usage: {ctx.command_path} {names} [OPTIONS]", "", *_wrapped(self.help or "", 0)]
        lines += ["", *(line for p in arguments for line in _entry(str(p.metavar), _text(p)))]
        shown = [p for p in parameters if p.param_type_name == "option" and not p.hidden]
        for title in dict.fromkeys(_panel(p) for p in shown):
            panel = [(_names(p), _text(p)) for p in shown if _panel(p) == title]
            left = max(LEFT, *(len(name) + 4 for name, _ in panel))
            lines += ["", _heading(title)]
            lines += [line for name, text in panel for line in _entry(name, text, left)]
        lines += ["", _heading("Examples"), *_indented(self.epilog)]
        formatter.write("\n".join(lines) + "\n")


class Group(TyperGroup):
    """The program: its commands, its options, how to begin."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        lines = [f"Usage: {ctx.command_path} COMMAND [OPTIONS]", "", *_wrapped(self.help or "", 0)]
        lines += ["", _heading("Commands")]
        for name, command in self.commands.items():
            lines += _entry(name, command.help or "", left=13)
        options = [p for p in self.get_params(ctx) if not getattr(p, "hidden", False)]
        lines += ["", _heading("Options")]
        lines += [line for p in options for line in _entry(_names(p), _text(p), left=18)]
        lines += ["", _heading("Examples"), *_indented(self.epilog)]
        formatter.write("\n".join(lines) + "\n")


def reveal(context: typer.Context, wanted: bool) -> None:
    """Show the help with the options that the everyday help leaves out."""
    if wanted:
        parameters: Any = context.command.params
        for parameter in parameters:
            parameter.hidden = False
        typer.echo(context.get_help())
        raise typer.Exit


def _panel(parameter: Any) -> str:
    return parameter.rich_help_panel or "Options"


def _names(option: Any) -> str:
    """``-o, --out DIR``; long names without a short one are aligned with those that have one."""
    short = [name for name in option.opts if not name.startswith("--")]
    long = [name for name in option.opts if name.startswith("--")]
    names = f"{short[0]}, {long[0]}" if short else f"    {long[0]}"
    if option.secondary_opts:
        return names.replace("--", "--[no-]", 1)
    return names if option.is_flag else f"{names} {option.metavar}"


def _text(parameter: Any) -> str:
    shown = parameter.show_default
    if isinstance(shown, str):
        default = shown
    else:
        off = parameter.default in (None, False, ()) or callable(parameter.default) or not shown
        default = "" if off else str(parameter.default)
    return f"{parameter.help or ''} [{default}]" if default else parameter.help or ""


def _entry(name: str, text: str, left: int = LEFT) -> Iterator[str]:
    """``  name   text``, the text wrapped in a column of its own."""
    first, *rest = _wrapped(text, left) or [""]
    yield f"  {name}".ljust(left) + first.strip()
    yield from rest


def _wrapped(text: str, indent: int) -> list[str]:
    width = min(100, shutil.get_terminal_size().columns)
    pad = " " * indent
    return textwrap.wrap(text, width, initial_indent=pad, subsequent_indent=pad)


def _indented(text: str | None) -> list[str]:
    return [f"  {line}" for line in (text or "").splitlines()]


def _heading(title: str) -> str:
    return typer.style(f"{title}:", bold=True)
