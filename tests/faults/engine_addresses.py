"""An engine in this process, and as JSON where its parameters lie in its worker.

python -m tests.faults.engine_addresses FILE CHECKPOINT
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from inference_service.collect import collect
from inference_service.engine import Engine
from tests.services import ENGINE


async def main(out: str, checkpoint: str) -> None:
    engine = await Engine.start(checkpoint, {name: json.loads(value) for name, value in ENGINE.items()})
    try:
        arenas = await collect(engine)
        (addresses,) = await engine.call_workers("tandem_addresses")
        found = {
            "addresses": addresses,
            "offsets": {p.spec.name: p.blocks[0].arena_offset for p in arenas.placements},
        }
    finally:
        await asyncio.to_thread(engine.stop)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
