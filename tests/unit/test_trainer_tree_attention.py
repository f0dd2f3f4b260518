"""Packed samples that share their prefixes are given the logprobs that each has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import ARCHITECTURES, SMALL
from trainer_service._trl_async import TREE_ATTENTION, TreeRow
from trainer_service.trainers.tree_attention import plain_attention, register_plain_attention

PROMPT = list(range(10, 30))
SAMPLES = [[*PROMPT, 40, 41, 42], [*PROMPT, 40, 41, 43, 44], [*PROMPT, 50], [7, 8, 9, 60, 61]]


def packed(samples: list[list[int]]) -> tuple[dict[str, torch.Tensor], TreeRow]:
    row = TreeRow()
    for ids in samples:
        mask = np.ones(len(ids), dtype=np.int64)
        mask[0] = 0
        row.add(
            {
                "input_ids": np.asarray(ids),
                "completion_mask": mask,
                "old_log_probs": np.zeros(len(ids), dtype=np.float32),
                "advantage": 1.0,
                "group_id": 0,
            }
        )
    return row.pack(), row


def logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize(
    "fields", [{}, {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0}]
)
def test_each_sample_is_as_it_is_alone(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **SMALL | ARCHITECTURES["qwen2"] | fields)
    alone = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    alone.save_pretrained(tmp_path)
    from trl.experimental.async_grpo.packing import register_tree_attention

    register_tree_attention()
    register_plain_attention()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=TREE_ATTENTION).eval()
    row, tree = packed(SAMPLES)
    assert len(row["input_ids"]) < sum(map(len, SAMPLES)), "prefixes are shared"
    with torch.no_grad():
        longest = row["tree_max_seqlens"].tolist()
        logits = model(
            input_ids=row["input_ids"][None],
            position_ids=row["position_ids"][None],
            tree_kv_index=row["tree_kv_index"],
            tree_cu_seqlens_q=row["tree_cu_seqlens_q"],
            tree_cu_seqlens_k=row["tree_cu_seqlens_k"],
            tree_max_seqlen_q=longest[0],
            tree_max_seqlen_k=longest[1],
        ).logits[0]
        for ids, nodes, segment in zip(SAMPLES, tree.sample_nodes, range(len(SAMPLES)), strict=True):
            here = logits[row["token_index"][row["segment_id"] == segment]]
            there = alone(torch.tensor([ids])).logits[0, :-1]
            assert len(here) == len(nodes) - 1
            targets = torch.tensor(ids[1:])
            assert torch.allclose(logprobs(here, targets), logprobs(there, targets), atol=1e-5)


def test_gradients_reach_what_is_shared() -> None:
    row, _ = packed(SAMPLES[:2])
    torch.manual_seed(0)
    count = len(row["input_ids"])
    query, key, value = (torch.randn(1, heads, count, 8, requires_grad=True) for heads in (4, 2, 2))
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    out, _ = plain_attention(None, query, key, value, None, **{name: row[name] for name in names})
    assert out.shape == (1, count, 4, 8)
    out[:, -1].sum().backward()
    assert value.grad is not None
    assert value.grad[:, :, : len(PROMPT)].abs().sum() > 0


def test_capped_scores_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="GPU"):
        plain_attention(
            None,
            *[torch.zeros(1, 1, 1, 1)] * 3,
            None,
            tree_kv_index=torch.tensor([0]),
            tree_cu_seqlens_q=torch.tensor([0, 1]),
            tree_cu_seqlens_k=torch.tensor([0, 1]),
            softcap=30.0,
        )
