#!/usr/bin/env bash
# mindrlhf grpo under msrun; its variables, WORKERS and others, are in ../msrun.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/../msrun.sh" grpo "$@"
