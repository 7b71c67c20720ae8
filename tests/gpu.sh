#!/usr/bin/env bash
# Everything that needs a card, in one command: builds, runs tests on the card and beside its emulation, measures, and writes
# gpu-report.md.  Where there is no card it says so and succeeds.  A part that fails does not stop the others; the exit status is 1 if
# any did.
#
# usage: tests/gpu.sh [PART...]      parts: build tests sanitizer shim models bench; none: all
#
#   RS_GPU_BUILD   the build folder (build-gpu).  Given, and built with RS_CUDA and RS_TESTS, the part `build` may be left out.
#   RS_GPU_REPORT  the report (gpu-report.md)
#   RS_TEST_MODELS weight files, as the tests have them (test-models in the build folder); made where they are not there
#   RS_GPU_LIMIT   seconds that a program may take (900)
#   RS_GPU_FAKE    a library to use in place of librs-cuda.so, with no card: librs_cuda_host.so, by which this script is tested.
#                  What runs is then a small part of it all.
# shellcheck disable=SC2317 # part() calls the functions
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

fake=${RS_GPU_FAKE:-}
if [ -z "$fake" ]; then
  if ! command -v nvidia-smi >/dev/null 2>&1; then
    echo "skipped: no nvidia-smi, so no card"
    exit 0
  fi
  if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo "skipped: nvidia-smi finds no card"
    exit 0
  fi
fi

build=${RS_GPU_BUILD:-build-gpu}
report=${RS_GPU_REPORT:-gpu-report.md}
mkdir -p "$build" || exit 2
build=$(cd "$build" && pwd)
models=${RS_TEST_MODELS:-$build/test-models}
jobs=$(nproc 2>/dev/null || echo 2)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
card_library=${fake:-$build/librs-cuda.so}
host_library=$build/tests/librs_cuda_host.so

wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=(build tests sanitizer shim models bench)
wants() {
  local one
  for one in "${wanted[@]}"; do [ "$one" = "$1" ] && return 0; done
  return 1
}

rows=()
failed=0
# part NAME COMMAND...: runs it and notes how it went.  77: it could not run, and its last line says why.
part() {
  local name=$1 begin end status verdict note=""
  shift
  echo "=== $name"
  begin=$(date +%s)
  "$@" >"$work/log" 2>&1
  status=$?
  end=$(date +%s)
  tail -n 400 "$work/log"
  case $status in
    0) verdict=passed ;;
    77) verdict=skipped note=$(tail -n 1 "$work/log") ;;
    *)
      verdict=FAILED
      failed=1
      note="status $status: $(grep -m 1 -E 'FAILED|Failure|rror' "$work/log" | tr '|' '/' | cut -c 1-120)"
      { echo; echo "### $name"; echo '```'; tail -n 60 "$work/log"; echo '```'; } >>"$work/failures"
      ;;
  esac
  rows+=("| $name | $verdict | $((end - begin)) | $note |")
  echo "=== $name: $verdict"
}
limit() { timeout -k 10 "${RS_GPU_LIMIT:-900}" "$@"; }
missing() { # WHAT
  echo "skipped: $1"
  return 77
}

# ---------------------------------------------------------------- parts

do_build() {
  cmake -S . -B "$build" -DRS_CUDA=ON -DRS_TESTS=ON -DRS_MODEL_CACHE="$PWD/build/models" && cmake --build "$build" -j "$jobs"
}

make_models() {
  [ -e "$models/minilm-q8.rsw" ] && return 0
  RS_TEST_MODEL_DIR=${RS_TEST_MODEL_DIR:-$PWD/build/models/all-MiniLM-L6-v2} RS_TEST_MODELS=$models RS_PROGRAM=$build/rs \
    python3 tests/make_models.py
}

# A program of tests, with sessions on the card where a test names no device.
on_card() { # PROGRAM FILTER [VARIABLE=VALUE...]
  local program=$1 filter=$2
  shift 2
  [ -x "$build/tests/$program" ] || { missing "no $build/tests/$program"; return; }
  # test_cuda* take the library that RS_CUDA_HOST_LIBRARY names, all others that of RS_CUDA_LIBRARY.
  env RS_SOURCE_DIR="$PWD" RS_BUILD_DIR="$build" RS_PROGRAM="$build/rs" RS_TEST_MODELS="$models" \
    RS_CUDA_LIBRARY="$card_library" RS_CUDA_HOST_LIBRARY="$card_library" "$@" \
    timeout -k 10 "${RS_GPU_LIMIT:-900}" "$build/tests/$program" --gtest_brief=1 --gtest_filter="$filter"
}

# Of each sanitizer: a model's texts, then every operator.  --error-exitcode: they exit with the program's status else.
sanitize() { # TOOL
  command -v compute-sanitizer >/dev/null 2>&1 || { missing "no compute-sanitizer"; return; }
  local check=(compute-sanitizer --tool "$1" --error-exitcode 9)
  if [ -e "$models/minilm-q8.rsw" ]; then
    RS_CUDA_LIBRARY=$card_library limit "${check[@]}" "$build/rs" embed -m "$models/minilm-q8.rsw" --device cuda "a text" "and another one" \
      >/dev/null || return
  fi
  RS_SOURCE_DIR=$PWD RS_CUDA_HOST_LIBRARY=$card_library limit "${check[@]}" "$build/tests/test_cuda" --gtest_brief=1 \
    --gtest_filter=graph_on_a_card.agrees_with_the_cpu
}

