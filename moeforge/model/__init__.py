"""Running checkpoints: load whole, stream layer by layer, prove equality; put mixtures into models.

build, weights, load     a config -> a model without weights; which tensors make which parameters; both together
sites, formulas          where a mixture can stand, found by structure; what the network there computes
mixing                   replace modules by mixtures, tell routers which tokens are real
layout                   what the tensors of mixtures are called on disk
config, runtime          a checkpoint of type `moeforge`; its classes
merged_experts           an adapter of LoRA experts as the dense checkpoint that it is under constant weights
adapters, joining        an adapter of LoRA experts beside its base; many beside one, each for its rows of a batch
streaming, proof         one layer in memory at a time; is it the same function?
kernels                  transformers' own mixtures on our kernels
"""
