"""The process that compares mathematical answers with math-verify, for math_equality.py. Runs as a script of its own.

Its first line out is {"ready": true} or {"error": "..."}. Then for every line in, {"gold": LaTeX, "answer": LaTeX,
"timeout": seconds}, one line out, {"right": bool}. It ends at the end of its input.
"""

import functools
import json
import logging
import os
import signal
import sys

MAX_MEMORY = 2 << 30  # bytes: a tower of powers would take all that there is, faster than any timeout


def main() -> None:
    # The folder of this script: its files are no top-level modules and must not stand before others of their names.
    sys.path.pop(0)
    # Replies have a stream of their own, so that nothing that a library prints gets among them.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    try:
        import math_verify
    except Exception as error:
        reply(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    # Its own timeouts are off: their signals cannot interrupt a long multiplication. The parent kills this process.
    parse = functools.lru_cache(1024)(functools.partial(math_verify.parse, parsing_timeout=None))
    reply(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        # SIGALRM ends the process, whatever it computes: for when the parent is no longer there to do it.
        signal.setitimer(signal.ITIMER_REAL, request["timeout"] + 1)
        right = math_verify.verify(parse(request["gold"]), parse(request["answer"]), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(replies, {"right": bool(right)})


def reply(stream, message: dict) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