compare_with_shim() {
  local program=$build/tests/cuda_results
  if ! [ -x "$program" ] || ! [ -e "$host_library" ]; then missing "no $program or no $host_library"; return; fi
  RS_CUDA_LIBRARY=$card_library limit "$program" write "$work/card" &&
    RS_CUDA_LIBRARY=$host_library RS_CUDA_HOST=check=0 limit "$program" write "$work/shim" && "$program" compare "$work/card" "$work/shim"
}

bench() { # NAME
  [ -e "$models/$1.rsw" ] || { missing "no $models/$1.rsw"; return; }
  RS_CUDA_LIBRARY=$card_library limit "$build/rs" bench -m "$models/$1.rsw" --device cuda --json | tee "$work/bench-$1.json"
}

# ---------------------------------------------------------------- all of them

describe_card() {
  if [ -n "$fake" ]; then
    echo "none: $(basename "$fake")"
  else
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv,noheader
  fi
}
version_of() { # PROGRAM
  command -v "$1" >/dev/null 2>&1 && "$1" --version 2>/dev/null | grep -m 1 -iE 'release|version|[0-9]+\.[0-9]+'
}
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)

echo "card: $(describe_card)"
if wants build && [ -z "$fake" ]; then part "build" do_build; fi

if wants tests; then
  if [ -n "$fake" ]; then
    part "test_cuda" on_card test_cuda "graph_on_a_card.a*:graph_on_a_card.e*"
    part "test_graph" on_card test_graph "add.*:gate.*:embed.*:pool.*" RS_DEVICE=cuda RS_CUDA_HOST=check=0
  else
    # What these say of devices is of the emulated one, and what they count is launches that are faults there.
    part "test_cuda" on_card test_cuda "graph_on_a_card.*:images_on_a_card.*"
    # What else can be asked of a card.  Its attention is of f16 and its products of floats have parts of bf16, so that tests which
    # want 1e-5 of it are left out: test_cuda_linear, test_cuda_attention and test_cuda_models have tolerances for that.  What is of
    # rows of the CPU's kernels (session.*) is run by ctest, without a card.
    part "test_graph" on_card test_graph "-linear.floats_match_f64:flash_attn.*:session.*" RS_DEVICE=cuda
    part "test_drop" on_card test_drop \
      "-attn_colsum.matches_f64:token_sizes.count_in_attention_and_in_means:drop_tiny.every_score_and_mode_matches_f64" \
      RS_DEVICE=cuda
    part "test_heads" on_card test_heads "-heads.logits_match_bert_as_it_is_written_down" RS_DEVICE=cuda
    part "test_vision" on_card test_vision \
      "-vision.every_family_gives_what_its_reference_does:vision.quantized_families_stay_near:vision.texts_of_clip*" \
      RS_DEVICE=cuda
  fi
fi
if wants sanitizer && [ -z "$fake" ]; then
  for tool in memcheck racecheck initcheck synccheck; do part "compute-sanitizer $tool" sanitize "$tool"; done
fi
if wants shim; then part "the same graphs as on the CPU" compare_with_shim; fi
if [ -z "$fake" ] && { wants models || wants bench; }; then
  part "weight files" make_models
  if wants models; then
    for one in minilm_of_floats_agrees_with_the_cpu minilm_of_few_bits_is_as_near_to_f32_as_on_the_cpu dinov2_agrees_with_the_cpu \
      profile_has_every_operator; do
      part "models: $one" on_card test_cuda_models "model_on_a_card.$one"
    done
  fi
  if wants bench; then for one in minilm-f32 minilm-q8 minilm-q4 dinov2-q8; do part "bench $one" bench "$one"; done; fi
fi

# ---------------------------------------------------------------- the report

{
  echo "# rs on a card"
  echo
  echo "| | |"
  echo "|---|---|"
  echo "| card, driver, compute capability, memory, clock | $(describe_card) |"
  echo "| rs | $("$build/rs" --version 2>/dev/null | head -n 1), $(git rev-parse --short HEAD 2>/dev/null || echo "no git") |"
  echo "| nvcc | $(version_of "$nvcc") |"
  echo "| compute-sanitizer | $(version_of compute-sanitizer) |"
  echo "| compiler | $(version_of c++) |"
  echo "| when | $(date -u +%Y-%m-%dT%H:%MZ) |"
  echo
  echo "| part | result | seconds | |"
  echo "|---|---|---|---|"
  printf '%s\n' "${rows[@]}"
  for file in "$work"/bench-*.json; do
    [ -s "$file" ] || continue
    echo
    echo "## $(basename "$file" .json)"
    echo '```'
    cat "$file"
    echo '```'
  done
  if [ -e "$work/failures" ]; then
    echo
    echo "## What failed"
    cat "$work/failures"
  fi
} >"$report"
echo "the report is in $report"
exit "$failed"
