"""Make logits.npz and frequencies.json with HF transformers: the oracle of tests/models/test_hf_parity.py.

Run it in an environment of its own (made with torch 2.13.0 on CPU and transformers 5.23.0):

    pip install torch transformers numpy && python tests/golden/hf/make.py
"""

import copy
import json
from pathlib import Path

import cases
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from weights import tokens, weight

HERE = Path(__file__).parent


def tiny_model(config: dict) -> torch.nn.Module:
    """The HF model of a 4.x-style config, its weights drawn by name."""
    fields = {key: copy.deepcopy(value) for key, value in config.items() if key != "model_type"}  # HF writes into them
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **fields), attn_implementation="eager"
    )
    offset = 1.0 if config["model_type"].startswith("gemma") else 0.0
    state = model.state_dict()
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    drawn = {
        name: torch.from_numpy(weight(name, tuple(value.shape), offset))
        for name, value in state.items()
        if name not in tied
    }
    missing, unexpected = model.load_state_dict(drawn, strict=False)
    assert set(missing) <= tied, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model.eval().float()


@torch.no_grad()
def main() -> None:
    """Write the golden files beside this script."""
    arrays, described = {}, {}
    for name, config in cases.CASES.items():
        for length in (cases.SHORT, cases.LONG):
            model = tiny_model(config)
            ids = torch.from_numpy(tokens(length, config["vocab_size"])).long()
            arrays[f"{name}.{length}"] = model(ids).logits[0].numpy()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            shapes.pop("lm_head.weight")
        saved = json.loads(model.config.to_json_string())
        described[name] = {"config": saved, "shapes": shapes}
    np.savez_compressed(HERE / "logits.npz", **{key: value.astype(np.float32) for key, value in arrays.items()})
    (HERE / "models.json").write_text(json.dumps(described, indent=None) + "\n")
    rows = []
    for parameters, head_dim, max_length, length in cases.FREQUENCIES:
        config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            max_position_embeddings=max_length,
            rope_parameters=dict(parameters),
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
        rows.append({"frequencies": frequencies.tolist(), "factor": float(factor)})
    (HERE / "frequencies.json").write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
