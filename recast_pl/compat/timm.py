"""Uses of timm beyond its documented interface."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refuse_missing_weights() -> Iterator[None]:
    """A context that ends in a ValueError if timm could not load some weights and left them at random.

    Without a classifier, `timm.create_model` 1.0 loads the weights that fit and only logs the others: in the logger
    `timm.models._builder`, as a text that begins with "Missing keys".
    """
    logger, found = logging.getLogger("timm.models._builder"), list[str]()

    def collect(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Missing keys"):
            found.append(record.getMessage())
        return True

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(collect)
    try:
        yield
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)
    if found:
        raise ValueError(found[0])
