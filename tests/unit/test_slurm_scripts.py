"""launch/slurm/job.sh with stand-ins for slurm's commands: which job it queues again, and when."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "pretrain_deepspeed.sbatch"
# Of one task of an array SLURM_JOB_ID is the array's, by which scontrol shows all of its tasks.
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf 'node-1\\nnode-2\\n' ;;
  "show node") echo "NodeName=node-1 NodeAddr=10.0.0.1" ;;
  "show job")
    case "$4" in
      7_3) echo "JobId=7 ArrayTaskId=3 JobState=$STATE Restarts=0 PreemptTime=$PREEMPTED" ;;
      7) printf 'JobId=7 ArrayTaskId=3 JobState=RUNNING\\nJobId=8 ArrayTaskId=2 JobState=PENDING\\n' ;;
      12) echo "JobId=12 JobState=$STATE Restarts=0 PreemptTime=$PREEMPTED" ;;
    esac ;;
  "requeue "*) echo "$2" >>"$CALLS" ;;
esac
"""
SRUN = """#!/usr/bin/env bash
if [ -n "$LEAVES" ]; then echo checkpoint >"$DS_LOWRANK_PREEMPTED_FILE"; fi
exit "$CODE"
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script as slurm would; returns its exit code, its output and what was queued again."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("sleep", "#!/usr/bin/env bash\n")):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    calls = tmp_path / "calls"

    def run(
        leaves: str, code: int, state: str = "RUNNING", preempted: str = "None", **slurm: str
    ) -> tuple[int, str, list[str]]:
        calls.write_text("")
        place = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2"}
        environment = {**os.environ, **place, "SLURM_JOB_NAME": "pretrain", "SLURM_CPUS_ON_NODE": "4", **slurm}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "VENV": "nowhere"}
        environment |= {"LEAVES": leaves, "CODE": str(code), "STATE": state, "PREEMPTED": preempted}
        done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, calls.read_text().split()

    yield run
    for left in (ROOT / "runs").glob(".preempted-*"):
        left.unlink()


ARRAY = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(("slurm", "number"), [({"SLURM_JOB_ID": "12"}, "12"), (ARRAY, "7_3")])
def test_a_job_that_left_a_checkpoint_is_queued_again_by_its_own_number(job, slurm, number):
    code, told, queued = job("yes", 75, **slurm)
    assert queued == [number]
    assert code == 75
    assert f"job {number}: preempted with a checkpoint" in told


@pytest.mark.parametrize(("slurm", "number"), [({"SLURM_JOB_ID": "12"}, "12"), (ARRAY, "7_3")])
def test_a_preempted_job_is_queued_again_where_its_launcher_makes_a_failure_of_it(job, slurm, number):
    code, told, queued = job("", 1, preempted="2026-11-29T02:18:46", **slurm)
    assert queued == [number]
    assert code == 1
    assert f"job {number}: preempted without a new checkpoint" in told


@pytest.mark.parametrize(("code", "state"), [(0, "RUNNING"), (1, "CANCELLED")])
def test_a_preempted_job_that_has_ended_well_or_is_cancelled_is_not(job, code, state):
    assert job("", code, state, "2026-11-29T02:18:46", SLURM_JOB_ID="12")[::2] == (code, [])


def test_a_node_without_an_address_is_told(job, tmp_path):
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\n[ $2 = hostnames ] && echo node-1\n")
    code, told, queued = job("", 0, SLURM_JOB_ID="12")
    assert (code, queued) == (2, [])
    assert "scontrol does not tell the address of node-1: set MASTER_ADDR" in told


@pytest.mark.parametrize(
    ("leaves", "code", "state"), [("", 1, "RUNNING"), ("", 0, "RUNNING"), ("yes", 75, "CANCELLED")]
)
def test_others_are_not(job, leaves, code, state):
    assert job(leaves, code, state, SLURM_JOB_ID="12")[::2] == (code, [])


def sweep(tmp_path, line: str) -> tuple[int, str]:
    """Exit code and output of a dry run of a sweep's first line."""
    (tmp_path / "sweep.txt").write_text(line + "\n--lr 1\n")
    environment = {**os.environ, "SWEEP": str(tmp_path / "sweep.txt"), "SLURM_ARRAY_TASK_ID": "1", "VENV": "nowhere"}
    command = ["bash", str(SCRIPT), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--lr", "0.005", "--train_file", "a b/*.jsonl", "--run_name", "it's", "--lr_scheduler_kwargs", '{"a": 1}'],
        ["--optim_target_modules", r".*layers\.[0-3]\..*"],
        ["--run_name", "it's", "--optim_target_modules", r"a\.b"],
        ["--lr", "$HOME", "`ls`", "$(ls)", "a;b", "#", "--cache_dir", ""],
    ],
)
def test_a_line_of_a_sweep_is_its_words(tmp_path, words):
    code, printed = sweep(tmp_path, shlex.join(words))
    assert code == 0
    assert shlex.split(printed.splitlines()[-1])[-len(words) :] == words


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (r"--optim_target_modules .*layers\.[0-3]\..*", "a value with a backslash has to stand in single quotes"),
        (r"""--run_name "it's" --optim_target_modules a\.b --cache_dir "it's" """, "has to stand in single quotes"),
        ("--run_name 'open", "No closing quotation"),
        ("  ", "has no line 1"),
    ],
)
def test_a_line_of_a_sweep_that_may_mean_something_else_is_refused(tmp_path, line, why):
    code, printed = sweep(tmp_path, line)
    assert code == 2
    assert why in printed


def test_a_script_of_ones_own_gets_its_flags_alone(tmp_path):
    environment = {**os.environ, "SCRIPT": "my_train.py", "VENV": "nowhere"}
    command = ["bash", str(SCRIPT), "--dry-run", "--lr", "1"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1].endswith("node.sh deepspeed my_train.py --lr 1 ")
    assert "DS_LOWRANK_RUN_NAME=pretrain-0" in printed
