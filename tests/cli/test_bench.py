"""`mindrlhf bench generate` on a window that is not a multiple of anything."""

import json

from mindrlhf.cli.main import main


def test_bench_generate_compares_the_same_tokens(capfd):
    arguments = ["--tokens", "50", "--batch", "2", "--prompt-tokens", "3", "--rounds", "1", "--json"]
    assert main(["bench", "generate", *arguments]) == 0
    report = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert report["same_tokens"] is True
    assert report["answers"] == 2 and report["tokens_an_answer"] == 50
    assert report["times_faster"] > 0
