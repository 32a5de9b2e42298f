"""Hugging Face folders: config.json, model.safetensors or its shards, a tokenizer.

Llama, Qwen2, Qwen3, GPT-2 and NanoChat. The names and the meaning of the fields are those of
`transformers`, which the tests compare with; it is not needed to read weights.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoint.model import LoadedModel, ModelConfig, shapes_of
from engine.checkpoint.tensors import Layout, Source, Stored, join, read_safetensors
from engine.models.gpt import GPTConfig
from engine.models.gpt2 import GPT2Config
from engine.models.llama import LlamaConfig, RotaryScaling

Fields = dict[str, Any]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


def load_huggingface(folder: Path, file: Path | None = None) -> LoadedModel:
    """The model of a folder, or of one .safetensors file with config.json beside it.

    ValueError for a folder without weights, a network this engine does not have, and tensors that are
    missing, cut or foreign.
    """
    fields = read_json(folder / CONFIG)
    config = config_of(fields, folder / CONFIG)
    stored = read_safetensors(file) if file else read_shards(folder)
    layout = layout_of(config)
    known = next(iter(layout.values())).names[0]
    if known not in stored and known.split(".", 1)[1] in stored:  # saved without its head: names lack the prefix
        prefix = known.split(".", 1)[0]
        stored = {name if name == "lm_head.weight" else f"{prefix}.{name}": tensor for name, tensor in stored.items()}
    weights = join(stored, layout, shapes_of(config), file or folder, lambda name: _is_buffer(name, config))
    return LoadedModel(str(folder), config, weights)


def _is_buffer(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor is none of the network's parameters: masks and tables of older files, a tied head."""
    tied = getattr(config, "tied", False) and name.endswith("lm_head.weight")
    return tied or name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))


def read_shards(folder: Path) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the files that its index names."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}: save the model as safetensors "
            f"(`save_pretrained`), or give another folder"
        )
    placed = read_json(folder / INDEX).get("weight_map", {})
    stored: dict[str, Stored] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).is_file():
            first = next(name for name, place in placed.items() if place == shard)
            raise ValueError(f"{folder} lacks {shard}, which holds tensor {first}: fetch it again")
        stored |= read_safetensors(folder / shard)
    return stored


def read_json(file: Path) -> Fields:
    """The object in a JSON file; ValueError where there is none."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the folder of a whole checkpoint")
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a JSON {type(fields).__name__}, expected an object: fetch it again")
    return fields


class _Fields:
    """A configuration's fields, with one line for a user where one is missing or unexpected."""

    def __init__(self, fields: Fields, file: Path):
        self.fields, self.file = fields, file

    def get(self, name: str) -> Any:
        if self.fields.get(name) is None:
            raise ValueError(f"{self.file} lacks {name}: give a whole checkpoint")
        return self.fields[name]

    def only(self, name: str, *allowed: Any) -> None:
        """ValueError unless the field is missing or one of the allowed."""
        value = self.fields.get(name, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.file} has {name} {value!r}, expected {expected}: this engine has no other")


def config_of(fields: Fields, file: Path) -> ModelConfig:
    """Our configuration of a `transformers` configuration; ValueError for a network we do not have."""
    kind = str(fields.get("model_type"))
    makers: dict[str, Callable[[_Fields], ModelConfig]] = {
        "llama": _llama,
        "qwen2": _llama,
        "qwen3": _llama,
        "gpt2": _gpt2,
        "nanochat": _nanochat,
    }
    if kind not in makers:
        raise ValueError(f"{file} has model_type {kind!r}, expected {', '.join(makers)}: give another checkpoint")
    return makers[kind](_Fields(fields, file))


