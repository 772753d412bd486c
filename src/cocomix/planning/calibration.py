"""Measure how fast this machine trains, for plans of recipes that will run on it."""

from __future__ import annotations

import os
import time

import torch

from cocomix.common.gpus import Gpu
from cocomix.models.building import BackboneConfig, backbone_config, build_plain
from cocomix.models.flops import training_flops_per_token
from cocomix.models.plain import with_token_loss
from cocomix.objectives import NextToken
from cocomix.planning.costs import Machines

SECONDS = 1.0
"""Duration of the measurement in each precision."""
VOCABULARY = 2048
TRIALS = {
    "cpu": (BackboneConfig("gpt2", 128, 4, 4), 8, 128),
    "cuda": (BackboneConfig("gpt2", 1024, 4, 16), 16, 1024),
}
"""Sizes of the decoder to train, blocks of a batch, and tokens of a block."""


def this_machine() -> Machines:
    """Describe this machine: its GPU if it has one, else its CPU, with the measured speed of training a small decoder.

    A measured speed needs no assumption about the utilization, so this is 1.
    """
    if torch.cuda.is_available():
        name, device = torch.cuda.get_device_name(), "cuda"
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        threads = torch.get_num_threads()
        name, device = f"this CPU ({threads} thread{'s' if threads > 1 else ''})", "cpu"
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    speed = Gpu(memory, training_speed(device, torch.bfloat16), training_speed(device, torch.float32))
    return Machines(name, speed, 1, 1.0, device, measured=True)


def training_speed(device: str, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """Train a small decoder for some seconds; return the FLOPs per second.

    Args:
        device: cpu or cuda.
        dtype: precision of matrix products, by autocast unless it is float32.
        seconds: duration of the measurement.
    """
    sizes, blocks, length = TRIALS[device]
    config = backbone_config(sizes, vocab_size=VOCABULARY, block_size=length, eos_token_id=0)
    model = with_token_loss(build_plain(config)).to(device)
    optimizer, objective = torch.optim.AdamW(model.parameters(), fused=True), NextToken()
    batch = {"input_ids": torch.randint(VOCABULARY, (blocks, length), device=device)}

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = objective(model, batch, objective.count(batch)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    step()  # allocates memory and selects kernels
    start, steps = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds or steps == 0:
        step()
        steps += 1
    return training_flops_per_token(model, length) * blocks * length * steps / taken
