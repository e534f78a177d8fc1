"""Models that `wrap` must refuse, and the text decoders inside of some of them, which it takes."""

from typing import Any

import pytest
import torch
import transformers
from families import EXPERTS, HEADS, LATENT, SIZES, SLIDING
from transformers import AutoModelForCausalLM, PreTrainedModel

IGNORES = "which ignores it; use a model that supports attn_implementation"
STATE = "linear_attention, which carries state from one document into the next"
CONVOLUTION = "conv, which carries state from one document into the next"
INDEXER = "whose indexer picks keys from the whole row"
UNKNOWN = "which no document mask reaches"
COUNTS = "which counts positions over the row by itself"
BOTH_WAYS = "must attend causally, got "
KEEPS_IDS = "must keep documents apart"

OLD_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DECODER_SIZES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_state": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "mamba_dt_rank": 4, "ssm_state_size": 4, "n_groups": 1,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# Decoders by name: the config's class, its options, and what the message says.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    # Their attention asks no interface.
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, IGNORES),
    "codegen": ("CodeGenConfig", {**OLD_SIZES, "rotary_dim": 4}, IGNORES),
    "doge": ("DogeConfig", {}, IGNORES),
    "falcon": ("FalconConfig", {}, IGNORES),
    "gpt_neo": (
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
        IGNORES,
    ),
    "gptj": ("GPTJConfig", {**OLD_SIZES, "rotary_dim": 4}, IGNORES),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}, IGNORES),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32}, IGNORES),
    "xglm": ("XGLMConfig", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, IGNORES),
    "xlstm": ("xLSTMConfig", {"num_heads": 4, "qk_dim_factor": 0.5}, IGNORES),
    # State that passes attention by.
    "bailing_hybrid": ("BailingHybridConfig", {**LATENT, **EXPERTS}, STATE),
    "bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1]}, STATE),
    "falcon_h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8}, f"hybrid, {UNKNOWN}"),
    "falcon_mamba": ("FalconMambaConfig", MAMBA, STATE),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {**MAMBA, **EXPERTS, "layer_types": ["mamba", "attention"]}, STATE),
    "jamba": ("JambaConfig", {**MAMBA, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}, STATE),
    "kimi_linear": ("KimiLinearConfig", {**HEADS, **EXPERTS, "num_key_value_heads": 4}, STATE),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, CONVOLUTION),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        CONVOLUTION,
    ),
    "mamba": ("MambaConfig", {"state_size": 4}, STATE),
    "mamba2": ("Mamba2Config", {"num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1}, STATE),
    "minimax": ("MiniMaxConfig", {**HEADS, **EXPERTS}, STATE),
    "nemotron_h": ("NemotronHConfig", {**HEADS, **EXPERTS, **MAMBA}, STATE),
    "olmo_hybrid": ("OlmoHybridConfig", {"layer_types": ["linear_attention", "full_attention"]}, STATE),
    "qwen3_5_text": ("Qwen3_5TextConfig", {**HEADS, **DELTA}, STATE),
    "qwen3_next": ("Qwen3NextConfig", {**HEADS, **EXPERTS, **DELTA}, STATE),
    # Since transformers 5.23 for its state, in 5.17 for ignoring the interface.
    "recurrent_gemma": ("RecurrentGemmaConfig", HEADS, "got RecurrentGemmaForCausalLM"),
    "zamba2": (
        "Zamba2Config",
        {"layers_block_type": ["hybrid", "mamba"], "mamba_d_state": 4, "n_mamba_heads": 4, "mamba_ngroups": 1},
        STATE,
    ),
    # Keys that are chosen in another way.
    "deepseek_v32": ("DeepseekV32Config", {**LATENT, **EXPERTS}, INDEXER),
    "deepseek_v4": ("DeepseekV4Config", {**HEADS, **EXPERTS}, f"heavily_compressed_attention, {UNKNOWN}"),
    "glm_moe_dsa": ("GlmMoeDsaConfig", {**LATENT, **EXPERTS}, INDEXER),
    "llama4_text": (
        "Llama4TextConfig",
        {**HEADS, **EXPERTS, "attention_chunk_size": 4, "intermediate_size_mlp": 32},
        "chunked_attention, whose chunks only transformers' own masks know",
    ),
    # Windows that only the mask knows.
    "phimoe": (
        "PhimoeConfig",
        {**EXPERTS, **SLIDING},
        "must hand its attention window to the attention function, got sliding_window=None beside a mask of local size",
    ),
    # Their layers keep the model's keywords to themselves: every document id would be lost on the way.
    "nemotron": ("NemotronConfig", {}, KEEPS_IDS),
    "stablelm": ("StableLmConfig", {}, KEEPS_IDS),
    # Decoders of encoder-decoders take no position_ids.
    "bart": ("BartConfig", DECODER_SIZES, COUNTS),
    "marian": ("MarianConfig", DECODER_SIZES, COUNTS),
    "mbart": ("MBartConfig", DECODER_SIZES, COUNTS),
    "pegasus": ("PegasusConfig", DECODER_SIZES, COUNTS),
    # Encoders.
    "bert": ("BertConfig", {}, BOTH_WAYS),
    "roberta": ("RobertaConfig", {}, BOTH_WAYS),
}

# Other models, as they come, without weights: what they are refused for comes before.
WITH_AN_ENCODER = "must be a decoder, got "
OTHER_INPUTS = "with other inputs; wrap its text decoder by itself"
OTHERS = {
    "BartForConditionalGeneration": WITH_AN_ENCODER,
    "T5ForConditionalGeneration": WITH_AN_ENCODER,
    "WhisperForConditionalGeneration": WITH_AN_ENCODER,
    "Florence2ForConditionalGeneration": WITH_AN_ENCODER,
    "FuyuForCausalLM": OTHER_INPUTS,
    "Gemma3ForConditionalGeneration": OTHER_INPUTS,
    "Gemma4ForConditionalGeneration": OTHER_INPUTS,
    "GitForCausalLM": OTHER_INPUTS,
    "Glm4vForConditionalGeneration": OTHER_INPUTS,
    "InternVLForConditionalGeneration": OTHER_INPUTS,
    "Llama4ForConditionalGeneration": OTHER_INPUTS,
    "LlavaForConditionalGeneration": OTHER_INPUTS,
    "Mistral3ForConditionalGeneration": OTHER_INPUTS,
    "MllamaForConditionalGeneration": OTHER_INPUTS,
    "PaliGemmaForConditionalGeneration": OTHER_INPUTS,
    "Phi4MultimodalForCausalLM": OTHER_INPUTS,
    "Qwen2AudioForConditionalGeneration": OTHER_INPUTS,
    "Qwen2VLForConditionalGeneration": OTHER_INPUTS,
    "Qwen2_5_VLForConditionalGeneration": OTHER_INPUTS,
    "Qwen3VLForConditionalGeneration": OTHER_INPUTS,
    "VoxtralForConditionalGeneration": OTHER_INPUTS,
    "Wav2Vec2ForCTC": "must read text, got Wav2Vec2ForCTC, which reads audio",
}

IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES |= {"image_size": 16, "patch_size": 8}
THREE_POSITIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
# Models with images whose text decoder can be wrapped by itself: options of the config of each part.
WITH_A_DECODER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ({**HEADS, **SLIDING}, IMAGES),
    "Idefics3": ({"model_type": "llama"}, IMAGES),
    "InternVL": ({"model_type": "qwen2"}, {**IMAGES, "image_size": [16, 16], "patch_size": [8, 8]}),
    "Llava": ({"model_type": "llama"}, {**IMAGES, "model_type": "clip_vision_model"}),
    "Mistral3": ({**HEADS, "model_type": "mistral", "sliding_window": 4}, {**IMAGES, "model_type": "pixtral"}),
    "Qwen2VL": (
        {"rope_parameters": THREE_POSITIONS},
        {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 8},
    ),
    "Qwen3VL": (
        {**HEADS, "rope_parameters": THREE_POSITIONS},
        {
            "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16,
            "patch_size": 8, "deepstack_visual_indexes": [0],
        },
    ),
}  # fmt: skip


def of_transformers(name: str) -> Any:
    """A class by its name; the test skips itself where transformers has none."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def refused_model(name: str) -> PreTrainedModel:
    """A tiny decoder that `wrap` refuses."""
    config, options, _ = REFUSED[name]
    sizes = {key: size for key, size in SIZES.items() if key not in ("num_hidden_layers", "num_attention_heads")}
    layers = {} if config == "GPTNeoConfig" else {"num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(of_transformers(config)(**{**sizes, **layers, **options})).eval()


def other_model(name: str) -> PreTrainedModel:
    """A model of another kind in its own sizes, on the meta device."""
    model_class = of_transformers(name)
    with torch.device("meta"):
        return model_class(model_class.config_class())


def model_with_images(name: str) -> PreTrainedModel:
    """A tiny model with images around a text decoder, in float64."""
    text, images = WITH_A_DECODER[name]
    config = of_transformers(f"{name}Config")(text_config={**SIZES, **text}, vision_config=images)
    torch.manual_seed(0)
    return of_transformers(f"{name}ForConditionalGeneration")(config).double().eval()
