#!/usr/bin/env bash
# Everything that needs a card, in one command: builds, runs tests on the card and beside its emulation, measures, and writes
# gpu-report.md.  Where there is no card it says so and succeeds.  A part that fails does not stop the others; the exit status is 1 if
# any did.
#
# usage: tests/gpu.sh [PART...]              parts: build tests sanitizer shim models bench peers; none: all
#        tests/gpu.sh --pack DIR             build here, without a card, and put all that the parts want into DIR
#        tests/gpu.sh --use DIR [PART...]    run with what such a DIR has, in a checkout of the same commit; nothing is built
#
# A machine with a card often has no GoogleTest, no headers and no models.  DIR is for it: the program, both libraries, tests, the
# libraries that they want beside glibc's, and models with weights of 5 bits (tests/gpu_models.py).  It may be put anywhere.
#
#   RS_GPU_BUILD    the build folder (build-gpu); JOBS: that build at a time (all CPUs)
#   RS_GPU_MODELS   the models to pack: folders as the hub has them (build/models; all-MiniLM-L6-v2 and dinov2-small are looked for)
#   RS_GPU_ARCHITECTURES  of the cards to pack for (90a-real: H100, H200)
#   RS_GPU_REPORT   the report (gpu-report.md)
#   RS_GPU_SECONDS  that all parts may take (285; building is not counted).  Each has a limit of its own besides
#   RS_GPU_FAKE     a library to use in place of librs-cuda.so, with no card: librs_cuda_host.so, by which this script is tested.
#                   What runs is then a small part of it all, but for
#   RS_GPU_FULL     1: all of it
# shellcheck disable=SC2317 # part() calls the functions
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

