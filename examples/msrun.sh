#!/usr/bin/env bash
# A job under msrun: what the run.sh of each example calls with the name of its command.
#
# WORKERS: processes on this node. NODES: how many there are, with as many workers each; NODE_RANK: which one this is.
# MASTER_ADDR, PORT: where msrun's scheduler listens, on node 0. LOG_DIR: worker_N.log is what rank N prints.
set -euo pipefail

workers=${WORKERS:-1} nodes=${NODES:-1}
if [[ $# -lt 2 || $2 == -* ]]; then
  echo "usage: [WORKERS=1] [NODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1] [PORT=9190] [LOG_DIR=runs/msrun]" \
    "run.sh CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
if [[ $nodes -gt 1 && -z ${MASTER_ADDR:-} ]]; then
  echo "NODES=$nodes: set MASTER_ADDR to the address of node 0, the same on all nodes" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # runs from a source tree too
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + workers - 1) / workers))}"

exec msrun --worker_num=$((workers * nodes)) --local_worker_num="$workers" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-9190}" --cluster_time_out=300 \
  --log_dir="${LOG_DIR:-runs/msrun}" --join=True --tail_worker_log=0 \
  python -m mindrlhf "$1" --config "${@:2}"
