# The environment of a multi-node job: the one place to fit to your cluster. Sourced by the batch scripts on the first
# node, where slurm's variables are set; srun carries what is exported here to every node (--export=ALL, also where the
# job itself was submitted without the environment).

# ---- Python ----
# The environment that holds ds_lowrank, on a file system that all nodes see; that of `make` unless VENV names another.
if [ -f "${VENV:-.venv}/bin/activate" ]; then
  . "${VENV:-.venv}/bin/activate"
fi
export PYTHONUNBUFFERED=1  # lines reach the log when they are printed, not when a buffer is full

# ---- who and where ----
export GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
# Ranks meet at the first node, at the address by which slurm itself reaches it: names need not resolve.
if [ -z "${MASTER_ADDR:-}" ]; then
  read -r HEAD_NODE <<<"$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  MASTER_ADDR="$(scontrol show node --oneliner "$HEAD_NODE" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)" || true
  if [ -z "$MASTER_ADDR" ]; then
    echo "error: scontrol does not tell the address of $HEAD_NODE: set MASTER_ADDR" >&2
    exit 2
  fi
fi
export MASTER_ADDR
# Two jobs may share a node: each has a port of its own.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# ---- network ----
# NCCL and gloo pick an interface themselves; name it where they pick the wrong one (a bridge, a slow management network):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that nobody joins raises an error after --ddp_timeout (seconds, 1800 unless given), with its name; without
# this a rank would wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# ---- processors ----
# Threads of a rank: its share of the node's processors, otherwise every rank would start one for each of them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( (${SLURM_CPUS_ON_NODE:-1} + GPUS_PER_NODE - 1) / GPUS_PER_NODE ))}"
# Tokenizers take as many; where data loader processes are forked, they turn that off by themselves.
export RAYON_NUM_THREADS="${RAYON_NUM_THREADS:-$OMP_NUM_THREADS}"

# ---- caches ----
# Compiled kernels lie on each node's own disk: locks on a network file system make starts hang. Downloads and tokenized
# text (HF_HOME, XDG_CACHE_HOME) stay where all nodes see them.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/${USER:-$(id -un)}-triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-/tmp/${USER:-$(id -un)}-torch-extensions}"

# ---- preemption ----
# slurm signals every process of a step, ranks included. torchrun answers SIGTERM by killing the ranks 30 seconds later,
# which may be in the middle of their checkpoint: it is to leave the signal to them (node.sh has it ignored; torch < 2.9
# does not know the variable and keeps to its 30 seconds, and so does DeepSpeed's launcher).
export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGINT}"