fake=${RS_GPU_FAKE:-}
small=$fake
[ "${RS_GPU_FULL:-}" != 1 ] || small=
mode=here
folder=
case ${1:-} in
  --pack | --use)
    mode=${1#--} folder=${2:-}
    if [ -z "$folder" ] || [ "$mode$#" = pack3 ]; then
      echo "usage: $0 [PART...] | --pack DIR | --use DIR [PART...]" >&2
      exit 2
    fi
    shift 2
    ;;
esac

if [ -z "$fake" ] && [ "$mode" != pack ]; then
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
if [ "$mode" = use ]; then
  build=$folder
  [ -d "$build" ] || { echo "$0: no folder $build" >&2; exit 2; }
  chmod +x "$build"/rs "$build"/tests/* # not all that carries files keeps that
fi
mkdir -p "$build" || exit 2
build=$(cd "$build" && pwd)
report=${RS_GPU_REPORT:-gpu-report.md}
models=$build/test-models
sources=${RS_GPU_MODELS:-$PWD/build/models} # of the models: as the hub has them
shared=${RS_SHARED:-$PWD/../shared}
if [ "$mode" = use ]; then
  sources=$build/models
  shared=/nowhere # its answers are those of the weights as published, and it makes more models
fi
jobs=${JOBS:-$(nproc 2>/dev/null || echo 2)}
card_library=${fake:-$build/librs-cuda.so}
host_library=$build/tests/librs_cuda_host.so
programs=(test_cuda test_graph test_drop test_heads test_vision test_cuda_models cuda_results)
tool() { # NAME: where a tool of CUDA is
  command -v "$1" || { [ -x "/usr/local/cuda/bin/$1" ] && echo "/usr/local/cuda/bin/$1"; }
}

# ---------------------------------------------------------------- building and packing

do_build() { # [OPTION...]
  cmake -S . -B "$build" -DRS_CUDA=ON -DRS_TESTS=ON -DRS_MODEL_CACHE="$sources" "$@" &&
    cmake --build "$build" -j "$jobs" --target rs_program rs_shared rs_cuda rs_cuda_host "${programs[@]}"
}

commit() { git rev-parse --short HEAD 2>/dev/null || echo "no git"; }

# Libraries that a file wants: name and path.  glibc is everywhere, and cannot be carried.
wanted_by() { # FILE
  ldd "$1" | awk '$2 == "=>" && $1 !~ /^lib(c|m|dl|rt|pthread)\.so/ { print $1, $3 }'
}

pack() { # DIR
  if [ -e "$1" ] && ! [ -e "$1/commit" ]; then
    echo "$0: $1 is there, and not of --pack" >&2
    return 1
  fi
  # What a program wants, it finds beside itself or above: wherever that is.
  local options=(-DCMAKE_CUDA_ARCHITECTURES="${RS_GPU_ARCHITECTURES:-90a-real}" -DCMAKE_BUILD_RPATH="\$ORIGIN;\$ORIGIN/.."
    -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON)
  [ -n "$fake" ] || do_build "${options[@]}" >"$build.log" 2>&1 || { tail -n 40 "$build.log" >&2; return 1; }
  rm -rf "$1" && mkdir -p "$1/tests" "$1/models" || return
  local to i name path
  to=$(cd "$1" && pwd)
  local from=("$build/rs" "$build/librs.so.0" "$card_library" "$host_library" "${programs[@]/#/$build/tests/}")
  local copies=("$to/rs" "$to/librs.so.0" "$to/librs-cuda.so" "$to/tests/librs_cuda_host.so" "${programs[@]/#/$to/tests/}")
  for i in "${!from[@]}"; do
    cp "${from[i]}" "${copies[i]}" && strip "${copies[i]}" || return
    while read -r name path; do
      [ "$name" = librs.so.0 ] || [ -e "$to/$name" ] || cp "$path" "$to/$name" || return
    done < <(wanted_by "${from[i]}")
  done
  cp "$to/librs.so.0" "$to/librs.so" || return # not a link, which might not arrive
  [ -n "$fake" ] || for i in "${copies[@]}"; do
    while read -r name path; do
      case $(realpath "$path") in
        "$to"/*) ;;
        *) echo "$0: $i takes $name from $path" >&2; return 1 ;;
      esac
    done < <(wanted_by "$i")
  done
  for name in all-MiniLM-L6-v2 dinov2-small; do
    if [ -e "$sources/$name/model.safetensors" ]; then
      python3 tests/gpu_models.py round "$sources/$name" "$to/models/$name" || return
    else
      echo "no $sources/$name: what wants it will not run"
    fi
  done
  commit >"$to/commit"
  du -sm "$to" | awk '{ printf "%s MiB in %s\n", $1, $2 }'
}
if [ "$mode" = pack ]; then
  pack "$folder"
  exit
fi

# ---------------------------------------------------------------- running parts

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
known=(build tests sanitizer shim models bench peers)
wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=("${known[@]}")
for one in "${wanted[@]}"; do
  case " ${known[*]} " in *" $one "*) ;; *) echo "$0: no part $one: ${known[*]}" >&2; exit 2 ;; esac
done
wants() {
  local one
  for one in "${wanted[@]}"; do [ "$one" = "$1" ] && return 0; done
  return 1
}

rows=()
failed=0
part_end=0 # when the part that runs must be done
run_end=0  # when all must
# part NAME SECONDS COMMAND...: runs it and notes how it went.  77: it could not run, and its last line says why.
part() {
  local name=$1 seconds=$2 begin end status verdict note=""
  shift 2
  echo "=== $name"
  begin=$(date +%s)
  part_end=$((begin + seconds))
  [ "$run_end" = 0 ] || [ "$part_end" -le "$run_end" ] || part_end=$run_end
  if [ "$part_end" -le "$begin" ]; then
    rows+=("| $name | not run | 0 | no time was left |")
    failed=1
    return
  fi
  "$@" >"$work/log" 2>&1
  status=$?
  end=$(date +%s)
  tail -n 400 "$work/log"
  case $status in
    0) verdict=passed note=$(sed -n 's/^tests: //p' "$work/log" | tail -n 1) ;;
    77) verdict=skipped note=$(tail -n 1 "$work/log") ;;
    *)
      verdict=FAILED
      failed=1
      if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        note="its time was over"
      else
        note="status $status: $(grep -m 1 -E 'FAILED|Failure|rror' "$work/log" | tr '|' '/' | cut -c 1-120)"
      fi
      { echo; echo "### $name"; echo '```'; tail -n 60 "$work/log"; echo '```'; } >>"$work/failures"
      ;;
  esac
  rows+=("| $name | $verdict | $((end - begin)) | $note |")
  echo "=== $name: $verdict"
}
limit() { # COMMAND...: for as long as the part may take
  local left=$((part_end - $(date +%s)))
  [ "$left" -gt 0 ] || return 124
  timeout -k 5 "$left" "$@"
}
missing() { # WHAT
  echo "skipped: $1"
  return 77
}
# A program of GoogleTest, for as long as the part may take.  To GoogleTest it is a success where every test skipped itself, and where
# none has the name that is asked for.
counted() { # COMMAND...
  local status ran skipped
  limit "$@" >"$work/tests" 2>&1
  status=$?
  cat "$work/tests"
  [ "$status" = 0 ] || return "$status"
  ran=$(sed -n 's/^\[=*\] \([0-9][0-9]*\) tests\{0,1\} from .* ran\..*/\1/p' "$work/tests" | tail -n 1)
  skipped=$(sed -n 's/^\[  SKIPPED \] \([0-9][0-9]*\) test.*/\1/p' "$work/tests" | tail -n 1)
  if [ "${ran:-0}" = 0 ]; then
    echo "Failure: no test ran"
    return 1
  elif [ "${skipped:-0}" = "$ran" ]; then
    missing "$(grep -m 1 -A 1 ': Skipped$' "$work/tests" | tail -n 1)"
    return
  fi
  echo "tests: $ran${skipped:+, of which $skipped skipped}"
}

