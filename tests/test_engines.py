"""Tasks and runs distributed over processes, a Ray cluster and SLURM jobs give the same bytes as one process."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_stream import patches, read_summary, without_times

from recast_pl import RecastError
from recast_pl.cli import main
from recast_pl.studies.engines import Engine, Outcome, Ray, Slurm, run_units


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Lets processes find the tests' callbacks, and use a Ray cluster without a token."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def sequential(tiny_fit, tmp_path):
    assert main(tiny_fit(run_dir=tmp_path / "sequential")) == 0
    return tmp_path / "sequential"


def assert_same(run, other):
    assert patches(run) == patches(other)
    assert without_times(read_summary(run)) == without_times(read_summary(other))
    for name in ("decomposition.safetensors", "accuracy_matrix.csv"):
        assert (run / name).read_bytes() == (other / name).read_bytes()


def once(tmp_path, number, task="second", epoch=1):
    """Returns options of `fit` that send the process a signal in the middle of an epoch, once."""
    arguments = {"number": int(number), "task": task, "epoch": epoch, "marker": str(tmp_path / "signalled")}
    callback = {"class_path": "crash_callbacks.SignalOnce", "init_args": arguments}
    return "--trainer.callbacks", json.dumps([callback])


# single tasks


def test_tasks_can_be_trained_one_by_one_in_any_order_and_merged(sequential, tiny_fit, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(tiny_fit("--only", "second")) == 0
    assert list(patches(run)) == ["01_second.safetensors"]
    assert not (run / "summary.json").exists()
    config = (run / "config.yaml").read_text()
    assert "only" not in config
    assert "engine" not in config
    image = str(next((tmp_path / "second").rglob("*.png")))
    words = ["predict", "--run_dir", str(run), "--task", "second", "--images", image]
    assert main([*words, "--output", str(tmp_path / "labels.csv")]) == 0
    capsys.readouterr()
    assert main(["test", "--run_dir", str(run)]) == 0
    assert capsys.readouterr().out.count("equal") == 1
    (run / "tasks" / "00_first.json").write_text("{}")  # as if killed between record and patch
    assert main(["fit", "--run_dir", str(run), "--resume", "true"]) == 0
    assert_same(run, sequential)
    assert main(["test", "--run_dir", str(run)]) == 0


def test_training_one_task_leaves_the_config_of_the_run_unchanged(tiny_fit, tmp_path):
    assert main(tiny_fit("--only", "first")) == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    words = ["fit", "--run_dir", str(tmp_path / "run"), "--resume", "true", "--only", "second"]
    assert main([*words, "--trainer.devices", "1"]) == 0
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert len(patches(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--only", "third"], ["--only 'third'", "first, second"]),
        (["--config", "methods/ewc.yaml", "--only", "first"], ["--only", "FineTune"]),
        (["--config", "methods/ewc.yaml", "--engine", "Processes"], ["--engine", "FineTune"]),
        (["--engine", "Processes", "--trainer.devices", "2"], ["--trainer.devices 2", "--engine"]),
        (["--engine", "Nowhere"], ["Nowhere"]),
    ],
)
def test_tasks_that_cannot_be_trained_separately_are_refused_before_anything_is_written(
    words, named, tiny_fit, tmp_path, capsys
):
    assert main(tiny_fit(*words)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(name in message for name in named), message
    assert not (tmp_path / "run").exists()


def test_fitting_templates_on_an_engine_is_refused(tmp_path, capsys):
    words = ["fit", "--config", "mimicry_vit.yaml", "--run_dir", str(tmp_path / "run"), "--engine", "Processes"]
    assert main(words) == 2
    assert "MimicryModule does not train tasks" in capsys.readouterr().err


# engines


def test_processes_give_the_bytes_of_a_single_process(sequential, tiny_fit, tmp_path, capsys):
    capsys.readouterr()
    assert main(tiny_fit("--engine", "recast_pl.Processes", "--engine.workers", "2")) == 0
    out = capsys.readouterr().out
    assert "second is trained" in out
    assert out.count("average") == 1
    assert_same(tmp_path / "run", sequential)
    assert (tmp_path / "run" / "config.yaml").read_text() == (sequential / "config.yaml").read_text()


@pytest.mark.slow
def test_a_failed_task_is_named_the_others_are_trained_and_the_run_can_continue(sequential, tiny_fit, tmp_path, capsys):
    callback = {"class_path": "crash_callbacks.Poison", "init_args": {"task": "first", "epoch": 1}}
    assert main(tiny_fit("--engine", "Processes", "--trainer.callbacks", json.dumps([callback]))) == 1
    error = capsys.readouterr().err
    assert "task first failed with status 2:" in error
    assert "loss of task 'first' has become NaN" in error
    assert list(patches(tmp_path / "run")) == ["01_second.safetensors"]
    assert [task["name"] for task in read_summary(tmp_path / "run")["tasks"]] == ["second"]
    words = shlex.split(error.partition("-m recast_pl ")[2].partition(",")[0])
    assert main([*words, "--engine", "Processes", "--trainer.callbacks", "[]"]) == 0
    assert_same(tmp_path / "run", sequential)


@pytest.mark.slow
def test_compare_on_an_engine(tiny_fit, tmp_path):
    options = shlex.join(tiny_fit("--trainer.max_epochs", "1")[5:])  # without fit, config and run folder
    words = ["compare", "--base", "vit.yaml", "--configs", "methods/probe.yaml", "--seeds", "1", "2"]
    words += ["--options", options, "--output"]
    assert main([*words, str(tmp_path / "processes"), "--engine", "Processes"]) == 0
    assert main([*words, str(tmp_path / "here")]) == 0
    for seed in "12":
        assert patches(tmp_path / "processes" / "probe" / seed) == patches(tmp_path / "here" / "probe" / seed)
    tables = [list(csv.DictReader((tmp_path / name / "comparison.csv").open())) for name in ("processes", "here")]
    assert tables[0] == tables[1]
    assert tables[0][0]["seeds"] == "2"


@pytest.mark.slow
def test_ctrl_c_also_ends_the_processes(tiny_fit, tmp_path):
    markers = [tmp_path / "at_first", tmp_path / "at_second"]
    callbacks = [
        {"class_path": "crash_callbacks.WaitOnce", "init_args": {"task": name, "epoch": 1, "marker": str(marker)}}
        for name, marker in zip(("first", "second"), markers, strict=True)
    ]
    words = tiny_fit("--engine", "Processes", "--trainer.callbacks", json.dumps(callbacks))
    driver = subprocess.Popen([sys.executable, "-m", "recast_pl", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    started = wait_for(lambda: all(marker.exists() for marker in markers))
    driver.send_signal(signal.SIGINT)
    _, error = driver.communicate(timeout=600)
    assert started
    assert driver.returncode == 128 + signal.SIGINT
    assert "interrupted by SIGINT; everything trained so far is kept" in error
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()


def test_a_missing_package_is_named(monkeypatch):
    for engine, extra, module in ((Ray(), "ray", "ray"), (Slurm(), "slurm", "submitit")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RecastError, match=rf"pip install \"recast-pl\[{extra}\]\""):
            next(engine.run([["fit"]]))


def test_slurm_is_refused_where_it_is_not_installed(tmp_path):
    with pytest.raises(RecastError, match="SLURM takes no jobs here"):
        next(Slurm(str(tmp_path)).run([["fit"]]))


def test_command_lines_run_even_if_one_fails(capsys):
    class Two(Engine):
        def run(self, commands):
            yield 1, Outcome(3, "line\n" * 30 + "the end")
            yield 0, Outcome(0)

    good = []
    assert run_units(Two(), {"a": ["x"], "b": ["y"]}, good.append) == 3
    assert good == ["a"]
    error = capsys.readouterr().err
    assert error.startswith("b failed with status 3:\n")
    assert error.endswith("    the end\n")
    assert error.count("line") == 19


# Ray


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that Ray believes to have two machines of one core each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=1, resources={f"machine{i}": 1}) for i in range(2)]
    yield cluster, workers
    cluster.shutdown()


@pytest.mark.slow
def test_ray_continues_when_a_machine_dies(sequential, tiny_fit, tmp_path, cluster):
    cluster, machines = cluster
    run = tmp_path / "run"
    where = tmp_path / "where"
    callback = {
        "class_path": "crash_callbacks.WaitOnce",
        "init_args": {"task": "second", "epoch": 1, "marker": str(where)},
    }

    def remove():
        assert wait_for(where.exists)
        node = where.read_text()
        (machine,) = [m for m in machines if m.node_id == node]
        cluster.remove_node(machine, allow_graceful=False)

    killer = threading.Thread(target=remove)
    killer.start()
    words = ("--engine", "recast_pl.Ray", "--engine.address", cluster.address)
    assert main(tiny_fit(*words, "--trainer.callbacks", json.dumps([callback]))) == 0
    killer.join()
    assert where.exists()
    assert_same(run, sequential)


@pytest.mark.slow
def test_ray_continues_when_a_worker_dies_and_names_failures(sequential, tiny_fit, tmp_path, cluster, capsys):
    run, (cluster, _) = tmp_path / "run", cluster
    engine = ("--engine", "Ray", "--engine.address", cluster.address)
    callbacks = json.loads(once(tmp_path, signal.SIGKILL)[1])
    callbacks += [{"class_path": "crash_callbacks.Poison", "init_args": {"task": "first", "epoch": 1}}]
    assert main(tiny_fit(*engine, "--trainer.callbacks", json.dumps(callbacks))) == 1
    assert (tmp_path / "signalled").exists()
    error = capsys.readouterr().err
    assert "task first failed with status 2:" in error
    assert "loss of task 'first' has become NaN" in error
    assert list(patches(run)) == ["01_second.safetensors"]
    assert main(["fit", "--run_dir", str(run), "--resume", "true", "--trainer.callbacks", "[]"]) == 0
    assert_same(run, sequential)


# SLURM


@pytest.mark.slow
def test_a_requeued_slurm_job_continues(sequential, tiny_fit, tmp_path):
    engine = ("--engine", "Slurm", "--engine.folder", tmp_path / "jobs", "--engine.cluster", "local")
    assert main(tiny_fit(*engine, *once(tmp_path, signal.SIGUSR2))) == 0
    assert (tmp_path / "signalled").exists()
    assert any("Requeued job" in path.read_text() for path in (tmp_path / "jobs").glob("*_log.*"))
    assert_same(tmp_path / "run", sequential)


@pytest.mark.slow
def test_a_failed_slurm_job_is_named(tiny_fit, tmp_path, capsys):
    callback = {"class_path": "crash_callbacks.Poison", "init_args": {"task": "first", "epoch": 1}}
    engine = ("--engine", "Slurm", "--engine.folder", tmp_path / "jobs", "--engine.cluster", "local")
    assert main(tiny_fit(*engine, "--trainer.callbacks", json.dumps([callback]))) == 1
    error = capsys.readouterr().err
    assert "task first failed with status 2:" in error
    assert "loss of task 'first' has become NaN" in error
    assert f"full output: {tmp_path / 'jobs'}" in error
    assert list(patches(tmp_path / "run")) == ["01_second.safetensors"]


SRUN = """#!/usr/bin/env bash
# starts the tasks of one machine, as srun does
while [[ "$1" == --* ]]; do shift; done
echo $$ > "$CALLS.srun"
end() {  # as SLURM does after its KillWait
  kill "${pids[@]}"
  for _ in {1..120}; do kill -0 "${pids[@]}" || break; sleep 0.5; done
  kill -9 "${pids[@]}"; wait; exit 143
}
trap end TERM
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
kill "$(cat "$CALLS.srun")"
"""


@pytest.mark.slow
def test_the_slurm_script_trains_with_two_processes_and_requeues_itself(tiny_fit, tmp_path):
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "recast", "SLURM_NNODES": "1", "SLURM_NTASKS": "2"},
        "SLURM_NTASKS_PER_NODE": "2",
    }
    callback = {"class_path": "crash_callbacks.WaitOnce", "init_args": {"task": "second", "epoch": 1}}
    callback["init_args"]["marker"] = str(tmp_path / "here")
    words = tiny_fit("--trainer.callbacks", json.dumps([callback]))[1:]
    command = ["bash", str(ROOT / "examples" / "slurm.sh"), *words]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    started = wait_for((tmp_path / "here").exists)
    job.send_signal(signal.SIGUSR1)  # SLURM's warning before the time limit
    job.communicate(timeout=600)
    assert started
    assert (tmp_path / "calls").read_text() == "requeue 4711\n"
    run = tmp_path / "run"
    assert list(patches(run)) == ["00_first.safetensors"]
    assert (run / "checkpoints" / "01_second" / "last.ckpt").exists()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("average") == 1
    assert not list(run.glob("hpc_ckpt*"))
    two = tiny_fit("--trainer.devices", "2", "--trainer.strategy", "ddp", run_dir=tmp_path / "two")
    subprocess.run([sys.executable, "-m", "recast_pl", *two], cwd=ROOT, check=True, timeout=600)
    assert patches(run) == patches(tmp_path / "two")
