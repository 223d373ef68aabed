#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: ./run.sh                        train, quantise and score on whatever this machine has
       ./run.sh records/FOLDER [SEED]  run a published system and compare the figures (folders with published.json)
       ./run.sh --text FOLDER          train a tiny model on your own text: the .txt and .jsonl files below FOLDER
       ./run.sh test                   run the test suite on all cores (further words go to pytest: -n 2 takes two
                                       cores, -m slow runs the long tests)
       ./run.sh --help                 this text

Makes a virtual environment in .venv, installs the pinned requirements, builds the embedded corpus, and starts
train_gpt.py: with torchrun and one process per GPU, or as one process that uses all cores where there is no GPU.

The environment is passed through. What people set most:
  PRESET   frontier, default, tiny, or a published system: baseline, pr489, fork5, fork5_twin, fork5_10l, pr1880,
           pr1941, pr1855, pr2135, pr2158. Unset: default where there are GPUs and the FineWeb shards in DATA_DIR,
           else tiny
  SEED     initial weights (1337)
  RUN_ID   folder under runs/ for log, weights, artifact, result.json and picture
  STAGES   train,quantize,evaluate or a part of it; describe prints sizes and needs no data; check
           tries what the stages will need and writes nothing
  any other setting of train_gpt.py, for example ITERATIONS=50
And for this script: NPROC (processes; default one per GPU), PYTHON (python3), VENV (.venv). VENV=none makes and installs
nothing: PYTHON runs everything with the packages that it has, such as a PyTorch that fits the driver, or FlashAttention.
CUDA_VISIBLE_DEVICES= (empty) keeps a run on the CPU.
TEXT
}

die() {
    printf 'run.sh: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 2
}

# Ends the script because PyTorch cannot use this machine's GPUs, for the reason $1, and says what would work.
# Drivers: CUDA 12 runs on 525 and later, CUDA 13 on 580 and later (NVIDIA, CUDA Compatibility, minor versions).
# PyTorch 2.11 is the last release with a build for CUDA 12.8 (pytorch/FBGEMM #5976, pytorch/pytorch #178665).
die_without_gpus() {
    local major=${driver%%.*} advice
    if [ "$major" -lt 525 ]; then
        advice=("No PyTorch that this code runs on fits a driver before 525; it has to be updated.")
    elif [ "$major" -lt 580 ]; then
        advice=("A PyTorch for CUDA 12.8 fits this driver:"
            "  ${PYTHON:-python3} -m venv .venv"
            "  .venv/bin/python -m pip install torch==2.11.0 --index-url https://download.pytorch.org/whl/cu128"
            "  grep -v '^torch==' requirements.txt | .venv/bin/python -m pip install -r /dev/stdin"
            "  VENV=none PYTHON=.venv/bin/python ./run.sh")
    else
        advice=("The PyTorch of requirements.txt, as pip installs it, fits this driver.")
    fi
    die "found $found GPU(s) with driver $driver, but $1" "${advice[@]}" \
        "With VENV=none PYTHON=/path/to/python, what is installed there is used, FlashAttention included." \
        "With an empty CUDA_VISIBLE_DEVICES= the run stays on the CPU."
}

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
    "" | test) ;;
    --text) [ -n "${2:-}" ] || die "--text needs a folder with .txt or .jsonl files" ;;
    -h | --help) usage; exit 0 ;;
    *) [ -d "$1" ] || die "'$1' is neither a folder nor a known word; see ./run.sh --help" ;;
esac

# The GPUs that a run here should use, and their driver: none where the caller hides them or the work needs none.
found=0 driver=
case "${CUDA_VISIBLE_DEVICES-all}" in
    "" | -1) ;;
    *) if [ "${1:-}" != test ] && [ "${STAGES:-}" != describe ] &&
        drivers=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | grep '^[0-9]'); then
        found=$(grep -c . <<< "$drivers") driver=${drivers%%$'\n'*}
    fi ;;
esac

