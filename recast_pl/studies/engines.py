"""Where command lines run that need not wait for one another: this machine, a Ray cluster, or SLURM.

Each engine hands them to a scheduler that exists; none is made here. Machines share the file system of the run folder.
Wherever a command line dies, its last checkpoint is there, so that the same one goes on.
"""

import importlib
import io
import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recast_pl.errors import RunError
from recast_pl.optional_imports import extra

ONE_DEVICE = ("--trainer.devices", "1")
"""What a command line of `fit` has for an engine: the engine spreads, and each process has one device."""

_STOPPED = 128 + signal.SIGTERM  # exit status of a command that was told to end

_DEATHS = 5  # of workers below one command line; what kills that many is the command line itself

_TIMEOUTS = 20  # of one job, each of which has learnt on from the checkpoint of the last


@dataclass(frozen=True)
class Outcome:
    """How a command line ended.

    Args:
        status: Its exit status.
        output: What it said, or what the engine says of its end; empty if that has been shown.
    """

    status: int
    output: str = ""


Endings = Generator[tuple[int, Outcome], None, None]
"""Position of a command line, and how it ended, in the order in which they end; closing it ends those that run."""


class Engine(ABC):
    """Runs command lines of `recast_pl` somewhere."""

    @abstractmethod
    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs command lines that do not depend on one another.

        Args:
            commands: The words of each, without `python -m recast_pl`.

        Returns:
            How they end, as they do.

        Raises:
            RunError: If the engine is not installed or cannot be reached.
        """


class Processes(Engine):
    """In processes of this machine, which share its cores.

    Args:
        workers: How many at a time.
    """

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = threading.Event()

    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs the command lines."""
        self._stopping.clear()
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._run, words): index for index, words in enumerate(commands)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.terminate()

    def _run(self, words: Sequence[str]) -> Outcome:
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        command = [sys.executable, "-m", "recast_pl", *words]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            self._running.add(process)
            if self._stopping.is_set():
                process.terminate()
            output, _ = process.communicate()
        self._running.discard(process)
        return Outcome(process.returncode, output)


