"""The project's own errors: each message names the value at fault and the remedy."""


class RecastError(Exception):
    """What a user can mend; the command line prints it as one line and exits with status 2."""


class BackboneError(RecastError):
    """A backbone's name, weights or input size cannot be used."""


class DecompositionError(RecastError):
    """Weights cannot be shared as asked, or a decomposition file does not fit the backbone."""


class MethodError(RecastError):
    """A piece of a method does not fit the backbone, or its settings cannot be used."""


class DataError(RecastError):
    """A task, an image or a split cannot be used."""


class PatchError(RecastError):
    """A task patch is damaged, unknown or belongs to another base."""


class RunError(RecastError):
    """A run folder cannot be created, resumed or read."""


class ExportError(RecastError):
    """A learnt task cannot be handed out in the form asked for."""


class StorageError(RecastError):
    """A file cannot be written: the disk is full, or writing is not allowed."""