def _llama(fields: _Fields) -> LlamaConfig:
    given, kind = fields.fields, fields.get("model_type")
    fields.only("hidden_act", "silu")
    fields.only("mlp_bias", False)
    if given.get("use_sliding_window"):
        window, rows = fields.get("sliding_window"), fields.get("max_position_embeddings")
        if window < rows:
            raise ValueError(f"{fields.file} has sliding windows of {window}, expected none: give another checkpoint")
    biased = kind == "qwen2" or bool(given.get("attention_bias"))
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    base, scaling = _rotary(fields)
    head_dim = given.get("head_dim") or (128 if kind == "qwen3" else width // heads)
    return LlamaConfig(
        depth=fields.get("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=given.get("num_key_value_heads") or heads,
        mlp_width=fields.get("intermediate_size"),
        context=fields.get("max_position_embeddings"),
        vocabulary=fields.get("vocab_size"),
        rotary_base=base,
        norm_eps=given.get("rms_norm_eps", 1e-6),
        tied=bool(given.get("tie_word_embeddings", False)),
        head_size=None if head_dim * heads == width else head_dim,
        qkv_bias=biased,
        output_bias=biased and kind != "qwen2",
        qk_norm=kind == "qwen3",
        rotary_scaling=scaling,
    )


def _rotary(fields: _Fields) -> tuple[float, RotaryScaling | None]:
    """Base and stretch; `rope_parameters` holds both since transformers 5."""
    given = fields.fields
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or given.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ValueError(f"{fields.file} has rope type {kind!r}, expected default or llama3: give another checkpoint")
    rope = _Fields(rope, fields.file)
    return base, RotaryScaling(
        rope.get("factor"),
        rope.get("low_freq_factor"),
        rope.get("high_freq_factor"),
        rope.get("original_max_position_embeddings"),
    )


def _gpt2(fields: _Fields) -> GPT2Config:
    fields.only("activation_function", *GELU_TANH)
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    width = fields.get("n_embd")
    return GPT2Config(
        depth=fields.get("n_layer"),
        width=width,
        heads=fields.get("n_head"),
        mlp_width=fields.fields.get("n_inner") or 4 * width,
        context=fields.get("n_positions"),
        vocabulary=fields.get("vocab_size"),
        norm_eps=fields.fields.get("layer_norm_epsilon", 1e-5),
        tied=bool(fields.fields.get("tie_word_embeddings", True)),
    )


def _nanochat(fields: _Fields) -> GPTConfig:
    fields.only("hidden_act", "relu2")
    fields.only("attention_bias", False)
    fields.only("tie_word_embeddings", False)
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    hidden = fields.get("intermediate_size")
    base, scaling = _rotary(fields)
    if scaling is not None:
        raise ValueError(f"{fields.file} has a rope type for nanochat, expected default: give another checkpoint")
    return GPTConfig(
        depth=fields.get("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=fields.fields.get("num_key_value_heads") or heads,
        context=fields.get("max_position_embeddings"),
        vocabulary=fields.get("vocab_size"),
        softcap=fields.fields.get("final_logit_softcapping") or 0.0,
        mlp_units=0 if hidden == 4 * width else hidden,
        norm_eps=fields.fields.get("rms_norm_eps", 1e-6),
        rotary_base=base,
        rotary_reversed=True,
    )


def fields_of(config: ModelConfig) -> Fields | None:
    """The `transformers` configuration of a network, None where it has no class with the same logits."""
    if isinstance(config, GPT2Config):
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": config.depth,
            "n_embd": config.width,
            "n_head": config.heads,
            "n_inner": config.mlp_width,
            "n_positions": config.context,
            "vocab_size": config.vocabulary,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied,
        }
    common = {
        "num_hidden_layers": config.depth,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "vocab_size": config.vocabulary,
        "rms_norm_eps": config.norm_eps,
    }
    rope: Fields = {"rope_type": "default", "rope_theta": config.rotary_base}
    if isinstance(config, GPTConfig):
        windows = any(config.window(layer) is not None for layer in range(config.depth))
        later = windows or config.lambdas or config.value_gate or config.smear or config.qk_scale != 1.0
        if later or config.rotary_rounded:
            return None
        named = {"architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "tie_word_embeddings": False}
        softcap = config.softcap or None
        return (
            named
            | common
            | {"final_logit_softcapping": softcap, "rope_theta": config.rotary_base, "rope_parameters": rope}
        )
    if config.rotary_scaling is not None:
        scaling = config.rotary_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_factor,
            "high_freq_factor": scaling.high_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if config.qk_norm and config.qkv_bias != config.output_bias:
        return None
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.output_bias else "llama"
    if kind == "qwen2" and config.head_size is not None:
        return None
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [classes[kind]],
        "model_type": kind,
        **common,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.output_bias,
        "rope_theta": config.rotary_base,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
    }


def layout_of(config: ModelConfig) -> Layout:
    """Which tensors of `transformers` our parameters are."""
    if isinstance(config, GPT2Config):
        return _gpt2_layout(config)
    layout = {"embedding.weight": Source(("model.embed_tokens.weight",))}
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
    rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    reversed_ = isinstance(config, GPTConfig) and not config.rotary_reversed
    for index in range(config.depth):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        projections = [f"{theirs}.self_attn.{letter}_proj" for letter in "qkv"]
        layout[f"{ours}.attention.qkv"] = Source(
            tuple(f"{name}.weight" for name in projections),
            rows,
            swapped=(head_dim, head_dim, 0) if reversed_ else (),
        )
        layout[f"{ours}.attention.output"] = Source((f"{theirs}.self_attn.o_proj.weight",))
        if isinstance(config, GPTConfig):
            layout[f"{ours}.mlp.up"] = Source((f"{theirs}.mlp.fc1.weight",))
            layout[f"{ours}.mlp.down"] = Source((f"{theirs}.mlp.fc2.weight",))
            continue
        layout[f"{ours}.attention.norm"] = Source((f"{theirs}.input_layernorm.weight",))
        if config.qkv_bias:
            layout[f"{ours}.attention.qkv_bias"] = Source(tuple(f"{name}.bias" for name in projections), rows)
        if config.output_bias:
            layout[f"{ours}.attention.output_bias"] = Source((f"{theirs}.self_attn.o_proj.bias",))
        if config.qk_norm:
            layout[f"{ours}.attention.q_norm"] = Source((f"{theirs}.self_attn.q_norm.weight",))
            layout[f"{ours}.attention.k_norm"] = Source((f"{theirs}.self_attn.k_norm.weight",))
        layout[f"{ours}.mlp.norm"] = Source((f"{theirs}.post_attention_layernorm.weight",))
        gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        layout[f"{ours}.mlp.gate_up"] = Source(gate_up, (config.mlp_width, config.mlp_width))
        layout[f"{ours}.mlp.down"] = Source((f"{theirs}.mlp.down_proj.weight",))
    if isinstance(config, LlamaConfig):
        layout["final_norm"] = Source(("model.norm.weight",))
    if not getattr(config, "tied", False):
        layout["unembedding.weight"] = Source(("lm_head.weight",))
    return layout


def _gpt2_layout(config: GPT2Config) -> Layout:
    """GPT-2 keeps its matrices as [in, out]."""
    layout = {
        "embedding.weight": Source(("transformer.wte.weight",)),
        "positions.weight": Source(("transformer.wpe.weight",)),
        "final_norm": Source(("transformer.ln_f.weight",)),
        "final_norm_bias": Source(("transformer.ln_f.bias",)),
    }
    for index in range(config.depth):
        for ours, theirs in (
            ("attention.norm", "ln_1"),
            ("attention.qkv", "attn.c_attn"),
            ("attention.output", "attn.c_proj"),
            ("mlp.norm", "ln_2"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            name = f"transformer.h.{index}.{theirs}"
            is_matrix = not theirs.startswith("ln")
            layout[f"layers.{index}.{ours}"] = Source((f"{name}.weight",), transposed=is_matrix)
            layout[f"layers.{index}.{ours}_bias"] = Source((f"{name}.bias",))
    if not config.tied:
        layout["unembedding.weight"] = Source(("lm_head.weight",))
    return layout