class Ray(Engine):
    """On a Ray cluster; needs the extra `ray`. What a dying worker or machine leaves, another goes on with.

    Args:
        address: Of the cluster; None for $RAY_ADDRESS, or else a cluster of this machine alone, for this command.
        cpus: Cores of each command line.
        gpus: GPUs of each command line; a fraction lets several share one, 0 for none.
    """

    def __init__(self, address: str | None = None, cpus: float = 1, gpus: float = 0) -> None:
        self.address, self.cpus, self.gpus = address, cpus, gpus

    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs the command lines."""
        ray = extra("ray", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere, unless asked for
        try:
            connected = ray.is_initialized()
            ray.init(self.address, ignore_reinit_error=True, log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, RuntimeError, ValueError) as cause:
            raise RunError(f"no Ray cluster answers at {self.address} ({cause}); start one, or leave it out") from cause
        # a process for each command line, in which it runs itself: none of it outlives a worker that is killed
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_calls=1, max_retries=_DEATHS)(_work)
        settings = {name: value for name, value in os.environ.items() if name.startswith("RECAST_PL_")}
        pending = {remote.remote(words, str(Path.cwd()), settings): i for i, words in enumerate(commands)}
        try:
            while pending:
                (ended,), _ = ray.wait(list(pending), num_returns=1)
                yield pending.pop(ended), _result(ray, ended)
        finally:
            for unfinished in pending:
                ray.cancel(unfinished, force=True)
            if not connected:
                ray.shutdown()


def _work(words: Sequence[str], folder: str, settings: Mapping[str, str]) -> Outcome:
    """Runs a command line in a worker, as in the folder where the engine was started."""
    os.chdir(folder)
    sys.path.insert(0, folder)  # as `python -m` has it, for pieces of one's own
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = _run_program(words)
    if status == _STOPPED:  # this machine is being shut down; a worker that dies is replaced, one that fails is not
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(status, output.getvalue())


def _result(ray: Any, reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(1, str(error))
    return outcome


class Slurm(Engine):
    """As an array of SLURM jobs, by submitit; needs the extra `slurm`.

    A job that is pre-empted, or whose time is up, is requeued and goes on. Ending the command ends the jobs.

    Args:
        folder: For scripts and output of jobs; all machines share it.
        partition: Of the cluster; None for its default.
        minutes: Time limit of a job; one that needs more is requeued, so that it must be enough for an epoch.
        cpus: Cores of a job.
        gpus: GPUs of a job.
        memory: Gigabytes of a job; None for the cluster's default.
        parallel: Jobs that run at a time.
        options: Further options of `sbatch`, such as `{account: vision, constraint: a100}`.
        cluster: `local` runs the jobs on this machine, to try them out.
    """

    def __init__(
        self,
        folder: str = "logs/slurm",
        partition: str | None = None,
        minutes: int = 240,
        cpus: int = 4,
        gpus: int = 0,
        memory: float | None = None,
        parallel: int = 256,
        options: dict[str, Any] | None = None,
        cluster: Literal["slurm", "local"] = "slurm",
    ) -> None:
        self.folder, self.cluster = folder, cluster
        self.parameters = {
            "name": "recast_pl",
            "timeout_min": minutes,
            "cpus_per_task": cpus,
            "gpus_per_node": gpus or None,
            "mem_gb": memory,
            "slurm_partition": partition,
            "slurm_array_parallelism": parallel,
            "slurm_additional_parameters": options,
        }

    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs the command lines."""
        submitit = extra("submitit", "slurm")
        timeouts = {f"{self.cluster}_max_num_timeout": _TIMEOUTS}
        try:
            executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, **timeouts)
            executor.update_parameters(**self.parameters)
            jobs = executor.map_array(_Job(), commands)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as cause:
            raise RunError(f"SLURM takes no jobs here ({cause}); give the command where sbatch works") from cause
        positions = {job.job_id: index for index, job in enumerate(jobs)}
        try:
            for job in submitit.helpers.as_completed(jobs, poll_frequency=2):
                error = job.exception()
                status = 1 if error else job.result()
                said = str(error or job.stderr() or "")
                yield positions.pop(job.job_id), Outcome(status, f"{said}\nall that it said: {job.paths.stdout}")
        finally:
            for job in jobs:
                if job.job_id in positions:
                    job.cancel(check=False)


def _run_program(words: Sequence[str]) -> int:
    """Runs a command line in this process, by what `python -m recast_pl` runs; returns its exit status."""
    status: int = importlib.import_module("recast_pl.__main__").main(words)
    return status


class _Job:
    """A command line as a job that can be requeued."""

    def __call__(self, words: Sequence[str]) -> int:
        status = _run_program(words)
        if status == _STOPPED:  # SLURM ends this job in a moment, and requeues it unless it is cancelled
            signal.pause()
        return status

    def checkpoint(self, words: Sequence[str]) -> Any:
        """What is to run after requeueing; the checkpoint of the last epoch is there at any time."""
        return extra("submitit", "slurm").helpers.DelayedSubmission(self, words)


def run_units(engine: Engine, units: Mapping[str, Sequence[str]], succeeded: Callable[[str], None]) -> int:
    """Runs command lines on an engine, and says of each that failed how it ended.

    Args:
        engine: The engine.
        units: Command lines by what they are called.
        succeeded: Called with the name of each that ended well, as soon as it has.

    Returns:
        0, or the status of the first that failed; the others have been run all the same, if the engine could.
    """
    names, first = list(units), 0
    with closing(engine.run(list(units.values()))) as endings:
        for index, outcome in endings:
            if not outcome.status:
                succeeded(names[index])
                continue
            first = first or outcome.status
            last = "".join(f"\n    {line}" for line in outcome.output.strip().splitlines()[-20:])
            print(f"{names[index]} failed with status {outcome.status}{':' if last else ''}{last}", file=sys.stderr)
    return first
