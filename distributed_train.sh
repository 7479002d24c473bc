#!/usr/bin/env bash
# Train on N processes, one a GPU: ./distributed_train.sh N DATA [flags of train.py ...]
#
# Several nodes: run it on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment, or with
# NNODES and RDZV_ENDPOINT (host:port of one of them) for a rendezvous that needs no ranks.
#
# MAX_RESTARTS=3 starts all processes again, up to three times, when one has died; it needs --experiment NAME
# --resume auto, to go on where they were.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 N DATA [flags of train.py ...], with N the number of processes on this node" >&2
    exit 2
fi
processes=$1
shift
nodes=${NNODES:-1}
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    where=(--rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=${RDZV_ID:-vip}")
elif [ "$nodes" != 1 ]; then
    if [ "${MAX_RESTARTS:-0}" != 0 ]; then
        echo "$0: error: nodes that restart together need RDZV_ENDPOINT (host:port of one of them)" >&2
        exit 2
    fi
    where=("--node-rank=${NODE_RANK:?set NODE_RANK to the number of this node, from 0}"
        "--master-addr=${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}" "--master-port=${MASTER_PORT:-29500}")
else
    where=(--standalone)
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/.venv/bin/python" ]; then
    PYTHON=$here/.venv/bin/python # what make installed, where no other environment is active
fi
has_torch='import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("timm")))'
if ! "${PYTHON:-python}" -c "$has_torch" 2>/dev/null; then
    echo "$0: error: ${PYTHON:-python} has no torch and timm: make install, or set PYTHON to one that has" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun sets it, without its warning
exec "${PYTHON:-python}" -m vip.cli.launch --nnodes="$nodes" --nproc-per-node="$processes" \
    --max-restarts="${MAX_RESTARTS:-0}" "${where[@]}" "$here/train.py" "$@"
