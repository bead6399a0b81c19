#!/usr/bin/env bash
# Installs slurm and munge for the tests in this folder, where that can be done (root, Debian or Ubuntu); they are
# skipped with a reason elsewhere. Starts nothing.
set -uo pipefail
if command -v sbatch >/dev/null && { command -v munged || [ -x /usr/sbin/munged ]; } >/dev/null; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "slurm is not installed: this takes root and apt-get" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge iproute2; } >"$log" 2>&1; then
  echo "slurm could not be installed: $(tail -n 1 "$log")" >&2
fi
rm -f "$log"
