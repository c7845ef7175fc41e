"""The torch side of decode.py, training.py and preference.py: for every line read a round, its seconds as JSON.

Needs torch and transformers only; started by side_by_side.TorchSide with what to run (decode, training or preference),
the threads, and the sizes as JSON.
"""

import json
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def decode_round(model, sizes: dict) -> dict[str, list[float]]:
    prompt, steps = sizes["prompt_tokens"], sizes["tokens"] - sizes["prompt_tokens"]
    ids = torch.randint(0, sizes["vocab_size"], (sizes["batch"], prompt))
    taken = []
    with torch.inference_mode():
        past = model(ids[:, :-1], use_cache=True).past_key_values
        token = ids[:, -1:]
        for _ in range(steps):
            start = time.perf_counter()
            logits = model(token, past_key_values=past, use_cache=True).logits[:, -1]
            token = torch.multinomial(torch.softmax(logits, -1), 1)
            taken.append(time.perf_counter() - start)
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=True, pad_token_id=0)
        whole = time.perf_counter() - start
    return {"decode_step": taken, "generate_token": [whole / steps]}


def training_round(model, optimizer, sizes: dict) -> dict[str, list[float]]:
    ids = torch.randint(0, sizes["vocab_size"], (sizes["batch"], sizes["tokens"]))
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return {"training_step": taken}


def preference_round(model, optimizer, sizes: dict) -> dict[str, list[float]]:
    prompt, lengths = sizes["prompt_tokens"], torch.tensor(sizes["answers"])
    longest = prompt + int(lengths.max())
    ids = torch.randint(0, sizes["vocab_size"], (len(lengths), longest))
    place = torch.arange(longest)
    answer = (place >= prompt) & (place < prompt + lengths[:, None])
    attention = (place < prompt + lengths[:, None]).long()
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        logits = model(ids, attention_mask=attention).logits[:, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        sums = (logprobs * answer[:, 1:]).sum(-1)
        loss = -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return {"dpo_step": taken}


def main() -> None:
    what, threads, sizes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        max_position_embeddings=sizes["max_positions"],
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.train(what != "decode")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for _ in sys.stdin:
        taken = decode_round(model, sizes) if what == "decode" else ROUNDS[what](model, optimizer, sizes)
        print(json.dumps(taken), flush=True)


ROUNDS = {"training": training_round, "preference": preference_round}

if __name__ == "__main__":
    main()
