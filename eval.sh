#!/usr/bin/env bash
# Validate a checkpoint: bash eval.sh DATA CHECKPOINT [flags of validate.py ...]
#
# DATA is the validation folder or the one above it, CHECKPOINT a file or the folder of a run.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash $0 DATA CHECKPOINT [flags of validate.py ...]" >&2
    exit 2
fi
data=$1 checkpoint=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/.venv/bin/python" ]; then
    PYTHON=$here/.venv/bin/python # what make installed, where no other environment is active
fi
has_torch='import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("timm")))'
if ! "${PYTHON:-python}" -c "$has_torch" 2>/dev/null; then
    echo "$0: error: ${PYTHON:-python} has no torch and timm: make install, or set PYTHON to one that has" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$here/validate.py" "$data" --checkpoint "$checkpoint" "$@"
