"""AnchorAttention for packed long-context training."""
