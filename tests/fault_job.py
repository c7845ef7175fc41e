"""`mindrlhf` with a process that kills itself at a chosen moment, for `python -m mindrlhf.launch`:

    fault_job.py MODULE:CLASS.METHOD CALL RANK -- grpo --config x.yaml a.b=c

Process RANK gets SIGKILL in the middle of a step, a save or a sync: when it calls that method for the CALL-th time.
"""

import functools
import importlib
import os
import signal
import sys

from mindrlhf.cli.main import main
from mindrlhf.utils.parallel import prepare_environment


def die_at(target: str, call: int) -> None:
    """target: MODULE:CLASS.METHOD or MODULE:FUNCTION, looked up in its module by whoever calls it; call: from 1."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    method, calls = getattr(owner, name), [0]

    @functools.wraps(method)
    def counted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments, **keywords)

    setattr(owner, name, counted)


if __name__ == "__main__":
    moment, number, rank, _, *arguments = sys.argv[1:]
    prepare_environment()
    if os.environ["RANK_ID"] == rank:
        die_at(moment, int(number))
    sys.exit(main(arguments))
