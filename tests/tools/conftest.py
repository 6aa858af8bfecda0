import pytest
import tiny

from dcjax.data.arithmetic import build_tokenizer
from dcjax.models import save_hf


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face folder of somebody else's."""
    path = tmp_path_factory.mktemp("models") / "folder"
    save_hf(path, tiny.DENSE, tiny.masters(tiny.DENSE), token_ids={"eos_token_id": 4})
    build_tokenizer().save_pretrained(path)
    return path
