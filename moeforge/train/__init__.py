"""Continue-training of a causal language model, dense or mixture, on accelerate."""
