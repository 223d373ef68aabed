#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: ./run.sh                        train, quantise and score on whatever this machine has
       ./run.sh records/FOLDER [SEED]  run a published system and compare the figures (folders with published.json)
       ./run.sh test                   run the test suite (further words go to pytest: -m slow runs the long tests)
       ./run.sh --help                 this text

Makes a virtual environment in .venv, installs the pinned requirements, builds the embedded corpus, and starts
train_gpt.py: with torchrun and one process per GPU, or as one process that uses all cores where there is no GPU.

The environment is passed through. What people set most:
  PRESET   frontier, default, tiny, or a published system: baseline, pr489, fork5, fork5_twin, fork5_10l, pr1880,
           pr1941, pr1855, pr2135. Unset: default where there are GPUs and the FineWeb shards in DATA_DIR, else tiny
  SEED     initial weights (1337)
  RUN_ID   folder under runs/ for log, weights, artifact, result.json and picture
  STAGES   train,quantize,evaluate or a part of it; describe prints sizes and needs no data
  any other setting of train_gpt.py, for example ITERATIONS=50
And for this script: PYTHON (python3), VENV (.venv), NPROC (processes; default one per GPU).
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
    "" | test) ;;
    -h | --help) usage; exit 0 ;;
    *) [ -d "$1" ] || { echo "run.sh: '$1' is neither a folder nor a known word; see ./run.sh --help" >&2; exit 2; } ;;
esac

venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "run.sh: needs Python 3.11 or later; set PYTHON=/path/to/python3.11" >&2; exit 2; }
    "${PYTHON:-python3}" -m venv "$venv"
fi
if ! cmp -s requirements.txt "$venv/installed-requirements.txt"; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    # PyTorch for CUDA brings the Triton that fits it; the CPU build brings none, and the kernels are tested there too.
    if [ "$(uname -s)" = Linux ] && ! "$venv/bin/python" -c 'import triton' 2> /dev/null; then
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check triton==3.6.0
    fi
    cp requirements.txt "$venv/installed-requirements.txt"
fi
python="$venv/bin/python"

if [ "${1:-}" = test ]; then
    shift
    exec "$python" -m pytest tests -m "not slow" "$@"
fi
if [ -n "${1:-}" ]; then exec "$python" records/reproduce.py "$@"; fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ -z "${PRESET:-}" ]; then
    shards=${DATA_PATH:-${DATA_DIR:-./data}/datasets/fineweb10B_sp${VOCAB_SIZE:-8192}}
    if [ "$gpus" -gt 0 ] && [ -d "$shards" ]; then export PRESET=default; else export PRESET=tiny; fi
    [ "${STAGES:-}" = describe ] || echo "run.sh: $gpus GPU(s), PRESET=$PRESET"
fi
if [ "$PRESET" = tiny ] && [ "${STAGES:-}" != describe ]; then "$python" data/embedded.py; fi

processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [ "$gpus" -eq 0 ]; then
    # Waiting threads soon go to sleep: on a busy machine endless spinning makes everything several times slower.
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
    if [ "$processes" -gt 1 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
fi
if [ "$gpus" -gt 0 ]; then export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/runs/compile-cache}; fi
if [ "$processes" -eq 1 ]; then exec "$python" train_gpt.py; fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" train_gpt.py
