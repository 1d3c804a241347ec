#!/usr/bin/env bash
# The whole GPU tier in one go: tests side by side (compilation is the slow part), then benchmarks alone on the device.
#   tests/gpu/run_all.sh OUT_FOLDER [extra pytest arguments]
set -u
out=$1; shift
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2}
part() {  # NAME -k EXPRESSION FILE: one pytest process, its log and its JUnit file
    timeout "${LIMIT:-200}" python3 -m pytest -q -m gpu -p no:benchmark -p no:cacheprovider --durations=4 \
        -k "$2" "tests/gpu/$3" --junit-xml "$out/$1.xml" "${extra[@]}" >"$out/$1.log" 2>&1
    echo "$1: exit $? $(grep -E '(passed|failed|error).* in [0-9.]+s' "$out/$1.log" | tail -1)"
}
extra=("$@")
part attention-flash "flash or graph" test_gpu_attention.py &
part attention-plain "not flash and not flex and not graph" test_gpu_attention.py &
part attention-flex-cross "flex and cross and not matters" test_gpu_attention.py &
part attention-flex-self "flex and (self or decode) and not matters" test_gpu_attention.py &
part attention-flex-rest "flex and not ((cross or self or decode) and not matters)" test_gpu_attention.py &
part width "test" test_gpu_width.py &
part goldens-plain "not flash and not flex" test_gpu_goldens.py &
part goldens-flash "flash" test_gpu_goldens.py &
part goldens-flex-float32 "flex and float32" test_gpu_goldens.py &
part goldens-flex-bfloat16 "flex and bfloat16" test_gpu_goldens.py &
part goldens-flex-float16 "flex and float16" test_gpu_goldens.py &
wait
timeout "${LIMIT:-200}" python3 -m pytest -q -m bench -p no:cacheprovider tests/benchmarks \
    --benchmark-json "$out/bench.json" "${extra[@]}" >"$out/bench.log" 2>&1
echo "bench: exit $? $(grep -E '(passed|failed|error).* in [0-9.]+s' "$out/bench.log" | tail -1)"
