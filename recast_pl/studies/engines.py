"""Engines: where independent command lines run, such as processes on this machine, a Ray cluster, or SLURM.

Each engine hands command lines to an existing scheduler. All machines share the file system of the run folder. A
command line that is killed leaves its last checkpoint there, and continues from it when it is run again.
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
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from rich.console import RenderableType

from recast_pl.errors import RunError
from recast_pl.optional_imports import extra

ONE_DEVICE = ("--trainer.devices", "1")
"""Options of `fit` on an engine, which starts one process for each command line: a process uses one device."""

_TERMINATED = 128 + signal.SIGTERM  # exit status of a command that received SIGTERM

_RETRIES = 5  # of a command line whose worker died; one that kills more workers than that is the cause itself

_REQUEUES = 20  # of a job that ran out of time; each continues from the checkpoint of the previous one


class Outcome(NamedTuple):
    """How a command line ended; `output` may be the engine's error message, and is empty if the user has seen it."""

    status: int
    output: str = ""


Endings = Generator[tuple[int, Outcome], None, None]
"""Position and outcome of each command line, in the order in which they end; closing it stops those that still run."""


class Engine(ABC):
    """Runs command lines of `recast_pl`."""

    @abstractmethod
    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs command lines that do not depend on one another.

        Args:
            commands: The words of each, without `python -m recast_pl`.

        Returns:
            The outcomes, as soon as they are known.

        Raises:
            RunError: If the engine is not installed or cannot be reached.
        """


class Processes(Engine):
    """Processes on this machine, which share its cores.

    Args:
        workers: Number of processes that run at the same time.
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
        command = [sys.executable, "-m", "recast_pl", *words]
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        with subprocess.Popen(command, env=environment, stdout=pipe, stderr=out, text=True) as process:
            self._running.add(process)
            if self._stopping.is_set():
                process.terminate()
            output, _ = process.communicate()
        self._running.discard(process)
        return Outcome(process.returncode, output)


class Ray(Engine):
    """A Ray cluster; needs the extra `ray`. If a worker or machine dies, another one continues its command line.

    Args:
        address: Address of the cluster; None for $RAY_ADDRESS, or else a temporary cluster on this machine.
        cpus: Cores for each command line.
        gpus: GPUs for each command line; a fraction lets several share one, 0 for none.
    """

    def __init__(self, address: str | None = None, cpus: float = 1, gpus: float = 0) -> None:
        self.address, self.cpus, self.gpus = address, cpus, gpus

    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs the command lines."""
        ray = extra("ray", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends statistics only if the user asks for it
        try:
            connected = ray.is_initialized()
            ray.init(self.address, ignore_reinit_error=True, log_to_driver=False, logging_level="WARNING")
        except (ConnectionError, RuntimeError, ValueError) as cause:
            raise RunError(f"no Ray cluster answers at {self.address} ({cause}); start one, or leave it out") from cause
        # each worker runs one command line in its own process, so nothing of it survives if the worker is killed
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_calls=1, max_retries=_RETRIES)(_run_in_worker)
        settings = {name: value for name, value in os.environ.items() if name.startswith("RECAST_PL_")}
        pending = {remote.remote(words, str(Path.cwd()), settings): i for i, words in enumerate(commands)}
        try:
            while pending:
                (ended,), _ = ray.wait(list(pending), num_returns=1)
                try:
                    outcome: Outcome = ray.get(ended)
                except ray.exceptions.RayError as error:
                    outcome = Outcome(1, str(error))
                yield pending.pop(ended), outcome
        finally:
            for unfinished in pending:
                ray.cancel(unfinished, force=True)
            if not connected:
                ray.shutdown()


def _run_in_worker(words: Sequence[str], folder: str, settings: Mapping[str, str]) -> Outcome:
    """Runs a command line in a Ray worker, in the folder and with the settings of the process that started it."""
    os.chdir(folder)
    sys.path.insert(0, folder)  # like `python -m`, so that the user's own pieces are found
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = _run_program(words)
    if status == _TERMINATED:  # the machine is shutting down: Ray retries after a worker dies, not after it fails
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(status, output.getvalue())


class Slurm(Engine):
    """An array of SLURM jobs, submitted by submitit; needs the extra `slurm`.

    A job that is preempted or runs out of time is requeued and continues. Interrupting the command cancels the jobs.

    Args:
        folder: Folder for the scripts and the output of the jobs; all machines share it.
        partition: Partition of the cluster; None for its default.
        minutes: Time limit of a job, at least enough for one epoch; a job that needs more time is requeued.
        cpus: Cores for each job.
        gpus: GPUs for each job.
        memory: Gigabytes for each job; None for the cluster's default.
        parallel: Largest number of jobs that run at the same time.
        options: Further options of `sbatch`, such as `{account: vision, constraint: a100}`.
        cluster: `slurm`, or `local` to run the jobs on this machine as a trial.
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
        requeues = {f"{self.cluster}_max_num_timeout": _REQUEUES}
        try:
            executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, **requeues)
            executor.update_parameters(**self.parameters)
            jobs = executor.map_array(_SlurmJob(), commands)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as cause:
            raise RunError(f"SLURM takes no jobs here ({cause}); give the command where sbatch works") from cause
        positions = {job.job_id: index for index, job in enumerate(jobs)}
        try:
            for job in submitit.helpers.as_completed(jobs, poll_frequency=2):
                error = job.exception()
                status = 1 if error else job.result()
                output = f"{error or job.stderr() or ''}\nfull output: {job.paths.stdout}"
                yield positions.pop(job.job_id), Outcome(status, output)
        finally:
            for job in jobs:
                if job.job_id in positions:
                    job.cancel(check=False)


