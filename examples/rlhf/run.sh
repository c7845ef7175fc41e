#!/usr/bin/env bash
# Supervised fine-tuning, a reward model, PPO with it, and a table of what came of it. Arguments, section.key=value, go to
# all three stages. It stops at the first failure; run again, it goes on from there. PYTHON: one that has mindrlhf.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

echo "1/3 supervised fine-tuning"
"$python" -m mindrlhf sft --config examples/rlhf/sft.yaml "$@"
echo; echo "2/3 reward model"
"$python" -m mindrlhf rm --config examples/rlhf/reward_model.yaml "$@"
echo; echo "3/3 PPO"
"$python" -m mindrlhf ppo --config examples/rlhf/ppo.yaml "$@"
"$python" examples/rlhf/report.py runs/rlhf
