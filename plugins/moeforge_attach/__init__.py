"""The verb `attach`: LoRA experts beside a frozen model; the output is an adapter."""
