"""What a model of transformers does: its own query and key, all of it at two shifts, and which setting helps.

capture    query and key of every layer before rotation, proven to be the model's
kept       rotary modules that a forward leaves as they were
replay     a layer's own code, run once more under other tables of cos and sin
rotation   what a layer's rotation is, told from what came of it
shifted    hidden states and logits at two shifts, in several dtypes
sinks      the first token's attention, head by head, beside its share of the drift
fix        the drift under each `rope_precision` of `wrap`
"""
