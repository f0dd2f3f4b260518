"""Golden numbers of Nash-MD and XPO: what TRL 1.13.0, the last that had them, makes of recorded rollouts and scores.

    python -m tests.golden.trl_1_13

writes trl_1_13.json, in an environment with trl==1.13.0. The tests read CASES and the file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests import models

FILE = Path(__file__).with_suffix(".json")
#: Text whose first token is the beginning of a sequence, which TRL 1.13 would put there itself.
PROMPTS = ["<bos>ab", "<bos>longer than the others", "<bos>x"]
#: Token ids; 1 ends a sequence, or max_new_tokens. The policy's, and the other's.
COMPLETIONS = [
    [[10, 20, 30, 40, 1], [50, 60, 65, 75, 85, 95], [70, 80, 90, 100, 110, 120]],
    [[11, 1], [21, 31, 41, 51, 61, 1], [71, 81, 91, 101, 111, 121]],
]
SCORES = [[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nash_md": ("nash_md", {"beta": 0.1, "mixture_coef": 0.5}),
    "nash_md_penalty": ("nash_md", {"beta": 0.4, "mixture_coef": 0.2, "missing_eos_penalty": 1.0}),
    "xpo_sigmoid": ("xpo", {"beta": 0.1, "alpha": 1e-5}),
    "xpo_ipo": ("xpo", {"beta": 0.3, "alpha": 0.1, "loss_type": "ipo"}),
    "xpo_penalty": ("xpo", {"beta": 0.2, "alpha": 0.01, "missing_eos_penalty": 2.5}),
}
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": len(PROMPTS),
    "max_new_tokens": 6,
    "max_length": 200,
    "max_steps": 1,
    "report_to": [],
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}


def pair(folder: Path) -> list[Any]:
    """Policy and reference, which differ."""
    paths = [models.make(folder / str(seed), "llama", seed=seed) for seed in (0, 1)]
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]


def padded(rows: list[list[int]]) -> torch.Tensor:
    """(rows, longest), padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [models.SMALL["pad_token_id"]] * (longest - len(row)) for row in rows])


def measured(trainer: Any) -> dict[str, Any]:
    """Loss, gradient and statistics of one step on the recorded batch."""
    trainer.create_optimizer()
    model = trainer.accelerator.prepare_model(trainer.model)
    loss = trainer.training_step(model, {"prompt": list(PROMPTS)})
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    return {
        "loss": loss.item(),
        "grad_norm": torch.stack([gradient.norm() for gradient in gradients]).norm().item(),
        "stats": {name: values[-1] for name, values in trainer.stats.items()},
    }


def _golden(kind: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    from trl.experimental import nash_md, xpo  # of 1.13.0

    cls, config, module = {
        "nash_md": (nash_md.NashMDTrainer, nash_md.NashMDConfig, nash_md.nash_md_trainer),
        "xpo": (xpo.XPOTrainer, xpo.XPOConfig, xpo.xpo_trainer),
    }[kind]
    scores = iter(torch.tensor(row) for row in SCORES)
    module.get_reward = lambda *_: (None, next(scores).clone(), None)

    class Recorded(cls):  # type: ignore[misc, valid-type]
        def _generate_completions(self, first: Any, second: Any) -> Any:
            prompts = first if isinstance(first, dict) else second
            return [torch.cat((prompts["input_ids"], padded(rows)), 1) for rows in COMPLETIONS]

    policy, reference = pair(folder)
    trainer = Recorded(
        policy,
        reference,
        reward_funcs=[lambda **_: None],
        args=config(str(folder / "run"), **SETTINGS, **values),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=models.tokenizer(),
    )
    return measured(trainer)


def main() -> None:
    """Write the file."""
    import trl

    assert trl.__version__ == "1.13.0", trl.__version__
    found = {}
    for name, (kind, values) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _golden(kind, values, Path(folder))
    FILE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
