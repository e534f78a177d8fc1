"""`python -m anchor_attn` is `anchor-attn`."""

from anchor_attn.cli import main

main()
