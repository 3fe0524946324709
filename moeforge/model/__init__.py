"""Running checkpoints: load whole, stream layer by layer, prove equality. The only core package that needs torch."""
