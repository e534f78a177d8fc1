"""Whether an anchor reduces the drift.

measure   the same query and key under full, intra-document and anchor attention
meter     sums of some heads of one row, pair by pair
report    what each pattern has, how patterns compare, and the answer
"""
