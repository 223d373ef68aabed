#!/usr/bin/env bash
# Every measurement of this machine in one go, as key:value lines: kernels against their plain functions, training step,
# scoring and adaptation, quantisation and compression. One GPU is used; without one the kernels are left out.
#
#     tests/bench_all.sh [PRESET ...] | tee bench.log        (default: pr1941 on a GPU, tiny without)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] && tokens=1000000 presets=pr1941 || { tokens=20000 presets=tiny; }
echo "git:$(git rev-parse --short HEAD 2> /dev/null || echo unknown) gpus:$gpus"
if [ "$gpus" -gt 0 ]; then
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader
    "$python" tests/bench_kernels.py
fi
for preset in "${@:-$presets}"; do
    for kernels in plain auto; do
        [ "$gpus" -gt 0 ] || [ "$kernels" = auto ] || continue
        echo "preset:$preset kernels:$kernels"
        PRESET=$preset KERNELS=$kernels "$python" tests/bench_train.py
    done
    PRESET=$preset "$python" tests/bench_eval.py "$tokens"
    for compressor in brotli rans; do
        echo "preset:$preset compressor:$compressor"
        PRESET=$preset COMPRESSOR=$compressor "$python" tests/bench_quant.py
    done
done
