"""Sequences of token ids in, drawn tokens out: scheduler, runner, sampler, page cache, captured graphs, memory plan."""
