"""The launchers: dry runs, calls, and errors. The cloud's programs are stand-ins that record their arguments."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from embed import cli

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
TRAIN = [
    "--",
    "train",
    "--config=c.py:stage=pair",
    "--workdir=gs://b/runs/a",
    "--config.stages.pair.curriculum=((3, 'pairs'),)",
]
TPU = ["--name=pair", "--zone=z", "--type=v6e-16", "--runtime=v2"]
GKE = ["--name=pair", "--accelerator=tpu-v6e-slice", "--topology=4x8", "--image=r/embed:1"]
FAKE = """#!{python}
import json, os, sys
text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
files = {{a: open(a.split("=")[-1]).read() for a in sys.argv if a.startswith("--metadata-from-file=")}}
with open(os.environ["CALLS"], "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], text, files]) + "\\n")
"""


@pytest.fixture
def launch(tmp_path):
    """launch(script, *arguments, **environment) -> (completed process, calls of the cloud's programs)."""
    for name in ("gcloud", "kubectl", "sbatch", "squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text(FAKE.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(script, *arguments, **more):
        calls.write_text("")
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "PORT": "1234"}
        for name in ("EMBED", "LOGS"):
            environment.pop(name, None)
        environment |= more
        done = subprocess.run(
            ["bash", LAUNCH / script, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        return done, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def test_the_scripts_pass_shellcheck():
    scripts = sorted(str(path) for path in LAUNCH.glob("*.sh"))
    assert len(scripts) == 5
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "-x", "-P", LAUNCH, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["local.sh", "tpu.sh", "gke.sh", "slurm.sh"])
def test_help_prints_the_usage_and_so_does_a_wrong_word_with_code_2(launch, script):
    helped, _ = launch(script, "--help")
    assert helped.returncode == 0 and f"launch/{script}" in helped.stdout and "--dry-run" in helped.stdout
    wrong, called = launch(script, "many")
    assert wrong.returncode == 2 and f"launch/{script}" in wrong.stderr and not called


@pytest.mark.parametrize(
    "script, arguments, sentence",
    [
        ("tpu.sh", ["submit", *TPU[1:], *TRAIN], "--name=VALUE is missing"),
        ("tpu.sh", ["submit", *TPU, "--color=red", *TRAIN], "unknown option --color"),
        ("tpu.sh", ["submit", *TPU, "--zone", *TRAIN], "--zone is unknown or needs =VALUE"),
        ("gke.sh", ["submit", *GKE, *TRAIN[:3]], "embed train needs --workdir="),
        ("gke.sh", ["submit", *GKE, "--topology=4", *TRAIN], "--topology=4 must be AxB or AxBxC"),
        ("gke.sh", ["submit", *GKE, "--", "evaluate", "--model=m", "--output=o"], "--output=o must be --output=gs://"),
        ("gke.sh", ["submit", *GKE, "--", "search", "--model=m"], "needs --workdir=gs://BUCKET/NAME or --output=gs://"),
        (
            "tpu.sh",
            ["submit", *TPU, *TRAIN[:3], "--workdir=runs/a"],
            "--workdir=runs/a must be --workdir=gs://BUCKET/NAME",
        ),
        (
            "tpu.sh",
            ["submit", *TPU, *TRAIN[:3], "--workdir", "gs://b/a"],
            "--workdir must be --workdir=gs://BUCKET/NAME",
        ),
        (
            "tpu.sh",
            ["submit", *TPU, *TRAIN[:3], "--workdir=gs://b/"],
            "--workdir=gs://b/ must be --workdir=gs://BUCKET",
        ),
        (
            "tpu.sh",
            ["submit", *TPU, "--", *TRAIN[2:]],
            "expected a verb of embed after --, not '--config=c.py:stage=pair'",
        ),
        ("tpu.sh", ["submit", *TPU, "--", "prepare", *TRAIN[2:]], "not 'prepare'"),  # runs in one process
        ("slurm.sh", ["submit", "--nodes=2", *TRAIN], "--gpus=VALUE is missing"),
        ("slurm.sh", ["submit", "--nodes=2", "--gpus=8", *TRAIN], "no folder for logs: set LOGS"),
        ("slurm.sh", ["submit", "--nodes=2", "--gpus=8", "--", "common"], "not 'common'"),
        ("slurm.sh", ["stop"], "--job=VALUE is missing"),
        ("slurm.sh", ["logs", "--job=7"], "--workdir=VALUE is missing"),
        (
            "local.sh",
            ["2", "--", "trane"],
            "expected a verb of embed after --, not 'trane': one of ablate encode evaluate",
        ),
        ("local.sh", ["2", "--"], "expected a verb of embed after --, not ''"),
        ("local.sh", ["2", "--", "train", "--config=c.py", "--color"], "embed train needs --workdir="),
        ("local.sh", ["two", *TRAIN], "N=two must be a whole number of processes, at least 1"),
        ("local.sh", ["0", *TRAIN], "N=0 must be a whole number"),
        ("local.sh", ["1.5", *TRAIN], "N=1.5 must be a whole number"),
        ("local.sh", TRAIN, "N= must be a whole number"),
        ("local.sh", ["2", "3", *TRAIN], "unexpected argument 3"),
        ("local.sh", ["2", "train", *TRAIN[2:]], "unexpected argument train"),
        ("local.sh", ["2", "--color", *TRAIN], "--color is unknown or needs =VALUE; options: --dry-run"),
        ("local.sh", ["--processes=2", *TRAIN], "unknown option --processes, expected one of: --dry-run"),
        ("local.sh", ["-n", "2", *TRAIN], "unknown option -n"),
        ("local.sh", ["2", "--dry-run=yes", *TRAIN], "--dry-run takes no value"),
        ("tpu.sh", ["submit", *TPU, "--slices=a[0]", *TRAIN], "--slices=a[0] must be a whole number, at least 1"),
        ("gke.sh", ["submit", *GKE, "--restarts=many", *TRAIN], "--restarts=many must be a whole number"),
        ("slurm.sh", ["submit", "--nodes=0", "--gpus=8", *TRAIN], "--nodes=0 must be a whole number"),
        ("slurm.sh", ["list", "all"], "unexpected argument all"),
        ("slurm.sh", ["list", "--", "train"], "list takes no arguments after --"),
        ("tpu.sh", ["submit", *TPU, *TRAIN, "--dry-run"], "--dry-run comes after --, but the options of the launcher"),
        ("gke.sh", ["submit", *GKE, *TRAIN, "--dry-run"], "the options of the launcher come before --"),
        ("slurm.sh", ["submit", "--nodes=1", "--gpus=8", *TRAIN, "--dry-run"], "--dry-run comes after --"),
        ("slurm.sh", ["submit", "--nodes=1", *TRAIN, "--gpus", "8"], "--gpus comes after --"),
        ("local.sh", ["2", *TRAIN, "--dry-run"], "--dry-run comes after --"),
        ("local.sh", ["2", *TRAIN, "--dry_run=1"], "--dry-run comes after --"),
        ("tpu.sh", ["submit", *TPU, *TRAIN, "--run-id=x"], "--run-id comes after --"),
        ("gke.sh", ["submit", *GKE, "--chips-per-host=3", *TRAIN], "must divide the 32 chips of 4x8: one of 1 2 4 8"),
        ("gke.sh", ["submit", *GKE, "--chips-per-host=16", *TRAIN], "--chips-per-host=16 must divide the 32 chips"),
        (
            "gke.sh",
            ["submit", *GKE, "--topology=1x1", "--chips-per-host=4", *TRAIN],
            "--chips-per-host=4 must divide the 1 chips of 1x1: one of 1",
        ),
        ("gke.sh", ["submit", *GKE, "--topology=3x3", *TRAIN], "--chips-per-host=9 must divide the 9 chips of 3x3"),
        ("gke.sh", ["submit", *GKE, "--topology=0x8", *TRAIN], "--topology=0x8 must be AxB or AxBxC"),
        *(
            (script, ["submit", *options, f"--name={name}", *TRAIN], f"--name={name} must be at most 40 lower-case")
            for script, options in (("tpu.sh", TPU), ("gke.sh", GKE), ("slurm.sh", ["--nodes=1", "--gpus=8"]))
            for name in ("Pair", "my_run", "a b", "-a", "a-", "7up", "a" * 41)
        ),
    ],
)
def test_errors_name_what_is_missing_or_unknown_and_nothing_is_called(launch, script, arguments, sentence):
    done, called = launch(script, *arguments)
    assert done.returncode == 2 and sentence in done.stderr and not called


def test_the_accepted_verbs_are_those_with_distributed_arguments(launch):
    named = launch("local.sh", "2", "--", "x")[0].stderr.partition("one of ")[2].splitlines()[0].split()
    takes = "add_distributed_arguments(parser)"
    assert named == [verb for verb in cli.verbs() if takes in (ROOT / "embed" / "cli" / f"{verb}.py").read_text()]
    assert {"train", "pipeline", "mine", "encode", "index", "search", "evaluate", "merge", "export", "sample"} <= {
        *named
    }


@pytest.mark.parametrize("first", [["--dry-run", "2"], ["2", "--dry-run"]])
def test_a_dry_run_of_local_prints_one_command_per_process_and_starts_none(launch, tmp_path, first):
    embed = tmp_path / "embed"
    embed.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    embed.chmod(0o755)
    run = ["train", "--config=c.py:stage=pair", f"--workdir={tmp_path}/a b"]
    done, _ = launch("local.sh", *first, "--", *run, EMBED=str(embed))
    common = f"{embed} {run[0]} {run[1]} --workdir={tmp_path}/a\\ b --coordinator=127.0.0.1:1234 --num_processes=2"
    assert not (tmp_path / "started").exists() and not (tmp_path / "a b.logs").exists()
    assert done.stdout.splitlines() == [f"{common} --process_id=0", f"{common} --process_id=1"]


PROCESS = """#!/usr/bin/env bash
# Plays `embed`: process 0 does what ZERO says or waits to be stopped. Process 1 starts after it and does what ONE says.
trap 'echo saved; kill "$!" 2>/dev/null; exit 143' TERM
echo "$EMBED_RUN_ID $EMBED_COMMIT $*"
case "$*" in
  *--process_id=0*) echo >&"$START"; eval "$ZERO" ;;
  *--process_id=1*) head -n 1 <&"$STARTED" >/dev/null & wait "$!"; eval "$ONE" ;;
esac
# The trap ends it. One read without a limit would miss a signal that comes before it, and a child would keep tee alive.
while true; do read -r -t 0.1 <> <(:) || true; done
"""


@pytest.mark.parametrize(
    "one, code", [("exit 7", 7), ("kill -TERM $PPID; sleep 100 & wait", 143), ("kill -KILL $$", 137)]
)
def test_local_ends_all_processes_with_the_code_of_the_first_and_writes_a_log_per_process(tmp_path, one, code):
    local = _local(tmp_path, ONE=one, GRACE="0.2")
    local.communicate(timeout=100)  # until nothing holds its output open, so the logs are complete
    assert local.returncode == code
    for k in (0, 1):
        words = (tmp_path / "a run.logs" / f"process-{k}.log").read_text().split()
        assert words[0] == "named" and words[1] == _commit() and f"--process_id={k}" in words


def test_local_returns_when_its_processes_have_ended_without_waiting_for_the_grace_period(tmp_path):
    local = _local(tmp_path, ZERO="exit 7", ONE="exit 7", GRACE="1000")
    local.communicate(timeout=100)  # until nothing holds its output open
    assert local.returncode == 7


def test_on_ctrl_c_the_processes_of_local_save_and_their_output_is_shown(tmp_path):
    local = _local(tmp_path, start_new_session=True)
    while "--process_id=0" not in local.stdout.readline():
        assert local.poll() is None
    os.killpg(local.pid, signal.SIGINT)  # as a terminal does: tee gets it too
    assert "saved" in local.communicate(timeout=100)[0] and local.returncode == 143
    assert "saved" in (tmp_path / "a run.logs" / "process-0.log").read_text()


@pytest.mark.parametrize(
    "arguments", [("encode", "--output=x.npy"), ("train", "--config=c.py", "--workdir=gs://b/runs/a")]
)
def test_without_a_local_workdir_local_logs_to_LOGS_or_to_a_new_folder_that_it_prints(tmp_path, arguments):
    ends = {"ZERO": "exit 0", "ONE": "exit 0"}
    _local(tmp_path, *arguments, LOGS=str(tmp_path / "logs"), **ends).communicate(timeout=100)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["process-0.log", "process-1.log"]
    output, _ = _local(tmp_path, *arguments, **ends).communicate(timeout=100)
    (folder,) = tmp_path.glob("embed-logs-*")
    assert f"logs in {folder}/" in output and arguments[0] in (folder / "process-1.log").read_text()


def _local(folder, *arguments, start_new_session=False, **environment):
    """Start launch/local.sh with two processes that play `embed`."""
    embed = folder / "embed"
    embed.write_text(PROCESS)
    embed.chmod(0o755)
    workdir = folder / "a run"
    pipe = started, start = os.pipe()  # process 0 writes a line to it, process 1 waits for this line
    defaults = {"ZERO": "", "ONE": "", "GRACE": "70", "EMBED_RUN_ID": "named"}
    defaults |= {"STARTED": str(started), "START": str(start)}
    local = subprocess.Popen(
        ["bash", LAUNCH / "local.sh", "2", "--", *(arguments or [*TRAIN[1:3], "--workdir", workdir])],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=start_new_session,
        env={**os.environ, "TMPDIR": str(folder), "EMBED": str(embed), **defaults, **environment},
        pass_fds=pipe,
    )
    for end in pipe:  # the processes have it
        os.close(end)
    return local


def _commit():
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"


# --- TPU -----------------------------------------------------------------------------------------------------------


def test_tpu_submit_prints_the_script_of_a_host_and_the_commands(launch):
    done, called = launch("tpu.sh", "submit", *TPU, "--spot", "--run-id=one", "--dry-run", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert not called
    script, commands = done.stdout.split("# commands\n")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    (command,) = (line for line in script.splitlines() if line.startswith("exec .venv"))
    assert shlex.split(command) == ["exec", ".venv/bin/embed", "train", "--distributed", *TRAIN[2:]]
    assert f"export EMBED_RUN_ID=one EMBED_COMMIT={_commit()}\n" in script
    assert "Restart=on-failure\n" in script and "RestartPreventExitStatus=1 2 130\n" in script  # 75, 134, 143: again
    assert "\ngcloud storage cp gs://b/source/one.tar.gz source.tar.gz\ntar -xzf source.tar.gz\n" in script
    assert "'.[tpu,gcs]'" in script and "gcsfuse" not in script and "/mnt" not in script
    assert commands.splitlines() == [
        f"git -C {ROOT} archive --format=tar.gz --output=one.tar.gz HEAD",
        "gcloud storage cp one.tar.gz gs://b/source/one.tar.gz",
        "gcloud compute tpus queued-resources create pair --node-id=pair --zone=z --accelerator-type=v6e-16 "
        "--runtime-version=v2 --spot --labels=app=embed --scopes=https://www.googleapis.com/auth/cloud-platform "
        "--metadata-from-file=startup-script=startup.sh",
    ]


def test_tpu_submits_the_committed_code_and_refuses_uncommitted_changes(launch, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    for name in ("common.sh", "tpu.sh"):
        (clone / "launch" / name).write_text((LAUNCH / name).read_text())
    git = ["git", "-C", clone, "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "as it is", "--allow-empty"], check=True)
    script = clone / "launch" / "tpu.sh"
    done, called = launch(script, "submit", *TPU, "--slices=2", *TRAIN)
    assert done.returncode == 0, done.stderr
    (copy, create) = called
    assert copy[1][:2] == ["storage", "cp"] and re.fullmatch(r"gs://b/source/pair-\d{8}-\d{6}-\w+\.tar\.gz", copy[1][3])
    assert {"--node-count=2", "--node-prefix=pair", "--accelerator-type=v6e-16"} <= set(create[1])
    (started,) = create[3].values()
    assert "embed train --distributed" in started and "\nsystemctl start embed\n" in started
    (clone / "README.md").write_text("changed")
    done, called = launch(script, "submit", *TPU, *TRAIN)
    assert done.returncode == 2 and "uncommitted changes would not be copied" in done.stderr and not called


def test_tpu_list_logs_and_stop(launch):
    _, ((_, listed, *_),) = launch("tpu.sh", "list", "--zone=z", "--project=p")
    assert listed == ["compute", "tpus", "queued-resources", "list", "--zone=z", "--project=p"]
    _, calls = launch("tpu.sh", "logs", "--name=pair", "--zone=z", "--slices=2")
    assert [call[1][4] for call in calls] == ["pair-0", "pair-1"] and "/var/log/embed.log" in calls[0][1][-1]
    _, (signalled, deleted) = launch("tpu.sh", "stop", "--name=pair", "--zone=z")
    assert "--worker=all" in signalled[1] and signalled[1][-1] == "--command=sudo systemctl stop embed"
    assert deleted[1] == ["compute", "tpus", "queued-resources", "delete", "pair", "--zone=z", "--force", "--quiet"]


# --- GKE -----------------------------------------------------------------------------------------------------------


def test_gke_renders_one_job_per_slice_and_one_pod_per_host(launch):
    done, called = launch("gke.sh", "submit", *GKE, "--slices=2", "--run-id=one", "--dry-run", *TRAIN)
    assert done.returncode == 0 and not called
    jobset = yaml.safe_load(done.stdout)
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "pair",
    )
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (8, 8, 0)  # 32 chips, four per host
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    (container,) = pod["containers"]
    assert container["command"] == ["embed", "train", "--distributed", *TRAIN[2:]]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [{"name": "EMBED_RUN_ID", "value": "one"}]  # EMBED_COMMIT is the image's own
    assert not {"volumes"} & pod.keys() and not {"volumeMounts"} & container.keys()
    # Codes 1 and 2 fail the set at once; any other code restarts the whole set.
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "embed", "operator": "In", "values": [1, 2]}}
    ]
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 100,
        "restartStrategy": "BlockingRecreate",
        "rules": [{"name": "wrong_input", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }


@pytest.mark.parametrize(
    "topology, given, hosts, chips", [("4x8", [], 8, 4), ("2x4", ["--chips-per-host=8"], 1, 8), ("1x1", [], 1, 1)]
)
def test_gke_gives_each_host_its_chips(launch, topology, given, hosts, chips):
    done, _ = launch("gke.sh", "submit", *GKE, f"--topology={topology}", *given, "--dry-run", *TRAIN)
    (job,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (spec["parallelism"], limits) == (hosts, {"google.com/tpu": chips})


@pytest.mark.parametrize(
    "image, version", [("r:5000/embed:abc1234", "abc1234"), ("r/embed@sha256:" + "f" * 64, "f" * 12)]
)
def test_a_gke_run_is_named_after_its_image(launch, image, version):
    done, _ = launch("gke.sh", "submit", *GKE, f"--image={image}", "--dry-run", *TRAIN)
    assert re.search(rf"value: 'pair-\d{{8}}-\d{{6}}-{version}'", done.stdout)


def test_gke_submit_list_logs_and_stop_call_kubectl(launch):
    done, ((_, arguments, text, _),) = launch("gke.sh", "submit", *GKE, "--service-account=s", *TRAIN)
    assert done.returncode == 0 and arguments == ["apply", "-f", "-"]
    assert (
        yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["serviceAccountName"]
        == "s"
    )
    assert launch("gke.sh", "list")[1][0][1] == ["get", "jobsets", "-l", "app=embed"]
    assert "jobset.sigs.k8s.io/jobset-name=pair" in launch("gke.sh", "logs", "--name=pair")[1][0][1]
    assert launch("gke.sh", "stop", "--name=pair")[1][0][1] == ["delete", "jobset", "pair", "--cascade=foreground"]


@pytest.mark.parametrize(
    "script, arguments", [("tpu.sh", TPU), ("gke.sh", GKE), ("slurm.sh", ["--nodes=1", "--gpus=8"])]
)
def test_dry_run_may_come_anywhere_before_the_verb(launch, script, arguments):
    outputs = set()
    for line in (
        ["--dry-run", "submit", *arguments],
        ["submit", "--dry-run", *arguments],
        ["submit", *arguments, "--dry-run"],
    ):
        done, called = launch(script, *line, "--run-id=one", *TRAIN, LOGS="/shared/logs")
        assert done.returncode == 0 and not called, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_the_logs_of_a_workdir_in_the_home_folder_are_next_to_it(launch, tmp_path):
    train = ["--", "train", "--config=c.py", "--workdir=~/run"]
    done, _ = launch("slurm.sh", "submit", "--nodes=1", "--gpus=8", "--dry-run", *train, HOME=str(tmp_path))
    assert f"--output={tmp_path}/run.logs/slurm-%j.log" in done.stdout


# --- Slurm ---------------------------------------------------------------------------------------------------------


def test_slurm_submits_one_process_per_gpu_and_returns_the_job_to_the_queue(launch, tmp_path):
    train = ["--", "train", "--config=c.py:stage=pair", f"--workdir={tmp_path}/run"]
    done, called = launch(
        "slurm.sh", "submit", "--nodes=4", "--gpus=8", "--partition=p", "--run-id=one", "--dry-run", *train
    )
    assert done.returncode == 0 and not called and not (tmp_path / "run.logs").exists()
    done, ((_, arguments, script, _),) = launch(
        "slurm.sh", "submit", "--nodes=4", "--gpus=8", "--partition=p", "--run-id=one", *train
    )
    assert (
        arguments == ["--parsable", f"--output={tmp_path}/run.logs/slurm-%j.log"] and (tmp_path / "run.logs").is_dir()
    )
    for line in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--requeue",
        "--signal=TERM@300",
        "--partition=p",
    ):
        assert f"#SBATCH {line}\n" in script
    srun = (
        f"srun --kill-on-bad-exit=0 --wait=180 --cpus-per-task=8 {ROOT}/.venv/bin/embed train --distributed "
        f"--config=c.py:stage=pair --workdir={tmp_path}/run\n"
    )
    assert srun in script and "export EMBED_RUN_ID=one EMBED_COMMIT=" in script
    # The script itself, with an srun that ends with each code; a job that was never requeued has no restart count.
    for code, restarts, requeued in (
        (0, None, False),
        (1, None, False),
        (2, None, False),
        (130, None, False),
        (75, None, True),
        (134, None, True),
        (137, None, True),
        (143, None, True),
        (143, 99, True),
        (143, 100, False),
    ):
        program = script.replace(srun, f"(exit {code})\n")
        done, called = _run_batch(program, tmp_path, restarts)
        assert done.returncode == code and bool(called) == requeued


def _run_batch(program, folder, restarts):
    calls = folder / "calls"
    calls.write_text("")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "7"}
    environment |= {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", "-c", program], env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    called = [json.loads(line)[:2] for line in calls.read_text().splitlines()]
    assert called in ([], [["scontrol", ["requeue", "7"]]])
    return done, called


def test_slurm_list_logs_and_stop(launch, tmp_path):
    assert launch("slurm.sh", "list")[1][0][:2] == ["squeue", ["--me", "--format=%i %j %T %M %D %R"]]
    (tmp_path / "run.logs").mkdir()
    (tmp_path / "run.logs" / "slurm-7.log").write_text("step 3\n")
    assert launch("slurm.sh", "logs", "--job=7", f"--workdir={tmp_path}/run")[0].stdout == "step 3\n"
    environment = {"LOGS": f"{tmp_path}/run.logs"}
    assert launch("slurm.sh", "logs", "--job=7", **environment)[0].stdout == "step 3\n"
    evaluate = ["evaluate", "--model=m", "--output=/shared/figures"]
    _, ((_, arguments, script, _),) = launch(
        "slurm.sh", "submit", "--nodes=1", "--gpus=8", "--", *evaluate, **environment
    )
    assert arguments[-1] == f"--output={tmp_path}/run.logs/slurm-%j.log"
    assert "/embed evaluate --distributed --model=m --output=/shared/figures\n" in script
    _, calls = launch("slurm.sh", "stop", "--job=7")
    assert [call[:2] for call in calls] == [
        ["scontrol", ["update", "JobId=7", "Requeue=0"]],
        ["scancel", ["--state=PENDING", "7"]],
        ["scancel", ["--signal=TERM", "--state=RUNNING", "7"]],
    ]


def test_the_manifest_of_the_server_agrees_with_itself_and_with_the_server():
    deployment, service = yaml.safe_load_all((LAUNCH / "serve.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    program, verb, *options = container["command"]
    assert (program, verb) == ("embed", "serve") and f"--port={ports['http']}" in options
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == given["port"]
    source = (ROOT / "embed" / "cli" / "serve.py").read_text() + (ROOT / "embed/inference/server.py").read_text()
    for name in given:
        assert f'"--{name}"' in source, name
    for probe in ("startupProbe", "readinessProbe"):
        check = container[probe]["httpGet"]
        assert check["port"] in ports and f'"{check["path"]}"' in source
    names = {entry["name"] for entry in container["env"]}
    assert all(name in source + (ROOT / "embed/inference/encoder.py").read_text() for name in names)
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert [port["targetPort"] in ports for port in service["spec"]["ports"]] == [True]


def test_the_extras_that_the_image_is_built_with_exist():
    text = (LAUNCH / "Dockerfile").read_text() + (LAUNCH / "serve.yaml").read_text()
    named = {extra for each in re.findall(r"EXTRAS=([a-z,]+)", text) for extra in each.strip(",").split(",")}
    declared = set(re.findall(r'^        "(\w+)":', (ROOT / "setup.py").read_text(), re.M))
    assert {"serve", "gpu", "tpu", "gcs"} <= named <= declared
