import json

import pytest

TINY = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


@pytest.fixture
def model_directory(tmp_path):
    """A function that creates the directory of a tiny Qwen2, with its config.json and an empty file of weights.

    Its keyword arguments change keys of config.json; None leaves a key out.
    """

    def make(**changes):
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        config = {key: value for key, value in (TINY | changes).items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "model.safetensors").touch()
        return directory

    return make
