"""The protocol of the paper that said it first, and what becomes of its claims.

measure   D and D_logit of many sequences
report    records, profiles by key, and samples by sequence
claims    which of the paper's claims are found
page      tables, pictures and paper.html

Source: https://arxiv.org/abs/2411.13476, Eq 4, Eq 5 and figure 1.
"""
