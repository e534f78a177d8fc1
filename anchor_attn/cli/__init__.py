"""The command line: the roof, from which alone all rooms are seen; every command imports what it needs."""

from anchor_attn.cli.main import main as main
