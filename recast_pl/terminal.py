"""The console that all messages and tables are printed on."""

from rich.console import Console


def open_console(stderr: bool = False) -> Console:
    """A console that prints names as they are: it does not read `[bold]` as markup, or `:cat:` as an emoji.

    Args:
        stderr: Whether it prints on standard error rather than on standard output.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
