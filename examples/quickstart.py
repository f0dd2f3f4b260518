from datasets import Dataset
from trl import GRPOConfig
from trainer_service.trainers import GRPOTrainer

trainer = GRPOTrainer(
    model="out/models/SmolLM2-135M-Instruct",
    reward_funcs=lambda completions, **_: [float("7" in text) for text in completions],
    args=GRPOConfig("out/quickstart", use_cpu=True, bf16=False, model_init_kwargs={"dtype": "bfloat16"},
                    max_completion_length=16, per_device_train_batch_size=8, max_steps=3, report_to="none"),
    train_dataset=Dataset.from_dict({"prompt": ["What is 3 + 4?", "What is 2 + 5?"] * 12}),
    inference_address="unix:///tmp/tandem/inference.sock",
)
trainer.train()
