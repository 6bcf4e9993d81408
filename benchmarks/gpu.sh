#!/usr/bin/env bash
# Edit, evaluate and compute second moments at Llama-3-8B's shapes on a GPU, or at small shapes on a CPU, with random
# weights in bfloat16. Takes less than ten minutes on one H200, and stops there. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled
exec timeout 590 "${PYTHON:-python}" benchmarks/gpu.py "$@"
