"""LongRoPE's search: factors for each pair, and n̂, by evolution.

evolution     individuals, mutation and crossover; no model
fitness       frequencies on trial in a model, perplexity, needles
inputs        sequences and configs, checked and hashed
setup         what is searched, and where it starts: PI, NTK, YaRN
files         the result, and the state that a killed search goes on from
loop          `search_factors`
progressive   the paper's way to two million tokens

Source: https://arxiv.org/abs/2402.13753, section 3.2; needles, https://arxiv.org/abs/2502.20082
"""

from anchor_attn.rope.search.files import SearchResult as SearchResult
from anchor_attn.rope.search.loop import search_factors as search_factors
from anchor_attn.rope.search.progressive import PROGRESSIVE as PROGRESSIVE
from anchor_attn.rope.search.progressive import Leg as Leg
