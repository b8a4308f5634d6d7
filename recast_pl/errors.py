"""The project's own errors. Each message names the wrong value and how to fix it."""


class RecastError(Exception):
    """An error that the user can fix; the command line prints it as one line and exits with status 2."""


class BackboneError(RecastError):
    """The name, weights or input size of a backbone cannot be used."""


class DecompositionError(RecastError):
    """Weights cannot be decomposed as asked, or a decomposition file does not fit the backbone."""


class MethodError(RecastError):
    """A piece of a method does not fit the backbone, or its settings cannot be used."""


class DataError(RecastError):
    """A task, an image or a split cannot be used."""


class PatchError(RecastError):
    """A task patch is damaged, unknown or made for another backbone."""


class RunError(RecastError):
    """A run folder cannot be created, resumed or read."""


class BusyError(RunError):
    """Another process is working in a run folder; it can be tried again later."""


class ExportError(RecastError):
    """A trained task cannot be exported in the requested format."""


class HubError(RecastError):
    """A repository of the Hugging Face Hub cannot be reached, read or written."""


class StorageError(RecastError):
    """A file cannot be written: the disk is full, or writing is not allowed."""


def one_line(cause: Exception) -> str:
    """The text of an exception on one line, cut after 300 characters; the name of its type if it has no text."""
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= 300 else text[:297] + "..."