class _SlurmJob:
    """A command line as a job that can be requeued."""

    def __call__(self, words: Sequence[str]) -> int:
        status = _run_program(words)
        if status == _TERMINATED:  # SLURM will kill this job in a moment, and requeue it unless it was cancelled
            signal.pause()
        return status

    def checkpoint(self, words: Sequence[str]) -> Any:
        """Returns the job to run after requeueing: the same one, because the run folder has the last checkpoint."""
        return extra("submitit", "slurm").helpers.DelayedSubmission(self, words)


def _run_program(words: Sequence[str]) -> int:
    """Runs a command line in this process, as `python -m recast_pl` does, and returns its exit status."""
    status: int = importlib.import_module("recast_pl.__main__").main(words)
    return status


def run_units(engine: Engine, units: Mapping[str, Sequence[str]], succeeded: Callable[[str], None]) -> int:
    """Runs command lines on an engine, and prints how each that failed has ended.

    Args:
        engine: The engine.
        units: Command lines by name.
        succeeded: Called with the name of each command line that succeeds, at once.

    Returns:
        0, or the status of the first command line that failed; unless the engine stops there, all others still run.
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


class Study(Protocol):
    """Runs that belong together, and their table."""

    FILE: ClassVar[str]
    """Name of the output files, without suffix."""

    @property
    def folder(self) -> Path:
        """Output folder."""

    @property
    def has_results(self) -> bool:
        """Whether there is something to show in the table."""

    def units(self) -> dict[str, list[str]]:
        """Command lines of the runs that are known to be needed, by name."""

    def run(self, engine: Engine, is_finished: Callable[[Sequence[str]], bool]) -> int:
        """Makes the runs that are not finished, and writes the results.

        Args:
            engine: Where to run.
            is_finished: Returns whether the run of a command line is finished.

        Returns:
            0, or the status of the first run that failed.
        """

    def table(self) -> RenderableType:
        """The table for the terminal."""


def run_unfinished(
    engine: Engine,
    units: Mapping[str, Sequence[str]],
    is_finished: Callable[[Sequence[str]], bool],
    succeeded: Callable[[str], None],
) -> int:
    """Runs those command lines that are not finished, and says how many are, and how to continue after a failure.

    Args:
        engine: The engine.
        units: Command lines by name.
        is_finished: Returns whether a command line is finished.
        succeeded: Called with the name of each command line that succeeds, at once.

    Returns:
        0, or the status of the first command line that failed.
    """
    left = {name: words for name, words in units.items() if not is_finished(words)}
    if len(left) < len(units):
        print(f"{len(units) - len(left)} of {len(units)} runs are finished", file=sys.stderr)
    status = run_units(engine, left, succeeded) if left else 0
    if status:
        print("run the same command again to continue", file=sys.stderr)
    return status
