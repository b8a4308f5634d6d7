"""Gets a server ready: what the first image would wait for is done before."""

import asyncio
import io

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from recast_pl.errors import RecastError
from recast_pl.inference.predictor import Predictor
from recast_pl.inference.server.decoding import Decoders


class WarmUp:
    """Starts the decoders, classifies an image by one task, and makes the router.

    A task or router that fails does not keep a server from being ready, because others may work; the requests for it
    get their own errors.

    Args:
        predictor: The tasks.
        decoders: Decode the images.
    """

    def __init__(self, predictor: Predictor, decoders: Decoders) -> None:
        self._predictor, self._decoders = predictor, decoders
        self._work: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Begins in the background, unless it has begun; and again if it has failed."""
        if self._work is None or (self._work.done() and self.fault):
            self._work = asyncio.get_running_loop().create_task(self._run())

    def end(self) -> None:
        """Stops it; the next `begin` starts from the beginning."""
        if self._work:
            self._work.cancel()
        self._work = None

    @property
    def fault(self) -> str | None:
        """Why the server is not ready; None if it is."""
        if self._work is None or not self._work.done():
            return "the server is starting; try again later"
        if self._work.cancelled() or self._work.exception():
            return "images cannot be decoded; 'python -m recast_pl.inference.server.decoder 1' may tell why"
        return None

    async def _run(self) -> None:
        await run_in_threadpool(self._decoders.start)
        Image.new("RGB", (8, 8)).save(content := io.BytesIO(), "PNG")
        for task in self._predictor.tasks[:1]:
            try:
                pixels = await self._decoders.decode(content.getvalue(), self._predictor.image_size(task))
                await run_in_threadpool(self._predictor.predict_tensors, [pixels], [task])
                await run_in_threadpool(self._predictor.route_tensors, [pixels])
            except HTTPException:
                raise
            except RecastError:
                continue
