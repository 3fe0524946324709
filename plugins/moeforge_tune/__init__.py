"""The verb `tune`: continue training a causal language model, dense or mixture."""
