#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes: builds the CUDA extension, runs the operations'
# tests on the device, looks for memory errors and races, repeats, measures against PyTorch, profiles. Needs no network:
# a Python with numpy, torch (CUDA), pytest, pybind11 >= 3, cmake and ninja; nvcc; compute-sanitizer and ncu if there.
#
#   bench/gpu_check.sh OUT        results as JSON and logs in OUT; the last lines are a summary
#
# PYTHON chooses the interpreter (python3); FASTCONV_CUDA=EMULATED runs all of it without a GPU, timing nothing.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mode=${FASTCONV_CUDA:-ON}
build=${BUILD_DIR:-build/gpu_check}
export PYTHONPATH=$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 FASTCONV_TEST_DEVICE=cuda
export PATH=$PATH:/usr/local/cuda/bin

budget=540 # seconds in all, less than the sum of the steps' limits
[ "$mode" = EMULATED ] && budget=3600

summary=()
# step SECONDS NAME COMMAND...: its output goes to OUT/NAME.log; a failure does not stop the others
step() {
  local limit=$1 name=$2 began=$SECONDS left=$((budget - SECONDS)) code
  shift 2
  if ((left <= 0)); then
    summary+=("$(printf '%-22s FAILED   no time left' "$name")")
    return 124
  fi
  ((left < limit)) && limit=$left
  printf '\n=== %s (%d s)\n' "$name" "$SECONDS"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n 4 "$out/$name.log"
  summary+=("$(printf '%-22s %-8s %4d s' "$name" "$([ $code = 0 ] && echo ok || echo "FAILED $code")" $((SECONDS - began)))")
  return $code
}

build_extensions() {
  cmake -G Ninja -S . -B "$build" -DFASTCONV_CUDA="$mode" -DFASTCONV_CUDA_ARCHITECTURES="90a" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    ninja -C "$build" && cp "$build"/_C*.so "$build"/_cuda*.so python/fastconv/
}
export -f build_extensions
export python mode build

tests="tests/test_conv2d.py tests/test_conv_transpose2d.py tests/test_pool2d.py tests/test_batch_norm.py
  tests/test_response_norm.py tests/test_channels.py tests/test_activation.py tests/test_linear.py tests/test_loss.py
  tests/test_dropout.py tests/test_cuda.py tests/test_cuda_conv2d.py tests/test_cuda_training.py"
parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")
few="graph or training or arithmetic or autocast"
[ "$mode" = EMULATED ] && tests="tests/test_cuda.py tests/test_cuda_training.py tests/test_linear.py tests/test_loss.py"

step 200 build bash -c build_extensions || { echo "no build, no checks: see $out/build.log"; tail -n 30 "$out/build.log"; exit 1; }
step 20 device "$python" -c 'from fastconv import cuda; import json; print(json.dumps(cuda.device_info()))'
step 15 gpu nvidia-smi
# shellcheck disable=SC2086  # lists of words
step 150 tests "$python" -m pytest -q -p no:cacheprovider $parallel $tests --junitxml="$out/tests.xml"
step 60 repeat "$python" -m bench.cuda_repeat --json "$out/repeat.json"
if command -v compute-sanitizer >/dev/null && [ "$mode" != EMULATED ]; then
  for tool in memcheck racecheck; do
    step 40 "$tool" compute-sanitizer --tool $tool --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "$few"
  done
fi
small=()
[ "$mode" = EMULATED ] && small=(--batch 1 --filter "1x1_7")
step 100 layers_bf16 "$python" -m bench.cuda_layers --set resnet50,vgg16,smallcnn --json "$out/layers_bf16.json" "${small[@]}"
step 30 depthwise_bf16 "$python" -m bench.cuda_layers --set mobilenet --json "$out/depthwise_bf16.json" "${small[@]:-}" --filter dw
step 30 nchw_bf16 "$python" -m bench.cuda_layers --set resnet50 --layout NCHW --ops fwd --json "$out/nchw_bf16.json" "${small[@]}"
step 40 memory_bound "$python" -m bench.cuda_memory_bound --json "$out/memory_bound.json"
step 60 steps "$python" -m bench.cuda_steps --json "$out/steps.json"
if command -v ncu >/dev/null && [ "$mode" != EMULATED ]; then
  step 40 profile ncu --clock-control none --set basic --launch-skip 40 --launch-count 12 --csv \
    "$python" -m bench.cuda_steps --json "$out/profiled.json" --only smallcnn --repeats 1
fi

printf '\n'
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
! grep -q FAILED "$out/summary.txt"
