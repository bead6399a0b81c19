#!/usr/bin/env bash
# Runs the rank tests against other versions, each in an environment of its own, and writes docs/compatibility.md.
#
#   scripts/compat.sh                   every row of the matrix
#   scripts/compat.sh ds-0.17 tf-4.57   some of them; the others' results are kept
#   TESTS="tests/ranks/test_zero.py" scripts/compat.sh ds-0.17   some of the tests; leaves the page as it is
#   INSTALL=only scripts/compat.sh      make the environments and test nothing
#
# Environments and results lie in build/compat/. One that is complete, for the same versions and dependencies, is not made
# again, and it is removed when its tests are done, unless KEEP is set.
set -uo pipefail
cd "$(dirname "$0")/.."

# name, torch, deepspeed, transformers; a row differs from the tested set (constraints.txt) in what its name says.
# DeepSpeed 0.17.5: 0.17.6 to 0.18.2 drop gradients in stage 2, and are refused there. 0.18.6: 0.18.7 to 0.18.9 do not
# step in stages 1 and 2 on gloo, with torch's AdamW neither.
MATRIX="
ds-0.16    2.13.0  0.16.9   5.23.0
ds-0.17    2.13.0  0.17.5   5.23.0
ds-0.18    2.9.1   0.18.6   5.23.0
tf-4.51    2.13.0  0.19.8   4.51.3
tf-4.57    2.13.0  0.19.8   4.57.6
tf-5.0     2.13.0  0.19.8   5.0.0
torch-2.6  2.6.0   0.19.8   4.57.6
oldest     2.6.0   0.16.9   4.51.3
newest     new     new      new
"
# Every layout against the reference, freely and at real sizes, and what touches torch's, DeepSpeed's and transformers' own.
# The other rank tests are of arithmetic that does not know the frameworks, and CI's affair.
every="
tests/ranks/test_framework_pieces.py
tests/ranks/test_layouts.py::test_a_free_running_trajectory_is_the_same_everywhere
tests/ranks/test_layouts.py::test_llama_sized_matrices
tests/ranks/test_resume.py::test_other_ranks_and_layouts_go_on_with_the_same_state
tests/ranks/test_zero.py
tests/ranks/test_fsdp.py
tests/ranks/test_checkpoints.py
tests/ranks/test_layerwise.py
tests/unit/test_transformers.py
tests/unit/test_checkpoint_callback.py
tests/integration/test_pretrain.py
"
results=build/compat
mkdir -p "$results"

version() { "$1" -m pip list --format=freeze 2>/dev/null | grep -i "^$2==" | cut -d= -f3; }

make_environment() {  # with run_row's variables
  local pinned=""
  rm -rf "$venv"
  python3 -m venv "$venv"
  # Of what the row does not name only the test tools are pinned: pip finds the rest that fits.
  grep -E '^(pytest|pytest-timeout|numpy)==' constraints.txt >"$results/$name.txt"
  [ "$torch" = new ] || pinned="torch==$torch deepspeed==$deepspeed transformers==$transformers"
  # torch first and alone: deepspeed's build asks for it.
  "$python" -m pip install --quiet --constraint "$results/$name.txt" torch${pinned:+==$torch} setuptools wheel >"$log" 2>&1 \
    && "$python" -m pip install --quiet --constraint "$results/$name.txt" --editable ".[test]" $pinned >>"$log" 2>&1 \
    && echo "$wanted" >"$venv/complete"
}

