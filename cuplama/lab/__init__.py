"""The lab: is a kernel right, how fast is it beside what the machine can do, and how fast is a whole model.

workloads, check, emulation: an op at a shape, and the judge of its result; timing, peaks, alternatives, kernel_bench,
compare, roofline: kernels alone; trials, bench, cold_start, perplexity: whole models; inventory: every kernel instance,
compiled without a GPU; dummy, random_weights: models without a checkpoint; environment, report: how it is written down.
"""
