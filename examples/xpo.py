"""XPO on sums and differences: python examples/xpo.py [--model M] [--address A] [--steps N]

The inference service serves the model beside itself: tandem inference --model M --reference-model M ...
"""

import argparse

import reasoning_gym
from datasets import Dataset
from transformers import AutoTokenizer

from trainer_service.trainers import XPOConfig, XPOTrainer  # TRL had them until 1.13

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="out/models/SmolLM2-135M-Instruct")
parser.add_argument("--address", default="unix:///tmp/tandem/inference.sock")
parser.add_argument("--steps", type=int, default=24)
options = parser.parse_args()

settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+", "-"]}
tasks = reasoning_gym.create_dataset("basic_arithmetic", size=1000, seed=0, **settings)
rows = [
    {"prompt": [{"role": "user", "content": task["question"]}], "answer": task["answer"]} for task in tasks
]


def reward(completions, answer, **_):  # columns of the dataset come as lists, with a value for each rollout
    texts = [messages[-1]["content"] for messages in completions]
    return [tasks.score_answer(text, {"answer": right}) for text, right in zip(texts, answer, strict=True)]


trainer = XPOTrainer(
    model=options.model,
    reward_funcs=reward,
    args=XPOConfig(
        "out/xpo",
        max_steps=options.steps,
        learning_rate=4e-5,
        optim="stable_adamw",  # what bfloat16 rounds off one step is added to the next
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_new_tokens=12,
        max_length=128,
        alpha=1e-5,  # the weight of exploration
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16"},  # the engine's: the parameters can be its memory
        bf16=False,
        use_cpu=True,  # on a GPU, leave this out
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(options.model),
    inference_address=options.address,  # the one address
)
trainer.train()
