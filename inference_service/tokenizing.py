"""The engine's tokenizer, beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from inference_service.rendering import rendered
from tandem.errors import invalid


class Tokenizing:
    """The part of an engine that makes token ids of texts and chats."""

    llm: Any

    def __init__(self) -> None:
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # fast tokenizers aren't safe in two threads

    def stop_tokenizing(self) -> None:
        """Make no more of them."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens."""
        return await self._in_tokenizer(lambda t: t(text)["input_ids"])

    async def render(
        self,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
        *,
        template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a chat.

        Args:
            variables: further ones of the template.
            template: a Jinja template in place of the tokenizer's.
            tools: JSON schemas.
            add_generation_prompt: whether the assistant's turn is opened at the end.

        Raises:
            InvalidArgument: the template refuses the chat, or there is none. Names "template" where the caller's
                fails, "template_kwargs" where a variable is none, else "".
        """
        return await self._in_tokenizer(
            lambda tokenizer: rendered(
                tokenizer,
                messages,
                variables,
                template=template,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
            )
        )

    async def _in_tokenizer(self, call: Any) -> list[int]:
        tokenizer = self.llm.get_tokenizer()
        if tokenizer is None:
            raise invalid("prompts", "the engine was started without a tokenizer: send token ids")
        return list(await asyncio.get_running_loop().run_in_executor(self._tokenizing, call, tokenizer))
