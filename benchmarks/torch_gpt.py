# SPDX-License-Identifier: Apache-2.0
"""A GPT in PyTorch as nanoGPT describes it: what ours is compared with, in speed and in numbers.

Pre-norm blocks, fused q, k and v, `scaled_dot_product_attention`, four times the width in the MLP,
learned positions, a head that is the embedding, AdamW that decays matrices and tables alone.
"""

import dataclasses
import pathlib

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Matrices that GPT-2's checkpoints store as `[in, out]`, and `nn.Linear` as `[out, in]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a GPT, by nanoGPT's names."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool = True


class CausalSelfAttention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)
        self.n_head = shape.n_head

    def forward(self, x):
        rows, length, width = x.shape
        heads = (
            part.view(rows, length, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(rows, length, width))


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attn = CausalSelfAttention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """`model(tokens, targets)` is the mean loss over targets of 0 and above."""

    def __init__(self, shape: Shape):
        super().__init__()
        parts = {
            "wte": nn.Embedding(shape.vocab_size, shape.n_embd),
            "wpe": nn.Embedding(shape.block_size, shape.n_embd),
            "h": nn.ModuleList([Block(shape) for _ in range(shape.n_layer)]),
            "ln_f": nn.LayerNorm(shape.n_embd, bias=shape.bias),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens, targets):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer.wte(tokens) + self.transformer.wpe(places)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return F.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1
        )


def read(model: GPT, folder: pathlib.Path) -> None:
    """Fill a model with the weights of a GPT-2 checkpoint.

    Raises:
      RuntimeError: the checkpoint lacks a weight, or has others.
    """
    tensors = {name: torch.from_numpy(x) for name, x in turned(load_file(_file(folder))).items()}
    missing = model.load_state_dict(tensors, strict=False)
    if missing.unexpected_keys or missing.missing_keys not in ([], ["lm_head.weight"]):
        raise RuntimeError(f"needed the weights of a GPT-2 in {folder}; got {missing}")


def _file(folder: pathlib.Path) -> pathlib.Path:
    return folder / "model.safetensors"


def turned(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint with matrices as `nn.Linear` has them, or the other way around."""
    return {
        name: np.ascontiguousarray(x.T) if name.endswith(CONV1D) else x
        for name, x in tensors.items()
    }


def adamw(model: GPT, *, rate: float, betas: tuple[float, float], decay: float, **options):
    """AdamW, which decays what has two axes, as nanoGPT's does."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, **options)


def advance(model: GPT, optimizer, tokens, targets, *, clip: float | None) -> torch.Tensor:
    """Make a step; give its loss."""
    loss = model(tokens, targets)
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
