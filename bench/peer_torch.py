#!/usr/bin/env python3
"""Tuning speed of PyTorch with PEFT LoRA on the shapes of SmolLM2-135M, for bench/peers.py.

peer_torch.py [--dtype f32|bf16] [--fast-f32] [--checkpoint] [--threads N] [--steps N] [--rank N]

One step is 4 x 256 tokens, loss on all of them, adapters on all seven linear maps of every layer,
AdamW. Weights are random: speed does not depend on them. Prints one JSON object. Needs torch,
transformers and peft from PyPI.
"""
import argparse
import json
import resource
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH = 4, 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def smollm2() -> LlamaConfig:
    return LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                       num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                       max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
                       use_cache=False)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    p.add_argument("--fast-f32", action="store_true", help="float32 products rounded to bfloat16")
    p.add_argument("--checkpoint", action="store_true")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--rank", type=int, default=8)
    o = p.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(o.threads)
    if o.fast_f32:
        torch.set_float32_matmul_precision("medium")
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = LlamaForCausalLM(smollm2()).to(torch.bfloat16 if o.dtype == "bf16" else torch.float32)
    if o.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=o.rank, lora_alpha=2 * o.rank,
                                             target_modules=LINEARS))
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    rates = []
    for step in range(o.steps + 1):  # the first is warm-up
        ids = torch.randint(0, 49152, (BATCH, LENGTH))
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step > 0:
            rates.append(BATCH * LENGTH / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_second": statistics.median(rates), "peak_rss_bytes": peak,
                      "loaded_rss_bytes": loaded,
                      "torch": torch.__version__, "loss": float(loss.detach())}))


if __name__ == "__main__":
    main()