run_row() {
  local name=$1 torch=$2 deepspeed=$3 transformers=$4 venv="$results/$1" log="$results/$1.log" tests="$results/$1.tests.log"
  local python="$venv/bin/python" outcome="" commit changed wanted
  # Before the tests: what is committed while they run, they have not tested.
  commit="$(git describe --always --exclude '*')"
  changed="$(git status --porcelain --untracked-files=no -- . ':!docs/compatibility.md')"  # this script writes that
  wanted="$torch $deepspeed $transformers $(cat pyproject.toml constraints.txt | sha256sum)"
  echo "== $name: torch $torch, deepspeed $deepspeed, transformers $transformers"
  if [ "$(cat "$venv/complete" 2>/dev/null)" != "$wanted" ]; then
    make_environment
    [ -f "$venv/complete" ] || outcome="not installed: $(grep -E 'ERROR|rror:' "$log" | head -n 1 | cut -c1-160)"
  fi
  if [ "${INSTALL:-}" = only ]; then
    echo "${outcome:-installed}"
    return
  fi
  [ -n "${TESTS:-}" ] || rm -f "$results/$name.failed"
  if [ -z "$outcome" ]; then
    PATH="$PWD/$venv/bin:$PATH" "$python" -m pytest ${TESTS:-$every} -m "slow or not slow" -p no:cacheprovider \
      --durations=25 >"$tests" 2>&1
    outcome="$(grep -E '^[=]* ?[0-9]+ (passed|failed)|[0-9]+ error' "$tests" | tail -n 1 | tr -d '=' \
      | sed 's/, [0-9]* warnings\?//; s/ in [0-9.]*s.*//; s/^ *//; s/ *$//')"
    # A part of the tests says nothing of a row.
    [ -n "${TESTS:-}" ] \
      || grep -E '^(FAILED|ERROR) tests/' "$tests" | cut -d' ' -f2 | cut -d'[' -f1 | sort | uniq -c >"$results/$name.failed"
  fi
  local row="$results/$name.row"
  [ -z "${TESTS:-}" ] || row="$results/$name.part"
  {
    echo -n "| $name | $("$python" -c 'import platform; print(platform.python_version())')"
    for package in torch deepspeed transformers accelerate; do echo -n " | $(version "$python" $package)"; done
    echo " | ${outcome:-no result} | $(date +%F), $commit${changed:+-dirty} |"
  } >"$row.new"
  mv "$row.new" "$row"  # in one piece: a row that is there is a whole one
  cat "$row"
  [ -n "${KEEP:-}" ] || rm -rf "$venv"
}

while read -r name torch deepspeed transformers; do
  [ -n "$name" ] || continue
  if [ $# -eq 0 ] || [[ " $* " == *" $name "* ]]; then run_row "$name" "$torch" "$deepspeed" "$transformers" </dev/null; fi
done <<<"$MATRIX"

# The page is of the whole list of tests alone.
if [ -n "${TESTS:-}" ] || [ "${INSTALL:-}" = only ]; then exit; fi
{
  echo "# Versions"
  echo
  echo "\`scripts/compat.sh\` makes an environment for each row, on CPU cores, and runs there"
  echo
  for file in $every; do echo "- \`$file\`"; done
  echo
  cat <<'TEXT'
They are those that touch the frameworks most: the update on every layout against the one-process reference, checkpoints
that other layouts go on with, steps in the backward pass, the Trainer's argument, and runs of `launch/pretrain.py`. What
fails is listed below the table. What a row does not name is the newest that fits it.

- FSDP2 of torch 2.6 does not run on a CPU: its tests are skipped there.
- DeepSpeed 0.17.6 and 0.18.0 to 0.18.2 drop, in stage 2 without offload, the gradients of all micro-batches of a step but
  the last ([its issue 7718](https://github.com/deepspeedai/DeepSpeed/issues/7718)), for every optimizer: they are excluded
  in `pyproject.toml` and refused in stage 2.
- DeepSpeed 0.18.7 to 0.18.9 do not step in stages 1 and 2 on CPU ranks, with torch's AdamW neither (an all-gather into
  views that autograd refuses). 0.17 and 0.18 do not shard the states of BF16_Optimizer, which is refused there.
TEXT
  echo
  echo "| row | python | torch | deepspeed | transformers | accelerate | outcome | date, commit |"
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
