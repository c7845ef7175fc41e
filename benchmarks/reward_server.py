"""`mindrlhf serve-rm` under load: requests of 4 answers each from 1, 4 and 16 clients, batched across requests and not.

    python benchmarks/reward_server.py --output reward_server.json

Two servers of one random reward model run at the same time, one with the default --max-batch and one with 1, which
scores a text a call. Their rounds alternate, so that whatever else the machine does hits both; medians of all rounds
are compared. The server that waits is blocked, not spinning. Compilation is in the first round, which is not counted.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MODEL = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
VOCABULARY = 4096
CLIENTS = (1, 4, 16)
ANSWERS = 4  # a request
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as directory:
        model = write_reward_model(Path(directory))
        batched, alone = Server(model), Server(model, "--max-batch", "1", "--max-wait-ms", "0")
        try:
            report = measure({"batched": batched, "one text a call": alone}, options)
        finally:
            batched.close()
            alone.close()
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="of each server and count of clients (default: 4)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there as JSON")
    parsed = parser.parse_args()
    if parsed.rounds < 2:
        parser.error(f"--rounds {parsed.rounds} leaves nothing after the warm-up; it must be 2 or more")
    return parsed


def write_reward_model(directory: Path) -> Path:
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build
    from mindrlhf.utils.parallel import start

    start()
    (directory / "text.txt").write_text(" ".join(WORDS))
    # Of the vocabulary only the words' tokens are used; its size is the embedding's.
    policy = build(BuildConfig({**MODEL}, VOCABULARY, [str(directory / "text.txt")]), 0, head="score")
    policy.write(directory / "model")
    return directory / "model"


class Server:
    """`mindrlhf serve-rm` in a process of its own."""

    def __init__(self, model: Path, *options: str):
        command = [sys.executable, "-m", "mindrlhf", "serve-rm", "--model", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if not found:
            raise SystemExit(f"the server ended with exit code {self.process.wait()}")
        self.url = found[0]

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()


def measure(servers: dict[str, Server], options: argparse.Namespace) -> dict:
    """Prints a row for each server and count of clients, and how many times faster batching is."""
    report = {"benchmark": "reward_server", "model": MODEL, "answers_a_request": ANSWERS, "rows": []}
    print(f"{'clients':>7}  {'server':<16}{'requests/s':>11}{'answers/s':>11}{'p50 ms':>9}{'p95 ms':>9}")
    for clients in CLIENTS:
        seconds: dict[str, list[float]] = {name: [] for name in servers}
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for number in range(options.rounds):
            for name, server in servers.items():
                taken, passed = load(server.url, clients, options.seconds, number)
                if number:
                    seconds[name] += taken
                    rates[name].append(len(taken) / passed)
        for name in servers:
            row = summary(seconds[name], statistics.median(rates[name]))
            report["rows"].append({"clients": clients, "server": name, **row})
            print(
                f"{clients:>7}  {name:<16}{row['requests_a_second']:>11.1f}{row['answers_a_second']:>11.1f}"
                f"{row['p50_ms']:>9.1f}{row['p95_ms']:>9.1f}",
                flush=True,
            )
        batched, alone = report["rows"][-2:]
        times = batched["requests_a_second"] / alone["requests_a_second"]
        report[f"times_faster_batched_at_{clients}_clients"] = round(times, 2)
        print(f"{'':>7}  batched is {times:.2f} times as fast", flush=True)
    return report


def load(url: str, clients: int, seconds: float, seed: int) -> tuple[list[float], float]:
    """Seconds of every request that `clients` threads made one after the other, and the seconds that all took."""
    from mindrlhf.rewards.remote import RemoteReward

    reward = RemoteReward([url])
    taken: list[float] = []
    begin = time.perf_counter()

    def client(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        while time.perf_counter() - begin < seconds:
            prompts = [f"{draw.randint(0, 9)}=" for _ in range(ANSWERS)]
            queries = [prompt + " ".join(draw.choices(WORDS, k=draw.randint(4, 24))) for prompt in prompts]
            start = time.perf_counter()
            reward(queries, prompts, [None] * ANSWERS)
            taken.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, time.perf_counter() - begin


def summary(seconds: list[float], rate: float) -> dict[str, float]:
    percentiles = statistics.quantiles(seconds, n=20, method="inclusive")
    return {
        "requests_a_second": round(rate, 2),
        "answers_a_second": round(rate * ANSWERS, 2),
        "p50_ms": round(1e3 * percentiles[9], 2),
        "p95_ms": round(1e3 * percentiles[18], 2),
    }


if __name__ == "__main__":
    main()
