"""A second model beside the engine's: the logits of sequences that grow. Lives in vLLM's worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

#: Tokens, padding counted, of one forward pass over sequences that are new.
_PREFILL = 8192


class Growing(Protocol):
    """A sequence of token ids that grows at its end. Told from others by identity."""

    def __len__(self) -> int: ...

    def last(self) -> int:
        """The newest token."""
        ...

    def tokens(self) -> list[int]:
        """All of them."""
        ...


class Reference:
    """A causal language model of transformers' with a key-value cache over sequences that come and go.

    The cache is one rectangle: a row for each sequence, a column for each step. A sequence that began later, or that
    did not grow in a step, has holes in its row, which the attention mask hides.
    """

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device, vocab_size: int) -> None:
        """Load the model.

        Raises:
            ValueError: it has another vocabulary, or a layer that does not attend to the whole sequence.
        """
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._model = model.to(device).eval()
        config = self._model.config.get_text_config()
        if config.vocab_size != vocab_size:
            raise ValueError(
                f"reference_model: it has {config.vocab_size} tokens, and the engine's model {vocab_size}"
            )
        if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(f"reference_model: its layers of {', '.join(sorted(other))} are not supported")
        self._device = device
        self._clear()

    def _clear(self) -> None:
        from transformers import DynamicCache

        self._rows: list[Growing] = []
        self._lengths: list[int] = []
        self._cache: Any = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.bool, device=self._device)
        self._last: Any = None

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Growing]) -> torch.Tensor:
        """Logits of the token after each of `sequences`: (sequences, vocabulary), in the model's dtype.

        Sequences of the call before that are not among them are forgotten.
        """
        wanted = {id(sequence): sequence for sequence in sequences}
        kept = [
            row
            for row, (sequence, length) in enumerate(zip(self._rows, self._lengths, strict=True))
            if id(sequence) in wanted and len(sequence) - length in (0, 1)
        ]
        self._keep(kept)
        self._step()
        known = {id(sequence) for sequence in self._rows}
        self._enter([sequence for sequence in sequences if id(sequence) not in known])
        place = {id(sequence): row for row, sequence in enumerate(self._rows)}
        return self._last[[place[id(sequence)] for sequence in sequences]]  # type: ignore[no-any-return]

    def _keep(self, rows: list[int]) -> None:
        if not rows:
            self._clear()
        if len(rows) == len(self._rows):
            return
        self._rows = [self._rows[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        at = torch.tensor(rows, device=self._device)
        self._mask, self._last = self._mask[at], self._last[at]
        columns = self._mask.any(0).nonzero().flatten()
        for layer in self._cache.layers:
            layer.keys = layer.keys[at][:, :, columns]
            layer.values = layer.values[at][:, :, columns]
        self._mask = self._mask[:, columns]

    def _step(self) -> None:
        """One token for each row that grew."""
        grew = [len(sequence) > length for sequence, length in zip(self._rows, self._lengths, strict=True)]
        if not any(grew):
            return
        tokens = [sequence.last() if new else 0 for sequence, new in zip(self._rows, grew, strict=True)]
        here = torch.tensor(grew, device=self._device)
        self._mask = torch.cat((self._mask, here[:, None]), 1)
        output = self._model(
            input_ids=torch.tensor(tokens, device=self._device)[:, None],
            attention_mask=self._mask.long(),
            position_ids=torch.tensor(self._lengths, device=self._device)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._last = torch.where(here[:, None], output.logits[:, -1], self._last)
        self._lengths = [len(sequence) for sequence in self._rows]

    def _enter(self, new: list[Growing]) -> None:
        """New rows. Equal ones, which the rollouts of a group are at first, are computed once."""
        groups: dict[tuple[int, ...], list[Growing]] = {}
        for sequence in new:
            groups.setdefault(tuple(sequence.tokens()), []).append(sequence)
        batch: list[tuple[int, ...]] = []
        for tokens in sorted(groups, key=len):
            if batch and len(tokens) * (len(batch) + 1) > _PREFILL:
                self._prefill(batch, groups)
                batch = []
            batch.append(tokens)
        if batch:
            self._prefill(batch, groups)

    def _prefill(self, batch: list[tuple[int, ...]], groups: dict[tuple[int, ...], list[Growing]]) -> None:
        from transformers import DynamicCache

        length = len(batch[-1])
        ids = torch.tensor([[0] * (length - len(tokens)) + list(tokens) for tokens in batch])
        mask = torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in batch])
        cache: Any = DynamicCache()
        output = self._model(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        owners = [(row, sequence) for row, tokens in enumerate(batch) for sequence in groups[tokens]]
        at = torch.tensor([row for row, _ in owners], device=self._device)
        self._join(cache, mask.to(self._device).bool()[at], output.logits[:, -1][at], at)
        self._rows += [sequence for _, sequence in owners]
        self._lengths += [len(sequence) for _, sequence in owners]

    def _join(self, cache: Any, mask: torch.Tensor, last: torch.Tensor, at: torch.Tensor) -> None:
        """Rows `at` of `cache` below those that are there, right-aligned."""
        columns = max(mask.shape[1], self._mask.shape[1])
        old, more = columns - self._mask.shape[1], columns - mask.shape[1]
        first = not self._rows
        self._mask = torch.cat((pad(self._mask, (old, 0)), pad(mask, (more, 0))))
        self._last = last if first else torch.cat((self._last, last))
        for index, layer in enumerate(cache.layers):
            keys, values = (pad(t[at], (0, 0, more, 0)) for t in (layer.keys, layer.values))
            if first:
                layer.keys, layer.values = keys, values
                continue
            mine = self._cache.layers[index]
            mine.keys = torch.cat((pad(mine.keys, (0, 0, old, 0)), keys))
            mine.values = torch.cat((pad(mine.values, (0, 0, old, 0)), values))
        if first:
            self._cache = cache
