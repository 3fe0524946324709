"""Kernels: one folder an op, each with a plain torch reference that defines it.

    routing        scores -> which tokens go to which experts, sorted: a Pairs
    grouped_gemm   one matrix product an expert, over the rows that chose it
    combine        the pairs' answers, weighted and summed for each token
    expert_ffn     the three above fused: a mixture's feed-forward experts, forward and backward
    expert_gemv    the same for a handful of tokens, without sorting

Every op takes `backend=`: `reference` is the truth, `torch` the library's own kernels, `triton` for GPUs, `cpu` compiled for
the processor. Without it the fastest one that fits the tensors is taken (moeforge_kernels.dispatch); backends agree with the
reference to rounding, so the choice never changes a result beyond that.

    from moeforge_kernels.expert_ffn import expert_ffn

Shapes: T tokens, P pairs, D model width, F FFN width, E experts, S slots (experts a token may visit).
"""
