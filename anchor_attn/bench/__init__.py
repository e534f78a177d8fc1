"""Benchmarks: ratios against named rivals on the same input, in one run, after a parity check in that run.

timing      rivals in turn, round by round, within a budget of seconds
parity      rivals against the float64 reference, by the budget of the tests
memory      what a device has left, and what a call takes at its peak
attention   forward, backward and both, over lengths and distributions
routes      every route of a call that this machine has, and the table of the choice between them
step        a training step
rope        perplexity under every extension method, of a model trained for it; of its rope_readings, rope_findings
            says what they show and rope_report draws them
masks       block masks, against torch's builder
report      pictures and Markdown of the records
"""
