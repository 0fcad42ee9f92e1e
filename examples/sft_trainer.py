"""Instruction tuning, one task after another, in a script for TRL's SFTTrainer (pip install "perdure[sft]").

    python examples/sft_trainer.py --model Qwen/Qwen3-0.6B-Base --data tasks --tasks science law

`tasks/` holds `science.train.jsonl`, `science.test.jsonl` and so on, one row a line:
{"prompt": "...", "completion": "..."}. All that is perdure's stands in the lines with `callback`. SFTTrainer prepares
its data when it is made, so there is a new one for each task; they share the model, and the callback goes along.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import perdure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a hub id or a folder")
parser.add_argument("--data", required=True, help="folder of jsonl files")
parser.add_argument("--tasks", nargs="+", required=True, help="in the order in which they are learnt")
parser.add_argument("--output", default="runs/sft_trainer")
parser.add_argument("--learning-rate", type=float, default=5e-4)
given = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(given.model)
tokenizer = AutoTokenizer.from_pretrained(given.model)


def rows(task, split):
    return load_dataset("json", data_files=f"{given.data}/{task}.{split}.jsonl", split="train")


callback = perdure.PerdureCallback(method={"moram": {"rank": 8}})

for task in given.tasks:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=given.output,
            learning_rate=given.learning_rate,
            per_device_train_batch_size=8,
            num_train_epochs=1,
            max_length=512,
            save_steps=200,
            save_total_limit=2,
            report_to=[],
            bf16=torch.cuda.is_available(),  # on by default, and refused on a CPU
        ),
        train_dataset=rows(task, "train"),
        eval_dataset={each: rows(each, "test") for each in given.tasks},  # their order is that of the experiences
        processing_class=tokenizer,
    )
    callback.bind(trainer)  # now `trainer.train()` learns one experience
    trainer.train(resume_from_checkpoint=True)

for task, scores in zip(given.tasks, callback.matrix, strict=True):
    print(f"perplexity after {task}:", ", ".join(f"{score:.3f}" for score in scores))
print(f"The report: {given.output}/report.html")
callback.save_pretrained(f"{given.output}/kept")  # perdure.Learner.from_pretrained reads it
