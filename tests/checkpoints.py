"""A checkpoint of Qwen2.5's architecture that compiles in a second, and problems in GSM8K's form."""

import json
from pathlib import Path

DECODER = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 1000000.0,
    "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip

# The part of Qwen2.5's that conversations without tools use.
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_problems(path: Path, count: int) -> Path:
    """`count` problems with GSM8K's columns: the answer is a worked solution that ends in #### and a number."""
    rows = []
    for number in range(count):
        boxes, each = number + 2, 3 * number + 500
        question = f"A shop has {boxes} boxes with {each} pears each. How many pears does it have?"
        answer = f"It has {boxes}*{each}=<<{boxes}*{each}={boxes * each}>>{boxes * each} pears.\n#### {boxes * each:,}"
        rows.append({"question": question, "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_checkpoint(directory: Path, texts: Path) -> Path:
    """Random weights and a tokenizer trained on `texts`, with Qwen2.5's two end tokens."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build
    from mindrlhf.utils.parallel import start

    start()
    policy = build(BuildConfig(DECODER, 300, [str(texts)], CHAT_TEMPLATE), seed=3)
    end_of_turn = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy.generation_config["eos_token_id"] = [end_of_turn, policy.tokenizer.eos_token_id]
    policy.write(directory)
    return directory
