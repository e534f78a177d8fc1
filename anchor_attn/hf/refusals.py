"""Refusals by name: models whose config or class already says that documents cannot be kept apart."""

from transformers import PreTrainedConfig, PreTrainedModel

SOFTMAX_LAYERS = {"full_attention", "sliding_attention"}
OTHER_LAYERS = {
    "chunked_attention": "whose chunks only transformers' own masks know",
    "indexed_attention": "whose indexer picks keys from the whole row",
    "deepseek_sparse_attention": "whose indexer picks keys from the whole row",  # the same, until transformers 5.17
    "linear_attention": "which carries state from one document into the next",
    "conv": "which carries state from one document into the next",
}


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise for models that say by themselves that documents cannot be kept apart.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model with an encoder, images or sound, layers that are not softmax attention, bidirectional
            attention, or weights that are not here.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; "
            "wrap the decoder itself, before or after torch.compile, DDP or FSDP."
        )
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"model must be a decoder, got {name} with an encoder; wrap a decoder-only model.")
    _refuse_other_inputs(model)
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"model must attend causally, got {name} set to bidirectional; change its config.")
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - SOFTMAX_LAYERS):
        said = ", and ".join(f"{kind}, {OTHER_LAYERS.get(kind, 'which no document mask reaches')}" for kind in others)
        raise ValueError(
            f"model must have only softmax attention layers, got {name} with {said}; "
            "wrap a model of full and sliding attention."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"model must have its weights for the proof, got {name} on meta; wrap after loading.")


def _refuse_other_inputs(model: PreTrainedModel) -> None:
    """Raise for models that see or hear; the text decoder of such a family is one all the same."""
    name, config = type(model).__name__, model.config
    modalities = getattr(model, "input_modalities", None) or "text"
    inputs = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    if "text" not in inputs:
        raise ValueError(f"model must read text, got {name}, which reads {', '.join(inputs)}; wrap a text decoder.")
    in_parts = any(isinstance(value, PreTrainedConfig) for value in vars(config).values())
    if config.get_text_config() is not config or (len(inputs) > 1 and in_parts):
        raise ValueError(
            f"model must be a text decoder, got {name} with other inputs; "
            "wrap its text decoder by itself, as in wrap(model.get_decoder())."
        )
