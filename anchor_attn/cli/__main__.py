"""`python -m anchor_attn.cli`, for launchers that start modules: torchrun -m anchor_attn.cli train …"""

from anchor_attn.cli.main import main

main()
