"""Documents to token ids: what a chat needs of its tokenizer."""

import pytest

from moeforge.errors import BadInput
from moeforge.testing.models import tiny_tokenizer
from moeforge.train.data import Document
from moeforge.train.encoding import Encoder

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_a_chat_goes_through_the_template_and_ends_like_any_text():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = Encoder(tokenizer)(Document("d.jsonl:1", 9, lambda: CHAT))
    assert tokenizer.decode(ids[:-1]) == "<user>hi<assistant>ho"
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "said"), [(None, "no chat template"), ("{{ raise_exception('odd roles') }}", "odd roles")]
)
def test_what_has_no_template_or_does_not_fit_it_is_named(template, said):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=rf"d\.jsonl:1.*{said}"):
        Encoder(tokenizer)(Document("d.jsonl:1", 9, lambda: CHAT))
