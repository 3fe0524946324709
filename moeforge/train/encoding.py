"""Documents to token ids. No torch."""

from __future__ import annotations

from typing import Any

from .data import Document


class Encoder:
    """Text with the tokenizer's own start token, messages through its chat template, and an end-of-text token behind each."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def __call__(self, document: Document) -> list[int]:
        content = document.read()
        if isinstance(content, str):
            ids = self.tokenizer(content, verbose=False)["input_ids"]
        else:
            ids = self.tokenizer.apply_chat_template(content, tokenize=True, return_dict=True)["input_ids"]
        return ids if ids[-1:] == self.end else ids + self.end
