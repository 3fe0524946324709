"""Documents to token ids. No torch."""

from __future__ import annotations

from typing import Any

from ..errors import BadInput, one_line
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
            ids = self._chat(content, document.key)
        return ids if ids[-1:] == self.end else ids + self.end

    def _chat(self, messages: list[dict[str, Any]], key: str) -> list[int]:
        """
        Raises:
            BadInput: the tokenizer has no chat template, or its template does not take these messages.
        """
        from jinja2 import TemplateError

        if not getattr(self.tokenizer, "chat_template", None):
            raise BadInput(f"{key} holds chat messages, but the model's tokenizer has no chat template; give plain text, "
                           "or a model that was made for chat")  # fmt: skip
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        except (TemplateError, TypeError, KeyError) as error:
            raise BadInput(
                f"{key}: the tokenizer's chat template does not take these messages: {one_line(error)}"
            ) from error
