"""What a step of training costs, with and without sharing: ablate.py --cost."""
import dataclasses
import json
import math
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import transformers
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

import perl

QWEN_7B = transformers.Qwen2_5_VLConfig(
    text_config=dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                     num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    vision_config=dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584))

def full_rollouts(cfg, shape: list[int], vision, text_id: int, image_id: int) -> list:
    """Rollouts of full length. shape: images, tokens of each, other tokens of the prompt."""
    n_images, tokens, text_tokens = shape
    side = max(k for k in range(1, math.isqrt(tokens) + 1) if tokens % k == 0)
    grid = torch.tensor([[1, 2 * side, 2 * tokens // side]])  # patches, nearest to a square
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    pixels = torch.randn(4 * tokens, width)
    pictures = [perl.Picture(pixels, grid, tokens) for _ in range(n_images)]
    ids = ([text_id] + [image_id] * tokens) * n_images + [text_id] * (text_tokens - n_images)
    rollouts = []
    for _ in range(cfg.n_permutations + 1):
        prompt = perl.Prompt(None, ids, pictures)
        for k in range(cfg.rollouts_per_order):
            response = [text_id] * cfg.max_new_tokens
            rollouts.append(perl.Rollout(prompt, (), "", response, "", truncated=True,
                                         advantage=(-1.0) ** k))
    return rollouts

def count_flops(config, cfg, shape: list[int]) -> tuple[dict, dict]:
    """FLOPs of a step by part, and the least possible: each image and prompt once, and only
    pairs of tokens that see each other."""
    with torch.device("meta"):  # shapes without numbers
        model = perl.FAMILY_MODEL.from_config(config)
    layers = model.model.language_model.layers
    rollouts = full_rollouts(cfg, shape, config.vision_config, 0, 1)
    prompt, P, B = rollouts[0].prompt, cfg.n_permutations + 1, len(rollouts)
    L, T = len(prompt.ids), cfg.max_new_tokens
    token = 2 * sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
    pair = 4 * config.text_config.hidden_size * len(layers)  # a token that sees another
    head = 2 * model.lm_head.weight.numel()                  # the logits of a token

    # The vision tower is counted by torch, the language model by arithmetic.
    pixels = prompt.pictures[0].pixels.to("meta")
    places = torch.empty(len(pixels), 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        features = model.model.visual(pixels, prompt.pictures[0].grid, position_ids=places)
        forward = float(shape[0] * counter.get_total_flops())
        features.pooler_output.sum().backward()
        both = float(shape[0] * counter.get_total_flops())
    batches, vision = perl.micro_batches(rollouts, cfg), B * (forward + both)
    if cfg.share:
        # Once in each call of generate, and in each micro-batch of the loss.
        fit = min(4 * cfg.max_tokens_per_micro_batch // L, cfg.rollout_batch * P // B)
        vision = math.ceil(P / max(fit, 1)) * forward + len(batches) * both

    # Shared: each prompt once, its last token in the first step. Plain: once per rollout.
    reads, seen, steps = (P, L - 1, T) if cfg.share else (B, L, T - 1)
    prefill = float(reads * (token * seen + pair * seen ** 2))
    decode = B * (steps * (token + pair * (seen + (steps + 1) / 2)) + T * head)
    loss = 0.0
    for batch in batches:
        rows = perl.pack(batch, cfg)
        longest = max(map(perl.row_length, rows))
        pairs = len(rows) * longest ** 2
        if len(batch) > len(rows):
            # Packed: a prompt sees itself, a response the prompt and itself.
            pairs = len(rows) * L ** 2 + len(batch) * T * (L + T)
        # Backward takes twice the forward pass; the logits are also made a second time.
        loss += 3 * (len(rows) * longest * token + pairs * pair)
        loss += 4 * len(batch) * T * head
    prompts = P * (token * L + pair * L * (L + 1) / 2)
    responses = B * T * (token + pair * (L + (T + 1) / 2) + head)
    return ({"vision": vision, "prefill": prefill, "decode": decode, "loss": loss},
            {"vision": forward + both, "prefill": prompts, "decode": responses,
             "loss": 3 * (prompts + responses)})

def time_step(cfg, shape: list[int]) -> dict[str, float]:
    """Seconds of sampling and update, and this process's peak memory in MB."""
    transformers.logging.disable_progress_bar()
    accelerator, processor = Accelerator(), perl.load_processor(cfg.model, cfg)
    perl.fit_machine(cfg, accelerator.device)
    # Without end tokens, responses have full length.
    processor.banned_ids += processor.eos_ids
    model = perl.load_model(cfg.model, cfg, accelerator.device)
    text_id, n = processor.tokenizer("a").input_ids[0], cfg.rollouts_per_order
    rollouts = full_rollouts(cfg, shape, model.config.vision_config, text_id, processor.image_id)
    optimizer, began = perl.SplitAdamW(model, cfg, accelerator), time.time()
    prompts = [rollout.prompt for rollout in rollouts[::n]]
    responses = perl.flatten(perl.generate(model, processor, prompts, n, cfg))
    sampled = time.time()
    for rollout, ids in zip(rollouts, responses):
        rollout.ids = ids
    perl.update(model, None, optimizer, processor, [rollouts], cfg=cfg)
    updated, peak = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
    return {"sample": sampled - began, "update": updated - sampled, "peak_mb": peak}

def cost(shape: list[int], perl_flags: list[str]) -> None:
    """Print FLOPs at the model's size (tiny: the 7B's), and seconds and memory here."""
    defaults = ("--max-new-tokens 256 --max-tokens-per-micro-batch 16384 --updates-per-step 1 "
                "--beta 0 --no-gradient-checkpointing --optimizer-device host")
    cfg = perl.parse_config([*defaults.split(), *perl_flags])
    if min(shape) < 1 or shape[2] <= shape[0] or cfg.max_new_tokens < 3:
        raise SystemExit("--cost: images and tokens from 1, more text tokens than images, "
                         "--max-new-tokens from 3")
    config = QWEN_7B
    if cfg.model != "tiny":
        config = perl.load_pretrained(transformers.AutoConfig, cfg.model)
    parts, row = {}, {}  # parts: {"flops_shared": {"vision": .., ..}, ..}
    for way in ("shared", "plain"):
        its_cfg = dataclasses.replace(cfg, share=way == "shared")
        print(f"timing a step, {way}", file=sys.stderr, flush=True)
        # In a fresh process, nothing else has raised the peak memory.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            parts[f"seconds_{way}"] = pool.submit(time_step, its_cfg, shape).result()
        row[f"peak_mb_{way}"] = parts[f"seconds_{way}"].pop("peak_mb")
        parts[f"flops_{way}"], parts["flops_minimum"] = count_flops(config, its_cfg, shape)
    for name, values in parts.items():
        row[name] = sum(values.values())
        for part, value in values.items():
            row[f"{name}_{part}"] = value
    print(json.dumps(row))
