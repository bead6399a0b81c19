# What the batch scripts share: start the ranks on all nodes, pass slurm's warning on to them, queue the job again.
# Sourced in the repository's folder with LAUNCHER, DEFAULTS (flags) and the job's own arguments in "$@". SCRIPT in the
# environment names a script of your own, which gets these arguments alone, and a name for its folder.

dry_run=
arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry_run=yes; else arguments+=("$argument"); fi
done

if [ -n "$dry_run" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
  # Outside of a job: what it would be on the nodes that the script asks for.
  export SLURM_JOB_ID=0 SLURM_JOB_NAME=pretrain SLURM_JOB_NODELIST=first-node,second-node SLURM_NNODES=2
  export GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
  scontrol() { echo "NodeAddr=first-node"; }
elif [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: submit this with sbatch, or look at what it would do with --dry-run" >&2
  exit 2
fi
. launch/slurm/environment.sh

# A sweep is a file with a line of flags for each task of a job array: SWEEP=sweep.txt sbatch --array=1-6 ...
if [ -n "${SWEEP:-}" ]; then
  if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "error: SWEEP needs a job array: sbatch --array=1-$(wc -l <"$SWEEP") ..." >&2
    exit 2
  fi
  line="$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SWEEP")"
  if [ -z "${line//[[:space:]]/}" ]; then
    echo "error: $SWEEP has no line $SLURM_ARRAY_TASK_ID: submit with --array=1-$(grep -c . "$SWEEP")" >&2
    exit 2
  fi
  # Quotes count as in a shell. What a shell would make of a backslash is not what a regular expression means by it.
  flags="$(python3 - "$line" <<'PYTHON'
import re, shlex, sys
if "\\" in re.sub("""("[^"]*")|'[^']*'""", r"\1", sys.argv[1]):
    sys.exit("a value with a backslash has to stand in single quotes")
try:
    print(shlex.join(shlex.split(sys.argv[1])))
except ValueError as error:
    sys.exit(str(error))
PYTHON
  )" || {
    echo "error: line $SLURM_ARRAY_TASK_ID of $SWEEP cannot be taken apart: $line" >&2
    exit 2
  }
  eval "arguments+=($flags)"  # every word is quoted
fi

# A job that is queued again has its number still, and with it its folder: --resume goes on there, or starts.
number="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
# CheckpointCallback writes this file when the run was told to stop and has left a checkpoint: torchrun turns the ranks'
# code into 1.
mkdir -p runs
export DS_LOWRANK_PREEMPTED_FILE="$PWD/runs/.preempted-$number"
# One task a node that starts all its ranks: it has all of the node's processors, whatever the cluster binds tasks to.
step=(srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL
  --cpu-bind=none
  bash launch/slurm/node.sh "$LAUNCHER")
export DS_LOWRANK_RUN_NAME="$SLURM_JOB_NAME-$number"
if [ -n "${SCRIPT:-}" ]; then
  step+=("$SCRIPT" "${arguments[@]}")
else
  step+=(launch/pretrain.py "${DEFAULTS[@]}" --run_name "$DS_LOWRANK_RUN_NAME" --resume "${arguments[@]}")
fi

if [ -n "$dry_run" ]; then
  env | grep -E '^(VIRTUAL_ENV|GPUS_PER_NODE|MASTER_|NCCL_|GLOO_|TORCH|OMP_|RAYON|TRITON|DS_LOWRANK)' | sort
  printf '%q ' "${step[@]}"
  echo
  exit 0
fi

told= running=
pass_on() {
  told=yes
  echo "job $number: told to stop before the time limit: the ranks write a checkpoint" >&2
  if [ -n "$running" ]; then
    kill -USR1 "$running" 2>/dev/null || true  # srun sends it to all processes of the step
  fi
}
rm -f "$DS_LOWRANK_PREEMPTED_FILE"
trap pass_on USR1
"${step[@]}" &
running=$!
code=0
wait "$running" || code=$?
while kill -0 "$running" 2>/dev/null; do  # a signal ends a wait, not the step
  code=0
  wait "$running" || code=$?
done

# A field of the job, by its number, not SLURM_JOB_ID: of one task of an array that is the whole array's.
field() {
  scontrol show job --oneliner "$number" | grep -o " $1=[^ ]*" | cut -d= -f2
}
queue_again() {
  # One that its owner cancels is cancelled, checkpoint or not.
  if [ "$(field JobState)" = RUNNING ]; then
    echo "job $number: preempted $1, queued again" >&2
    scontrol requeue "$number"
    sleep 60  # until slurm ends this script
  fi
}
if [ -f "$DS_LOWRANK_PREEMPTED_FILE" ]; then
  rm -f "$DS_LOWRANK_PREEMPTED_FILE"
  queue_again "with a checkpoint"
elif [ "$code" != 0 ] && [[ "$(field PreemptTime)" == 2* ]]; then
  # slurm queues again what it preempts, but not a script that has failed until then. DeepSpeed's launcher ends with 1
  # after SIGTERM, also behind the last step, when all is written.
  queue_again "without a new checkpoint"
elif [ -n "$told" ] && [ "$code" != 0 ]; then
  echo "job $number: the time limit came before a checkpoint could be written: give it more --time" >&2
fi
exit "$code"
