#!/usr/bin/env bash
# Runs the rank tests against other versions, each in an environment of its own, and writes docs/compatibility.md.
#
#   scripts/compat.sh                   every row of the matrix
#   scripts/compat.sh ds-0.17 tf-4.57   some of them; the others' results are kept
#   TESTS="tests/ranks/test_zero.py" scripts/compat.sh ds-0.17
#
# Environments and results lie in build/compat/, an environment is removed when its tests are done.
set -uo pipefail
cd "$(dirname "$0")/.."

# name, torch, deepspeed, transformers; a row differs from the tested set (constraints.txt) in what its name says.
MATRIX="
ds-0.16    2.13.0  0.16.9   5.23.0
ds-0.17    2.13.0  0.17.6   5.23.0
ds-0.18    2.13.0  0.18.9   5.23.0
tf-4.51    2.13.0  0.19.8   4.51.3
tf-4.57    2.13.0  0.19.8   4.57.6
tf-5.0     2.13.0  0.19.8   5.0.0
torch-2.6  2.6.0   0.19.8   4.57.6
oldest     2.6.0   0.16.9   4.51.3
newest     new     new      new
"
TESTS="${TESTS:-tests/ranks tests/unit/test_transformers.py tests/unit/test_checkpoint_callback.py tests/integration/test_pretrain.py}"
results=build/compat
mkdir -p "$results"

version() { "$1" -m pip list --format=freeze 2>/dev/null | grep -i "^$2==" | cut -d= -f3; }

run_row() {
  local name=$1 torch=$2 deepspeed=$3 transformers=$4 venv="$results/$1" log="$results/$1.log"
  local python="$venv/bin/python" pinned="" outcome
  rm -rf "$venv"
  python3 -m venv "$venv"
  # Of what the row does not name only the test tools are pinned: pip finds the rest that fits.
  grep -E '^(pytest|pytest-timeout|numpy)==' constraints.txt >"$results/$name.txt"
  [ "$torch" = new ] || pinned="torch==$torch deepspeed==$deepspeed transformers==$transformers"
  echo "== $name: ${pinned:-the newest that install}"
  # torch first and alone: deepspeed's build asks for it.
  if ! { "$python" -m pip install --quiet --constraint "$results/$name.txt" torch${pinned:+==$torch} setuptools wheel \
    && "$python" -m pip install --quiet --constraint "$results/$name.txt" --editable ".[test]" $pinned; } >"$log" 2>&1; then
    outcome="not installed: $(grep -E 'ERROR|rror:' "$log" | head -n 1 | cut -c1-160)"
  else
    PATH="$PWD/$venv/bin:$PATH" "$python" -m pytest $TESTS -q -p no:cacheprovider >>"$log" 2>&1
    outcome="$(grep -E '^[=]* ?[0-9]+ (passed|failed)|[0-9]+ error' "$log" | tail -n 1 | tr -d '=' | sed 's/, [0-9]* warnings\?//; s/^ *//; s/ *$//')"
    grep -E '^(FAILED|ERROR) ' "$log" | cut -d' ' -f2 | cut -d'[' -f1 | sort | uniq -c >"$results/$name.failed"
  fi
  {
    echo -n "| $name | $("$python" -c 'import platform; print(platform.python_version())')"
    for package in torch deepspeed transformers accelerate; do echo -n " | $(version "$python" $package)"; done
    echo " | ${outcome:-no result} | $(date +%F) |"
  } >"$results/$name.row"
  cat "$results/$name.row"
  rm -rf "$venv"
}

while read -r name torch deepspeed transformers; do
  [ -n "$name" ] || continue
  if [ $# -eq 0 ] || [[ " $* " == *" $name "* ]]; then run_row "$name" "$torch" "$deepspeed" "$transformers"; fi
done <<<"$MATRIX"

{
  echo "# Versions"
  echo
  echo "\`scripts/compat.sh\`, each row in an environment of its own, on $(nproc) CPU cores. It runs"
  echo "\`pytest $TESTS\`; what fails is listed below the table."
  echo
  echo "| row | python | torch | deepspeed | transformers | accelerate | outcome | date |"
  echo "|---|---|---|---|---|---|---|---|"
  while read -r name _; do
    if [ -n "$name" ] && [ -f "$results/$name.row" ]; then cat "$results/$name.row"; fi
  done <<<"$MATRIX"
  while read -r name _; do
    if [ -n "$name" ] && [ -s "$results/$name.failed" ]; then
      echo
      echo "$name:"
      echo
      sed 's/^ *\([0-9]*\) \(.*\)$/- \2 (\1)/' "$results/$name.failed"
    fi
  done <<<"$MATRIX"
} >docs/compatibility.md
