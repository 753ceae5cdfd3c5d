#!/usr/bin/env python3
"""One run of LoRA tuning with PyTorch and PEFT for bench/peer_loss.py: held-out loss after N steps.

peer_torch_loss.py --gguf FILE --train TEXT --held TEXT --lr RATE --state FILE [--seconds S] ...

The model's weights come from a GGUF file, dequantised. Batches hold the same pieces that
`fleetune-node tune` makes: documents cut to --length inputs, packed one after the other, each
seeing only itself. AdamW, linear warm-up over a tenth of the steps, then linear decay to nothing.
After --seconds the run is kept in --state and the program ends with {"done": false}; started again
it goes on. Ends with one JSON object: held-out loss before and after.
"""
import argparse
import json
import pathlib
import resource
import time

import torch
from peft import LoraConfig, get_peft_model

import gguf_torch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pieces(docs: list[list[int]], length: int, seed: int) -> list[list[int]]:
    cut = [doc[at:at + length + 1] for doc in docs for at in range(0, len(doc) - 1, length)]
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed)).tolist()
    return [cut[i] for i in order]


def rows_of(cut: list[list[int]], length: int):
    """Endless rows of exactly `length` inputs: ids, targets, positions, and whose token each is."""
    at = 0
    while True:
        ids, targets, positions, owner = [], [], [], []
        while len(ids) < length:
            piece = cut[at % len(cut)][:length - len(ids) + 1]
            owner += [at] * (len(piece) - 1)
            ids += piece[:-1]
            targets += piece[1:]
            positions += range(len(piece) - 1)
            at += 1
        yield ids, targets, positions, owner


def batch_of(rows, count: int, dtype: torch.dtype):
    taken = [next(rows) for _ in range(count)]
    ids, targets, positions, owner = (torch.tensor(x) for x in zip(*taken))
    n = ids.shape[1]
    seen = (owner[:, :, None] == owner[:, None, :]) & torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return ids, targets, positions, mask[:, None]


def rate_at(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(1, steps - warmup)


def adapted(model, rank: int):
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS))


def trained(model) -> list[torch.nn.Parameter]:
    return [w for w in model.parameters() if w.requires_grad]


def train(o: argparse.Namespace, docs: list[list[int]]) -> dict | None:
    """The adapter after all steps, or None when time ran out first."""
    start = time.monotonic()
    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    torch.manual_seed(o.seed)
    model = adapted(gguf_torch.load_model(o.gguf).to(dtype), o.rank)  # adapters stay in float32
    model.train()
    optimizer = torch.optim.AdamW(trained(model), lr=o.lr, weight_decay=o.decay)
    rows = rows_of(pieces(docs, o.length, o.seed), o.length)
    kept, step = pathlib.Path(o.state), 0
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        step = saved["step"]
        with torch.no_grad():
            for w, v in zip(trained(model), saved["weights"]):
                w.copy_(v)
        optimizer.load_state_dict(saved["optimizer"])
        for _ in range(step * o.batch):
            next(rows)
    while step < o.steps:
        ids, targets, positions, mask = batch_of(rows, o.batch, dtype)
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = o.lr * rate_at(step, o.steps, max(1, o.steps // 10))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step < o.steps and time.monotonic() - start > o.seconds:
            torch.save({"step": step, "weights": [w.detach() for w in trained(model)],
                        "optimizer": optimizer.state_dict()}, kept)
            return None
    return {n: w.detach() for n, w in model.named_parameters() if w.requires_grad}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", required=True)
    p.add_argument("--train", required=True)
    p.add_argument("--held", required=True)
    p.add_argument("--state", required=True)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--decay", type=float, default=0.0)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=1e9)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    tokenizer = gguf_torch.load_tokenizer(o.gguf)
    held = gguf_torch.documents(tokenizer, o.held)
    if o.steps == 0:
        nll, tokens = gguf_torch.score(gguf_torch.load_model(o.gguf), held, o.length)
        print(json.dumps({"done": True, "nll": nll, "tokens": tokens}))
        return
    adapter = train(o, gguf_torch.documents(tokenizer, o.train))
    if adapter is None:
        print(json.dumps({"done": False}))
        return
    model = adapted(gguf_torch.load_model(o.gguf), o.rank)  # scored in float32
    model.load_state_dict(adapter, strict=False)
    nll, tokens = gguf_torch.score(model.eval(), held, o.length)
    pathlib.Path(o.state).unlink(missing_ok=True)
    print(json.dumps({"done": True, "nll": nll, "tokens": tokens, "peak_rss_bytes":
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
