"""The console that all messages and tables are printed on."""

from rich.console import Console


def open_console(stderr: bool = False) -> Console:
    """A console that prints names as they are: `[bold]` is no markup, `:cat:` no emoji, and numbers are not coloured.

    Args:
        stderr: Whether it prints on standard error rather than on standard output.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
