#!/usr/bin/env bash
# Run a command in the image of docker/Dockerfile.ascend, with some of this host's devices and its driver.
#
# SHM_SIZE: shared memory (default 16g). WORKSPACE: a directory of this host for the container's runs (default ./runs).
# DRY_RUN=1: print the command instead.
set -euo pipefail

fail() {
  echo "$0: $1" >&2
  exit 2
}

[[ $# -ge 3 ]] || fail "usage: $0 DEVICES IMAGE COMMAND ..., such as $0 0,1 mindrlhf:ascend mindrlhf env"
devices=$1 image=$2
shift 2
[[ $devices =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "devices '$devices': must be numbers with commas, such as 0,1,2,3"
[[ ${SHM_SIZE:=16g} =~ ^[1-9][0-9]*[kmg]$ ]] || fail "SHM_SIZE=$SHM_SIZE: must be a size, such as 16g"

arguments=()
IFS=, read -ra numbers <<<"$devices"
for device in "${numbers[@]/#//dev/davinci}" /dev/davinci_manager /dev/devmm_svm /dev/hisi_hdc; do
  [[ -e $device || ${DRY_RUN:-} ]] || fail "$device: not on this host; ls /dev/davinci* shows what is"
  arguments+=(--device "$device")
done
[[ -d /usr/local/Ascend/driver || ${DRY_RUN:-} ]] || fail "/usr/local/Ascend/driver: not there; install the driver"
for path in /usr/local/Ascend/driver /usr/local/dcmi /usr/local/bin/npu-smi /etc/ascend_install.info /etc/hccn.conf; do
  if [[ -e $path || ${DRY_RUN:-} ]]; then arguments+=(--volume "$path:$path:ro"); fi
done
runs=$(realpath -m "${WORKSPACE:-runs}")

# The host's network: HCCL and the store of several nodes. --init: a signal reaches the command, and ends it.
command=(docker run --rm --init --network host --shm-size "$SHM_SIZE" "${arguments[@]}"
  --volume "$runs:/workspace/runs" "$image" "$@")
if [[ ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  mkdir -p "$runs"
  exec "${command[@]}"
fi
