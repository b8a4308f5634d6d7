"""Uses of timm beyond its documented interface."""

import logging


class MissingKeys(logging.Handler):
    """A context that collects timm's messages about weights which it could not load and left at random.

    Without a classifier, `timm.create_model` 1.0 loads the weights that fit and only logs the others: in the logger
    `timm.models._builder`, as a text that begins with "Missing keys".

    Attributes:
        found: The messages.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._logger, self.found = logging.getLogger("timm.models._builder"), list[str]()
        self._level = self._logger.level

    def emit(self, record: logging.LogRecord) -> None:
        """Collects a message."""
        if record.getMessage().startswith("Missing keys"):
            self.found.append(record.getMessage())

    def refuse(self) -> None:
        """Raises ValueError if weights were missing."""
        if self.found:
            raise ValueError(self.found[0])

    def __enter__(self) -> "MissingKeys":
        self._level = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
