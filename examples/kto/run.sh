#!/usr/bin/env bash
# mindrlhf kto under msrun; its variables, WORKERS and others, are in ../msrun.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/../msrun.sh" kto "$@"
