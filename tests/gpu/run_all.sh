#!/usr/bin/env bash
# The whole GPU tier in one go: tests side by side (compiling flex kernels is the slow part), their summary, then benchmarks
# alone. Four minutes of tests and one of benchmarks on an H100 beside 16 cores.
#   tests/gpu/run_all.sh OUT_FOLDER [PART-PATTERN]     LIMIT=seconds for each part
# Exits 1 where a part failed or did not finish.
set -u
out=$1 only=${2:-.}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-1}
part() {  # NAME EXPRESSION FILE: one pytest process, its log and its JUnit file
    [[ $1 =~ $only ]] || return 0
    rm -f "$out/$1.xml"  # of an earlier call: one that is stopped at its limit writes none
    timeout "${LIMIT:-300}" python3 -m pytest -q -m "gpu or full" -p no:benchmark -p no:cacheprovider --durations=4 \
        -k "$2" "tests/gpu/$3" --junit-xml "$out/$1.xml" >"$out/$1.log" 2>&1
    local status=$?
    ((status)) && touch "$out/failed"
    echo "$1: exit $status $(grep -E '(passed|failed|error).* in [0-9.]+s' "$out/$1.log" | tail -1)"
}
rm -f "$out/failed"
part attention-flash "flash or graph" test_gpu_attention.py &
part attention-plain "not flash and not flex and not graph" test_gpu_attention.py &
part attention-flex-halves "flex and kernel and (bf16 and not 256 or fp16)" test_gpu_attention.py &
part attention-flex-fp32 "flex and kernel and fp32" test_gpu_attention.py &
part attention-flex-cross "flex and kernel and bf16 and 256 and cross" test_gpu_attention.py &
part attention-flex-self "flex and kernel and bf16 and 256 and not cross" test_gpu_attention.py &
part attention-flex-rest "flex and not kernel" test_gpu_attention.py &
OMP_NUM_THREADS=8 part width "test" test_gpu_width.py &  # its reference is NumPy at full width
part goldens-plain-float32 "not flash and not flex and float32" test_gpu_goldens.py &
part goldens-plain-halves "not flash and not flex and not float32" test_gpu_goldens.py &
part goldens-flash "flash" test_gpu_goldens.py &
part goldens-flex-float32-official "flex and float32 and official" test_gpu_goldens.py &
part goldens-flex-float32-small "flex and float32 and small" test_gpu_goldens.py &
part goldens-flex-bfloat16 "flex and bfloat16" test_gpu_goldens.py &
part goldens-flex-float16 "flex and float16 and not bfloat16" test_gpu_goldens.py &
part fast "test" test_fast.py &
part checkpoint "test" test_gpu_checkpoint.py &
part full "test" test_full_size.py &
wait
python3 tests/gpu/summary.py "$out"
[[ bench =~ $only ]] || { [[ ! -e $out/failed ]]; exit; }
timeout "${LIMIT:-300}" python3 -m pytest -q -m bench -p no:cacheprovider tests/benchmarks \
    --benchmark-json "$out/kernels.json" >"$out/bench.log" 2>&1
status=$?
echo "bench: exit $status $(grep -E '(passed|failed|error).* in [0-9.]+s' "$out/bench.log" | tail -1)"
((status == 0)) && [[ ! -e $out/failed ]]
