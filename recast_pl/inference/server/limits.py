"""Limits of the server's load."""

import math
from dataclasses import dataclass, fields

from recast_pl.errors import RunError


@dataclass(frozen=True)
class Limits:
    """Limits of the server's load; all are above 0.

    Args:
        max_body: Bytes of a request.
        max_pixels: Pixels of an image, by its header. Decoding takes up to 26 bytes for each, of two large images and
            of four below 16 million pixels at a time; a process that decodes may take 32 bytes for each, and 128 MiB.
        timeout: Seconds in which a request must have arrived, and then must be answered.
        batch_size: Images that are classified together, whatever their tasks.
        queue_size: Images that wait or are being classified; further requests are refused until later.
        connections: Open connections of the command `serve`; further ones are refused until later.

    Raises:
        RunError: If a limit is not a finite number above 0.
    """

    max_body: int = 20_000_000
    max_pixels: int = 50_000_000
    timeout: float = 30.0
    batch_size: int = 32
    queue_size: int = 256
    connections: int = 500

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise RunError(f"{field.name} is {value}; give a finite number above 0")