# ---------------------------------------------------------------- parts

make_models() {
  local one
  for one in "$sources"/*/weights.rounded; do
    [ ! -e "$one" ] || [ -e "${one%/*}/model.safetensors" ] || python3 tests/gpu_models.py restore "${one%/*}" || return
  done
  if [ "$mode" = use ] && ! [ -e "$sources/all-MiniLM-L6-v2/model.safetensors" ]; then missing "no $sources/all-MiniLM-L6-v2"; return; fi
  RS_SHARED=$shared RS_TEST_MODEL_DIR=$sources/all-MiniLM-L6-v2 RS_TEST_MODELS=$models RS_PROGRAM=$build/rs \
    limit python3 tests/make_models.py
}

# A program of tests, with sessions on the card where a test names no device.
on_card() { # PROGRAM FILTER [VARIABLE=VALUE...]
  local program=$1 filter=$2
  shift 2
  [ -x "$build/tests/$program" ] || { missing "no $build/tests/$program"; return; }
  # test_cuda* take the library that RS_CUDA_HOST_LIBRARY names, all others that of RS_CUDA_LIBRARY.
  counted env RS_SOURCE_DIR="$PWD" RS_BUILD_DIR="$build" RS_PROGRAM="$build/rs" RS_TEST_MODELS="$models" RS_SHARED="$shared" \
    RS_CUDA_LIBRARY="$card_library" RS_CUDA_HOST_LIBRARY="$card_library" "$@" \
    "$build/tests/$program" --gtest_brief=1 --gtest_filter="$filter"
}

# Of each sanitizer: every operator, fused as they are, and pixels of images; then a model's texts.  --error-exitcode: they exit with
# the program's status else.
sanitize() { # TOOL
  local sanitizer
  sanitizer=$(tool compute-sanitizer) || { missing "no compute-sanitizer"; return; }
  local check=("$sanitizer" --tool "$1" --error-exitcode 9)
  RS_SOURCE_DIR=$PWD RS_PROGRAM=$build/rs RS_CUDA_HOST_LIBRARY=$card_library counted "${check[@]}" "$build/tests/test_cuda" \
    --gtest_brief=1 --gtest_filter=graph_on_a_card.agrees_with_the_cpu:images_on_a_card.of_another_size_are_refused || return
  [ -e "$models/minilm-q8.rsw" ] || { echo "(no $models/minilm-q8.rsw)"; return 0; }
  RS_CUDA_LIBRARY=$card_library limit "${check[@]}" "$build/rs" embed -m "$models/minilm-q8.rsw" --device cuda "a text" "and another" \
    >"$work/vectors" || { head -c 2000 "$work/vectors"; return 1; }
}

compare_with_shim() {
  local program=$build/tests/cuda_results
  if ! [ -x "$program" ] || ! [ -e "$host_library" ]; then missing "no $program or no $host_library"; return; fi
  RS_CUDA_LIBRARY=$card_library limit "$program" write "$work/card" &&
    RS_CUDA_LIBRARY=$host_library RS_CUDA_HOST=check=0 limit "$program" write "$work/shim" && "$program" compare "$work/card" "$work/shim"
}

bench() { # NAME [OPTION...]
  [ -e "$models/$1.rsw" ] || { missing "no $models/$1.rsw"; return; }
  local name=$1
  shift
  RS_CUDA_LIBRARY=$card_library limit "$build/rs" bench -m "$models/$name.rsw" --device cuda --json "$@" >"$work/bench-$name.json" || return
  cat "$work/bench-$name.json"
}

# Beside what the Python here has.
peers() {
  local one engines=rs-q8,torch-f16-cuda,ort-cuda cases=1x128,256x128,images image_cases=224x32
  [ -z "$fake" ] || engines=rs-q8 cases=1x16,images image_cases=28x1
  for one in all-MiniLM-L6-v2 dinov2-small; do
    [ -e "$sources/$one/model.safetensors" ] || { missing "no $sources/$one"; return; }
  done
  RS_CUDA_LIBRARY=$card_library limit python3 tools/bench-peers --device cuda --rs "$build" --model "$sources/all-MiniLM-L6-v2" \
    --image-model "$sources/dinov2-small" --drop none --engines "$engines" --cases "$cases" --image-cases "$image_cases" --quick \
    --rounds 2 --seconds 0.2 --out "$work/peers.md" --json "$work/peers.json"
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
  local found
  found=$(tool "$1") && "$found" --version 2>/dev/null | grep -m 1 -iE 'release|version|[0-9]+\.[0-9]+'
}

echo "card: $(describe_card)"
if wants build && [ "$mode" = here ] && [ -z "$fake" ]; then part "build" 3600 do_build; fi
run_end=$(($(date +%s) + ${RS_GPU_SECONDS:-285}))

if wants tests; then
  if [ -n "$small" ]; then
    part "test_cuda" 300 on_card test_cuda "graph_on_a_card.a*:graph_on_a_card.e*"
    part "test_graph" 300 on_card test_graph "add.*:gate.*:embed.*:pool.*" RS_DEVICE=cuda RS_CUDA_HOST=check=0
  else
    # What these say of devices is of the emulated one, and what they count is launches that are faults there.
    part "test_cuda" 60 on_card test_cuda "graph_on_a_card.*:images_on_a_card.*"
    # What else can be asked of a card.  Its attention is of f16 and its products of floats have parts of bf16, so that tests which
    # want 1e-4 of it, or less, are left out: test_cuda_linear, test_cuda_attention and test_cuda_models have tolerances for that.  What is of
    # rows of the CPU's kernels (session.*) is run by ctest, without a card.
    part "test_graph" 40 on_card test_graph "-linear.floats_match_f64:flash_attn.*:session.*" RS_DEVICE=cuda
    part "test_drop" 60 on_card test_drop \
      "-attn_colsum.matches_f64:token_sizes.count_in_attention_and_in_means:drop_tiny.every_score_and_mode_matches_f64" \
      RS_DEVICE=cuda
    part "test_heads" 30 on_card test_heads \
      "-heads.logits_match_bert_as_it_is_written_down:answers.are_the_best_of_all_spans:answers.all_of_them_fit_in_a_list*" RS_DEVICE=cuda
    part "test_vision" 40 on_card test_vision \
      "-vision.verify_looks_at_the_vectors_of_pictures:vision.every_family_gives_what_its_reference_does:vision.patches_of_any_size_are_embedded:vision.quantized_families_stay_near:vision.texts_of_clip*:vision_real.*" \
      RS_DEVICE=cuda
  fi
fi
if wants shim; then part "the same graphs as on the CPU" 60 compare_with_shim; fi
if [ -z "$small" ] && { wants models || wants bench || wants sanitizer || wants peers; }; then
  part "weight files" 90 make_models
  if wants models; then
    for one in minilm_of_floats_agrees_with_the_cpu minilm_of_few_bits_is_as_near_to_f32_as_on_the_cpu dinov2_agrees_with_the_cpu modernbert_agrees_with_the_cpu \
      profile_has_every_operator; do
      part "models: $one" 30 on_card test_cuda_models "model_on_a_card.$one"
    done
  fi
  if wants bench; then
    # Of images with its operators: what is not theirs is the host's.
    for one in "dinov2-q8 --ops" minilm-q8 minilm-q4 minilm-f32; do
      # shellcheck disable=SC2086 # a name and an option
      part "bench $one" 20 bench $one --seconds 0.3 ${fake:+--shapes 1x14}
    done
  fi
  if wants sanitizer && [ -z "$fake" ]; then
    for one in memcheck racecheck initcheck synccheck; do part "compute-sanitizer $one" 45 sanitize "$one"; done
  fi
  if wants peers; then part "beside its peers" 180 peers; fi
fi

# ---------------------------------------------------------------- the report

{
  echo "# rs on a card"
  echo
  echo "| | |"
  echo "|---|---|"
  echo "| card, driver, compute capability, memory, clock | $(describe_card) |"
  echo "| rs | $("$build/rs" --version 2>/dev/null | head -n 1), $(cat "$build/commit" 2>/dev/null || commit) |"
  echo "| nvcc | $(version_of nvcc) |"
  echo "| compute-sanitizer | $(version_of compute-sanitizer) |"
  echo "| Python | $(python3 --version 2>/dev/null) |"
  echo "| CPUs | $jobs |"
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
  if [ -s "$work/peers.md" ]; then
    echo
    sed 's/^#/##/' "$work/peers.md"
  fi
  if [ -e "$work/failures" ]; then
    echo
    echo "## What failed"
    cat "$work/failures"
  fi
} >"$report"
echo "the report is in $report"
exit "$failed"
