#!/usr/bin/env bash
# GRPO under msrun. WORKERS: processes on this host; more than 1 is refused with one line until it is supported.
# PORT: of msrun's scheduler, a free one. LOG_DIR: worker_0.log is what the job prints.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: [WORKERS=1] [PORT=9190] [LOG_DIR=runs/msrun] $0 CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
config=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" # runs from a source tree too

exec msrun --worker_num="${WORKERS:-1}" --local_worker_num="${WORKERS:-1}" --master_port="${PORT:-9190}" \
  --log_dir="${LOG_DIR:-runs/msrun}" --join=True --cluster_time_out=300 \
  "$here/main.py" --config "$config" "$@"
