#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes: builds the CUDA extension, runs the operations'
# tests on the device, looks for memory errors and races, repeats, measures against PyTorch, profiles. Needs no network:
# a Python with numpy, torch (CUDA), pytest, pybind11 >= 3, cmake and ninja; nvcc; compute-sanitizer and ncu if there.
#
#   bench/gpu_check.sh OUT        OUT/results.tar.gz: results as JSON, and logs; OUT/summary.txt, also the last lines
#
# PYTHON chooses the interpreter (python3); STEPS="layers_vgg16 profile", say, runs only these (with no build: the one
# that is there is used); FASTCONV_CUDA=EMULATED runs all of it without a GPU, timing nothing.
set -uo pipefail
results=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUT}" && cd "$1" && pwd)
out=$(mktemp -d) # two dozen files travel better as one
trap 'rm -rf "$out"' EXIT
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mode=${FASTCONV_CUDA:-ON}
build=${BUILD_DIR:-build/gpu_check}
export PYTHONPATH=$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 FASTCONV_TEST_DEVICE=cuda
export PATH=$PATH:/usr/local/cuda/bin

budget=540 # seconds in all, less than the sum of the steps' limits: what matters most comes first
[ "$mode" = EMULATED ] && budget=3600

summary=()
# step SECONDS NAME COMMAND...: its output goes to NAME.log; a failure does not stop the others
step() {
  local limit=$1 name=$2 began=$SECONDS left=$((budget - SECONDS)) code
  shift 2
  [[ -n ${STEPS:-} && " $STEPS " != *" $name "* ]] && return 0
  if ((left <= 0)); then
    summary+=("$(printf '%-22s FAILED   no time left' "$name")")
    return 124
  fi
  [ "$mode" = EMULATED ] && limit=$((10 * limit))
  ((left < limit)) && limit=$left
  printf '\n=== %s (%d s)\n' "$name" "$SECONDS"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n 4 "$out/$name.log"
  summary+=("$(printf '%-22s %-8s %4d s' "$name" "$([ $code = 0 ] && echo ok || echo "FAILED $code")" $((SECONDS - began)))")
  tar -C "$out" -czf "$results/results.tar.gz" .
  return $code
}

# A kernel that waits in vain ends after two seconds. -lineinfo: for compute-sanitizer and ncu.
build_extensions() {
  cmake -G Ninja -S . -B "$build" -DFASTCONV_CUDA="$mode" -DFASTCONV_CUDA_ARCHITECTURES="90a" \
    -DFASTCONV_CUDA_BOUNDED_WAITS=ON -DCMAKE_CUDA_FLAGS=-lineinfo \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    ninja -C "$build" && cp "$build"/_C*.so "$build"/_cuda*.so python/fastconv/
}
export -f build_extensions
export python mode build

tests="tests/test_conv2d.py tests/test_conv_transpose2d.py tests/test_pool2d.py tests/test_batch_norm.py
  tests/test_response_norm.py tests/test_channels.py tests/test_activation.py tests/test_linear.py tests/test_loss.py
  tests/test_dropout.py tests/test_cuda.py tests/test_cuda_conv2d.py tests/test_cuda_training.py"
[ "$mode" = EMULATED ] && tests="tests/test_cuda.py tests/test_cuda_training.py tests/test_linear.py tests/test_loss.py"
# Another process for each fault. pytest-benchmark warns beside xdist, and other versions of numpy and torch may warn.
parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8 --max-worker-restart 16")
pytest=("$python" -m pytest -q -p no:cacheprovider -p no:benchmark -W default -o faulthandler_timeout=45)
few="test_a_graph or test_arithmetic or test_autocast or (test_exact_sums and bfloat16 and not simt and 3x3)"
small=()
[ "$mode" = EMULATED ] && small=(--batch 1 --filter "1x1_7")
layers=("$python" -m bench.cuda_layers)

step 400 build bash -c build_extensions || { echo "no build, no checks"; tail -n 30 "$out/build.log"; exit 1; }
step 20 device "$python" -c 'from fastconv import cuda; import json; print(json.dumps(cuda.device_info()))'
step 15 gpu nvidia-smi
# shellcheck disable=SC2086  # lists of words
step 150 tests "${pytest[@]}" $parallel $tests --junitxml="$out/tests.xml"
step 60 layers_resnet50 "${layers[@]}" --set resnet50 --json "$out/layers_resnet50.json" "${small[@]}"
step 40 memory_bound "$python" -m bench.cuda_memory_bound --json "$out/memory_bound.json"
step 60 steps "$python" -m bench.cuda_steps --json "$out/steps.json"
step 30 depthwise "${layers[@]}" --set mobilenet --json "$out/depthwise.json" "${small[@]}" --filter dw
step 60 repeat "$python" -m bench.cuda_repeat --json "$out/repeat.json"
if command -v compute-sanitizer >/dev/null && [ "$mode" != EMULATED ]; then
  for tool in memcheck racecheck; do
    step 40 "$tool" compute-sanitizer --tool $tool --error-exitcode 1 \
      "${pytest[@]}" tests/test_cuda.py tests/test_cuda_training.py tests/test_cuda_conv2d.py -k "$few"
  done
fi
step 30 layers_nchw "${layers[@]}" --set resnet50 --layout NCHW --ops fwd --json "$out/layers_nchw.json" "${small[@]}"
step 60 layers_vgg16 "${layers[@]}" --set vgg16,smallcnn --json "$out/layers_vgg16.json" "${small[@]}"
if command -v ncu >/dev/null && [ "$mode" != EMULATED ]; then
  step 40 profile ncu --clock-control none --kernel-name regex:entry --launch-count 8 --kill yes --csv \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
    "$python" -m bench.cuda_memory_bound --json "$out/profiled.json"
fi

printf '\n'
printf '%s\n' "${summary[@]}" | tee "$results/summary.txt"
! grep -q FAILED "$results/summary.txt"
