import pytest

from mindrlhf.data.tokenizers import build_tokenizer, load_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    """260 ids known by heart: printable ASCII c is ord(c) - 33, space 220, line end 198, "ab" 256, specials 257-259."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "corpus.txt").write_text("ab ab ab", encoding="utf-8")
    build_tokenizer([directory / "corpus.txt"], 260, directory, CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)


@pytest.fixture
def plain_tokenizer(tokenizer_directory):
    """The same, without a chat template."""
    tokenizer = load_tokenizer(tokenizer_directory)
    tokenizer.chat_template = None
    return tokenizer
