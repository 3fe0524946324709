"""Adapters of LoRA experts in the forms of other programs: one format a file, what it can hold and what it calls things."""
