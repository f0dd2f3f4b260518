"""TRL's attention over packed samples that share their prefixes, where its kernel, FlashAttention 3, does not run."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer_service._trl_async import TREE_ATTENTION


def register_plain_attention() -> None:
    """Have models that TRL packs for compute the same in plain PyTorch, segment by segment."""
    AttentionInterface.register(TREE_ATTENTION, plain_attention)


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    tree_kv_index: torch.Tensor,
    tree_cu_seqlens_q: torch.Tensor,
    tree_cu_seqlens_k: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Each segment of the packed row attends to the path from the root to itself.

    Args:
        query, key, value: (1, heads, tokens, size); key and value may have fewer heads.
        tree_kv_index: the tokens of all paths, one path after the other.
        tree_cu_seqlens_q, tree_cu_seqlens_k: where segments, and their paths, begin and end.

    Returns:
        (1, tokens, heads, size).

    Raises:
        NotImplementedError: the model caps its scores.
    """
    if softcap:
        raise NotImplementedError("models that cap attention's scores need a GPU to train asynchronously")
    outputs = []
    ends_q, ends_k = tree_cu_seqlens_q.tolist(), tree_cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        path = tree_kv_index[ends_k[i] : ends_k[i + 1]]
        own = query[:, :, ends_q[i] : ends_q[i + 1]]
        rows = torch.arange(own.shape[2], device=own.device)[:, None] + len(path) - own.shape[2]
        columns = torch.arange(len(path), device=own.device)[None, :]
        mask = columns <= rows
        if sliding_window:
            mask &= columns > rows - sliding_window
        outputs.append(
            scaled_dot_product_attention(
                own,
                key.index_select(2, path),
                value.index_select(2, path),
                attn_mask=mask,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None
