"""What a model_type of config.json implies: the flags of the decoder, and how its checkpoints name their tensors.

Sources: transformers 4.57 `models/{llama,qwen2,qwen3,qwen3_moe,mixtral,glm,glm4,deepseek_v3,gpt2}` for classes, keys,
defaults and tensors; Baichuan2 as its checkpoints' own modeling_baichuan.py has it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A row of FAMILIES."""

    architecture: str  # of the classes that transformers loads, without what names the head
    # What config.json says.
    biases: Mapping[bool, tuple[bool, bool]] = {False: (False, False)}  # attention_bias -> (of q, k and v, of o)
    attention_bias: bool = False  # where config.json does not say
    keys: Mapping[str, str] = {}  # Llama's name of a key -> this family's
    defaults: Mapping[str, Any] = {}  # of keys that config.json may leave out; by Llama's names
    constant: Mapping[str, Any] = {}  # keys that other values of are not supported; by the family's names
    excluded: tuple[tuple[str, Any, str], ...] = ()  # (key, value, why): of another model under the same name
    has_experts: bool = False
    latent: bool = False  # multi-head latent attention, DeepSeek-V2, arXiv 2405.04434
    # The decoder's flags.
    qk_norm: bool = False  # every head's query and key are normalised before they are rotated
    sandwich_norms: bool = False  # attention and MLP are normalised behind them too
    layer_norm: bool = False  # with mean and bias, instead of the root mean square
    learned_positions: bool = False  # added to the embedding, instead of rotary ones
    gelu: bool = False  # an MLP of two matrices with biases, instead of SwiGLU's three
    normalized_head: bool = False  # every row of the head has length 1
    # The checkpoint's tensors.
    renames: tuple[tuple[str, str], ...] = ()  # a part of the decoder's name -> of the checkpoint's, all in turn
    fused: Mapping[str, tuple[str, ...]] = {}  # its module -> the decoder's, whose rows follow one another
    interleaved: bool = False  # rotary pairs are neighbours, not half a head apart
    transposed: bool = False  # its projections are stored [in, out]
    language_model: str = "ForCausalLM"  # what ends the name of the class with logits
    trunk: str = "model."  # what begins every name but the head's; a checkpoint of the trunk alone leaves it out


NO_BIASES, ALL_BIASES, QKV_BIASES = (False, False), (True, True), (True, False)
_OPTIONAL_BIASES = {False: NO_BIASES, True: ALL_BIASES}
_GLM = dict(
    biases={False: NO_BIASES, True: QKV_BIASES},
    defaults={"head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07},
    fused={"gate_up_proj": ("gate_proj", "up_proj")},
    interleaved=True,
)
_MIXTRAL_NAMES = (
    (".mlp.experts.gate_proj.", ".block_sparse_moe.experts.w1."),
    (".mlp.experts.down_proj.", ".block_sparse_moe.experts.w2."),
    (".mlp.experts.up_proj.", ".block_sparse_moe.experts.w3."),
    (".mlp.gate.", ".block_sparse_moe.gate."),
)
_GPT2_NAMES = (
    ("model.embed_tokens.", "transformer.wte."), ("model.embed_positions.", "transformer.wpe."),
    ("model.layers.", "transformer.h."), ("model.norm.", "transformer.ln_f."),
    (".input_layernorm.", ".ln_1."), (".post_attention_layernorm.", ".ln_2."),
    (".self_attn.o_proj.", ".attn.c_proj."), (".self_attn.", ".attn."),
    (".mlp.up_proj.", ".mlp.c_fc."), (".mlp.down_proj.", ".mlp.c_proj."),
)  # fmt: skip
_GPT2_KEYS = {
    "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}  # fmt: skip

FAMILIES = {
    "llama": Family("Llama", _OPTIONAL_BIASES, constant={"mlp_bias": False}),
    "qwen2": Family("Qwen2", {True: QKV_BIASES}, True),
    "qwen3": Family("Qwen3", _OPTIONAL_BIASES, defaults={"head_dim": 128}, qk_norm=True),
    "glm": Family("Glm", **_GLM, attention_bias=True),
    "glm4": Family("Glm4", **_GLM, attention_bias=True, sandwich_norms=True),
    "mixtral": Family(
        "Mixtral", keys={"num_experts": "num_local_experts"}, has_experts=True, 
        constant={"sliding_window": None, "norm_topk_prob": True, "router_jitter_noise": 0.0},
        defaults={
            "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        },
        renames=_MIXTRAL_NAMES,
    ),
    "qwen3_moe": Family(
        "Qwen3Moe", _OPTIONAL_BIASES, qk_norm=True, has_experts=True,
        defaults={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    "deepseek_v3": Family(
        "DeepseekV3", keys={"num_experts": "n_routed_experts"}, has_experts=True, latent=True, interleaved=True,
        constant={"rope_interleave": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
        defaults={
            "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "norm_topk_prob": True,
            "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
            "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128,
        },
    ),
    "baichuan": Family(
        "Baichuan", fused={"W_pack": ("q_proj", "k_proj", "v_proj")}, normalized_head=True,
        excluded=(
            ("vocab_size", 64000, "that is Baichuan 1, whose head is not normalised; use Baichuan2 7B"),
            ("max_position_embeddings", None, "that is the 13B, with ALiBi; use Baichuan2 7B"),
            ("hidden_size", 5120, "that is the 13B, with ALiBi; use Baichuan2 7B"),
        ),
    ),
    "gpt2": Family(
        "GPT2", {True: ALL_BIASES}, True, keys=_GPT2_KEYS, language_model="LMHeadModel", trunk="transformer.",
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        constant={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        layer_norm=True, learned_positions=True, gelu=True, renames=_GPT2_NAMES, transposed=True,
        fused={"c_attn": ("q_proj", "k_proj", "v_proj")},
    ),
}  # fmt: skip
