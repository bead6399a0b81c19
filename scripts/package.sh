#!/usr/bin/env bash
# Builds wheel and sdist into dist/, installs each in a clean environment outside of the repository and runs it there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
quiet=(--quiet --disable-pip-version-check)
python3 -m venv "$scratch/build"
"$scratch/build/bin/python" -m pip install "${quiet[@]}" build
rm -rf "$root/dist"
"$scratch/build/bin/python" -m build --outdir "$root/dist" "$root" >"$scratch/build.log" || {
  tail -n 30 "$scratch/build.log"
  exit 1
}
for package in "$root"/dist/*.whl "$root"/dist/*.tar.gz; do
  rm -rf "$scratch/clean"
  python3 -m venv "$scratch/clean"
  "$scratch/clean/bin/python" -m pip install "${quiet[@]}" --constraint "$root/constraints.txt" torch
  "$scratch/clean/bin/python" -m pip install "${quiet[@]}" --constraint "$root/constraints.txt" "$package"
  cd "$scratch"
  "$scratch/clean/bin/ds-lowrank" --help >"$scratch/help.txt"
  grep -q "plan" "$scratch/help.txt"
  "$scratch/clean/bin/python" - <<'PYTHON'
from pathlib import Path

import torch

import ds_lowrank

folder = Path(ds_lowrank.__file__).parent
assert (folder / "py.typed").is_file(), "no py.typed"
assert "site-packages" in str(folder), folder
model = torch.nn.Linear(64, 48)
optimizer = ds_lowrank.build_optimizer(model, {"rank": 8}, lr=0.01)
before = model.weight.clone()
model(torch.randn(4, 64)).square().sum().backward()
optimizer.step()
assert torch.linalg.matrix_rank(model.weight - before) <= 9
print("ds_lowrank", ds_lowrank.__version__, "steps")
PYTHON
  echo "$(basename "$package"): installed, and works"
done
