"""The operators: batched optimal transport and biased attention. One folder each: api -> op -> backends -> kernels."""
