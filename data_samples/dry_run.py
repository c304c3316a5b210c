"""What a run of perl.py would read and take, before any weight is loaded: `perl.py --dry-run`
prints it, and a run on a GPU that is too small for it ends with one sentence."""
import dataclasses
import math
import random

import torch
import transformers

import perl

USED = 0.92  # of a GPU's memory; the rest is CUDA's own, and holes between tensors

# What the plan prints, in this order.
LABELS = {
    "weights": "weights", "gradients": "gradients, float32",
    "adamw": "AdamW's moments and float32 copies, a process", "start_model": "start model of KL",
    "kv_cache": "KV cache of a rollout batch", "images_read": "before it, reading its images",
    "activations": "activations of a micro-batch", "logits_chunk": "with a chunk's logits",
    "sampling": "GPU in all, sampling", "update": "GPU in all, update",
    "saving": "GPU in all, saving", "host": "host memory, a process",
    "disk": "disk, a checkpoint; twice while saving"}

def plan(cfg, processor, questions: list, accelerator) -> str:
    """Where AdamW's state is to lie, "gpu" or "host". SystemExit if even so the run does not fit
    on the GPU: that of --gpu-gb, else the one at hand. With --dry-run, prints all about it."""
    is_cuda = accelerator.device.type == "cuda"
    on_gpu = is_cuda or cfg.gpu_gb > 0
    if is_cuda and cfg.dtype == "auto":
        cfg.dtype = "bf16"  # resolved here: KL's start model is loaded on the host, but likewise
    at_hand = torch.cuda.mem_get_info()[0] / 1e9 if is_cuda else math.inf
    room = USED * (cfg.gpu_gb or at_hand)
    for place in ("gpu", "host") if cfg.optimizer_device == "auto" else (cfg.optimizer_device,):
        settings = dataclasses.replace(cfg, optimizer_device=place)
        planned = plan_memory(settings, accelerator.num_processes, on_gpu)
        phases = ["sampling", "update", "saving"] if cfg.stage > 0 else ["sampling"]
        phase = max(phases, key=planned.get)
        peak = planned[phase] / 1e9
        if peak <= room:
            break
    if cfg.dry_run and accelerator.is_main_process:
        show_orders(cfg, processor, questions)
        where = f"a GPU, AdamW's state on the {place}" if on_gpu else "a CPU; --gpu-gb N: for a GPU"
        print(f"{planned['trained'] / 1e9:.3f} billion parameters to train, "
              f"{planned['frozen'] / 1e9:.3f} billion frozen\nat most, in GB, on {where}:")
        for name, label in LABELS.items():
            print(f"  {planned[name] / 1e9:9.2f}  {label}")
    if peak > room:
        raise SystemExit(
            f"{cfg.model} needs {peak:.1f} GB in {phase}, and {room:.1f} are free: lower "
            "--max-tokens-per-micro-batch, --rollout-batch or --max-new-tokens, or set "
            "--optimizer-device host, --freeze-vision or --lora-rank 64")
    return place

def plan_memory(cfg, n_processes: int, on_gpu: bool) -> dict[str, int]:
    """Parameters, and bytes by part and at each phase's peak, from config.json alone; for the
    longest responses, and prompts of nothing but images, that cfg allows."""
    config = perl.load_pretrained(transformers.AutoConfig, cfg.model)
    is_bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and on_gpu
    size = 2 if is_bf16 else 4  # of a number
    with torch.device("meta"):  # shapes without numbers
        model = perl.FAMILY_MODEL(config).to(torch.bfloat16 if is_bf16 else torch.float32)
        model.model.visual.requires_grad_(not cfg.freeze_vision)
        if cfg.lora_rank:
            perl.add_lora(model, cfg)
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    frozen = sum(w.numel() for w in model.parameters() if not w.requires_grad)
    weights = sum(w.nbytes for w in model.parameters())
    on_host = on_gpu and cfg.optimizer_device == "host"
    is_copied = on_host or is_bf16 and not cfg.lora_rank  # else AdamW steps on the weights
    adamw = (12 if is_copied else 8) * trained // n_processes  # two moments, and the copy
    start_model = weights if cfg.beta and not cfg.lora_rank else 0

    text, vision = config.text_config, config.vision_config
    tokens = max(cfg.max_tokens_per_micro_batch, cfg.max_prompt_tokens + cfg.max_new_tokens)
    patches = tokens * vision.spatial_merge_size ** 2
    copies = 1 if cfg.share else cfg.rollouts_per_order  # of a prompt, to sample from
    # Keys and values of prompts and responses in all layers, and twice in the one at work.
    kv_width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    cached = 4 * tokens * copies + cfg.rollout_batch * cfg.max_new_tokens
    kv_cache = cached * 2 * kv_width * (text.num_hidden_layers + 1) * size
    # Before that, images: pixels, in float32 too; nine float32 vectors as positions come in.
    pixels = model.model.visual.patch_embed.proj.weight[0].numel()  # of a patch
    images = 4 * patches * copies * ((4 + size) * pixels + 36 * vision.hidden_size)
    # A chunk's logits with four float32 copies; the gradient of the weights that made them.
    logits = text.vocab_size * (cfg.logit_chunk * (size + 16) + text.hidden_size * (size + 4))

    kept, work = 0, logits  # for the backward pass, and at its peak
    towers = [(text, text.num_hidden_layers, tokens)]
    if not (cfg.freeze_vision or cfg.lora_rank):
        towers.append((vision, vision.depth, patches))
        kept = patches * pixels * size
    for tower, n_layers, places in towers:
        # Two norms keep their input in float32 and two results, attention 7 vectors (keys and
        # values twice: a response sees copies), the MLP 4. Adapters add float32 inputs.
        layer = (8 + 11 * size) * tower.hidden_size + 4 * size * tower.intermediate_size
        if cfg.lora_rank:
            layer += 24 * tower.hidden_size + 16 * tower.intermediate_size
        in_each = size * tower.hidden_size if cfg.gradient_checkpointing else layer
        kept += places * n_layers * in_each
        work = max(work, places * layer)  # of the one whose turn it is

    always = weights + (0 if on_host else adamw) + (0 if on_gpu else start_model)
    return {
        "trained": trained, "frozen": frozen, "weights": weights, "gradients": 4 * trained,
        "adamw": adamw, "start_model": start_model, "kv_cache": kv_cache, "images_read": images,
        "activations": kept + work, "logits_chunk": logits,
        "sampling": always + max(images, kv_cache),
        "update": always + 4 * trained + kept + work,
        "saving": always + (weights if cfg.lora_rank else 0),  # a copy, to merge adapters
        "host": (adamw if on_host else 0) + (start_model if on_gpu else 0),
        "disk": weights + 12 * trained}

def show_orders(cfg, processor, questions: list) -> None:
    """Print what the model would read: a question with many orders, in some of them."""
    sample = max(questions, key=perl.count_orders)
    for order in perl.draw_orders(sample, cfg.n_permutations, 1.0, random.Random(cfg.seed)):
        prompt = perl.encode_prompt(perl.permute(sample, order), processor)
        print(f"order {order}, {len(prompt.ids)} tokens, answer {prompt.sample.answer}: "
              f"{perl.prompt_text(prompt.sample, processor)}")
