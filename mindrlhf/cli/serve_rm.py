"""`mindrlhf serve-rm`: a reward model behind HTTP, for the rewards of runs on this and other machines."""

import argparse

from mindrlhf.errors import UserError

EPILOG = """clients POST {"query": [prompt + answer, ...], "prompts": [prompt, ...]} to / or /get_reward and get
{"rewards": [number, ...]}; GET /health says whether it runs. In a run's config: rewards: [{urls: [http://host:port]}].

Where the environment variable MINDRLHF_REWARD_TOKEN is set, every POST needs the header Authorization: Bearer TOKEN;
it must be set to listen on an address that other machines can reach. SIGTERM and Ctrl-C answer what is queued first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a reward model's scores by HTTP, in OpenRLHF's protocol."
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, help="a reward model's checkpoint directory, made by `mindrlhf rm`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=5000, help="0: any that is free (default: 5000)")
    parser.add_argument("--max-batch", type=int, default=64, help="texts scored at once (default: 64)")
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="a batch waits so long for more (default: 5)")
    parser.add_argument("--queue", type=int, default=1024, help="texts that may wait, of all clients (default: 1024)")
    parser.add_argument("--max-body-mb", type=float, default=16.0, help="size of a request (default: 16)")
    parser.add_argument("--normalize-reward", action="store_true", help="(score - mean) / std of the reward model")


def run(arguments: argparse.Namespace) -> int:
    for name, good, range_ in (
        ("port", 0 <= arguments.port < 65536, "0 to 65535"),
        ("max-batch", arguments.max_batch > 0, "1 or more"),
        ("max-wait-ms", 0 <= arguments.max_wait_ms <= 1000, "0 to 1000"),
        ("queue", arguments.queue > 0, "1 or more"),
        ("max-body-mb", 0 < arguments.max_body_mb <= 1024, "over 0, to 1024"),
    ):
        if not good:
            raise UserError(f"--{name} {getattr(arguments, name.replace('-', '_'))}: must be {range_}")
    from mindrlhf.trainer.reward_server import ServerSettings, serve

    serve(
        ServerSettings(
            model=arguments.model,
            host=arguments.host,
            port=arguments.port,
            max_batch=arguments.max_batch,
            max_wait=arguments.max_wait_ms / 1e3,
            queue=arguments.queue,
            max_body=int(arguments.max_body_mb * (1 << 20)),
            normalize=arguments.normalize_reward,
        )
    )
    return 0
