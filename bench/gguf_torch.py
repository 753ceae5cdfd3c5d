#!/usr/bin/env python3
"""A llama model from a GGUF file in PyTorch, dequantised to float32, and its perplexity.

gguf_torch.py FILE --text TEXT [--window N] [--threads N]

Scores a text exactly as `fleetune-node eval` does: documents are separated by <|endoftext|>, which
opens and ends each; windows of N tokens do not overlap; the first token of a window is only read.
Needs torch, transformers, tokenizers and gguf from PyPI. Prints one JSON object.
"""
import argparse
import json
import pathlib
import time

import gguf
import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MARK = "<|endoftext|>"
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}


def field(reader: gguf.GGUFReader, name: str):
    return reader.fields[name].contents()


def config_of(reader: gguf.GGUFReader) -> LlamaConfig:
    def f(name):
        return field(reader, "llama." + name)
    return LlamaConfig(vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
                       hidden_size=f("embedding_length"),
                       intermediate_size=f("feed_forward_length"),
                       num_hidden_layers=f("block_count"),
                       num_attention_heads=f("attention.head_count"),
                       num_key_value_heads=f("attention.head_count_kv"),
                       max_position_embeddings=f("context_length"), rope_theta=f("rope.freq_base"),
                       rms_norm_eps=f("attention.layer_norm_rms_epsilon"),
                       tie_word_embeddings=True, use_cache=False)


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of rotated rows; transformers has one after the other."""
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights_of(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    state = {}
    for t in reader.tensors:
        w = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        part = t.name.split(".")
        if part[0] == "blk":
            if part[2] == "attn_q":
                w = halves(w, config.num_attention_heads)
            if part[2] == "attn_k":
                w = halves(w, config.num_key_value_heads)
            name = f"model.layers.{part[1]}.{NAMES[part[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight",
                    "output": "lm_head.weight"}[part[0]]
        state[name] = torch.from_numpy(np.ascontiguousarray(w))
    return state


def load_model(path: str) -> LlamaForCausalLM:
    reader = gguf.GGUFReader(path)
    config = config_of(reader)
    model = LlamaForCausalLM(config).to(torch.float32)
    state = weights_of(reader, config)
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unknown = model.load_state_dict(state, strict=False)
    if missing or unknown:
        raise SystemExit(f"{path}: no tensor for {missing}, no place for {unknown}")
    return model.eval()


def load_tokenizer(path: str) -> tokenizers.Tokenizer:
    """SmolLM2's: byte-level BPE, digits one by one."""
    reader = gguf.GGUFReader(path)
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
    known = {t: i for i, t in enumerate(tokens)}
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=known, merges=merges))
    pre = tokenizers.pre_tokenizers
    t.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True),
                                    pre.ByteLevel(add_prefix_space=False, use_regex=True)])
    return t


def documents(tokenizer: tokenizers.Tokenizer, path: str) -> list[list[int]]:
    between = tokenizer.token_to_id(MARK)
    texts = [d.strip(" \t\r\n") for d in pathlib.Path(path).read_bytes().decode().split(MARK)]
    return [[between, *tokenizer.encode(d).ids, between] for d in texts if d]


@torch.no_grad()
def score(model, docs: list[list[int]], window: int) -> tuple[float, int]:
    """Mean nats a token, and tokens scored."""
    total, count = 0.0, 0
    for doc in docs:
        for at in range(0, len(doc), window):
            ids = doc[at:at + window]
            if len(ids) < 2:
                continue
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]),
                                                             reduction="sum"))
            count += len(ids) - 1
    return total / count, count


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("--text", required=True)
    p.add_argument("--window", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    model = load_model(o.file)
    start = time.perf_counter()
    nll, tokens = score(model, documents(load_tokenizer(o.file), o.text), o.window)
    print(json.dumps({"tokens": tokens, "nll": nll, "perplexity": float(np.exp(nll)),
                      "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