venv=${VENV:-.venv}
if [ "$venv" = none ]; then python=${PYTHON:-python3}; else python="$venv/bin/python"; fi
if [ "$venv" = none ] || [ ! -x "$python" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "needs Python 3.11 or later; set PYTHON=/path/to/python3.11"
fi
if [ "$venv" = none ]; then
    # Names to import; those below the line about the tests are needed by the tests alone.
    if [ "${1:-}" = test ]; then last='$'; else last='/^# The tests alone/'; fi
    packages=$(sed -nE "1,${last}s/^(pytest-)?([a-z_0-9]+)==.*/\2/p" requirements.txt)
    # shellcheck disable=SC2086 # one word each
    missing=$("$python" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))' $packages)
    [ -z "$missing" ] || die "VENV=none, but $python lacks: $missing (requirements.txt has the versions)"
elif ! cmp -s requirements.txt "$venv/installed-requirements.txt"; then
    if [ "$found" -gt 0 ] && [ "${driver%%.*}" -lt 580 ]; then
        die_without_gpus "requirements.txt names a PyTorch that pip brings for CUDA 13, which needs driver 580 or later"
    fi
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    # PyTorch for CUDA brings the Triton that fits it; the CPU build brings none, and the kernels are tested there too.
    if [ "$(uname -s)" = Linux ] && ! "$python" -c 'import triton' 2> /dev/null; then
        "$python" -m pip install --quiet --disable-pip-version-check triton==3.6.0
    fi
    cp requirements.txt "$venv/installed-requirements.txt"
fi

if [ "${1:-}" = test ]; then
    shift
    # Each worker begins with a run of neighbouring tests, so that hardly a fixture of a file is built twice.
    exec "$python" -m pytest tests -m "not slow" -n auto --maxprocesses 16 --dist worksteal "$@"
fi

# Not device_count alone: it asks the driver, and counts GPUs that this PyTorch cannot use.
torch=$("$python" -c 'import torch
print(torch.cuda.is_available() * torch.cuda.device_count(), torch.__version__, torch.version.cuda)')
read -r gpus version cuda <<< "$torch"
if [ "$found" -gt 0 ] && [ "$gpus" -eq 0 ]; then
    case "$cuda" in
        None) die_without_gpus "PyTorch $version is a build without CUDA" ;;
        13.*) [ "${driver%%.*}" -ge 580 ] ||
            die_without_gpus "PyTorch $version is built for CUDA $cuda, which needs driver 580 or later" ;;
    esac
    reason=$("$python" -c 'import torch; torch.cuda.init()' 2>&1 | tail -n 1) || true
    die_without_gpus "PyTorch $version for CUDA $cuda can use none of them: $reason"
fi
if [ "${1:-}" = --text ]; then
    case "$2" in /*) folder=$2 ;; *) folder=$caller/$2 ;; esac
    said=$("$python" data/own_text.py "$folder") || exit
    echo "$said"
    said=${said#*tokenizer:}
    export PRESET=tiny TOKENIZER_PATH="${said%% sha256:*}" DATA_PATH="${said##*dataset:}"
elif [ -n "${1:-}" ]; then
    exec "$python" records/reproduce.py "$@"
fi

if [ -z "${PRESET:-}" ]; then
    shards=${DATA_PATH:-${DATA_DIR:-./data}/datasets/fineweb10B_sp${VOCAB_SIZE:-8192}}
    if [ "$gpus" -gt 0 ] && [ -d "$shards" ]; then export PRESET=default; else export PRESET=tiny; fi
    [ "${STAGES:-}" = describe ] || echo "run.sh: $gpus GPU(s), PRESET=$PRESET"
fi
if [ "$PRESET" = tiny ] && [ "${1:-}" != --text ] && [ "${STAGES:-}" != describe ]; then "$python" data/embedded.py; fi

processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [ "$gpus" -eq 0 ] && [ "$processes" -gt 1 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
if [ "$processes" -eq 1 ]; then exec "$python" train_gpt.py; fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" train_gpt.py
