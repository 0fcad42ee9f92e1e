"""Text classification, one domain after another, in a script for the Hugging Face Trainer.

    python examples/hf_trainer.py --model google-bert/bert-base-uncased --data reviews --domains books films

`reviews/` holds `books.train.jsonl`, `books.test.jsonl` and so on, one row a line: {"text": "...", "label": 0}.
All that is perdure's stands in the lines with `callback`. Run the same command again after a crash: it goes on.
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import perdure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a hub id or a folder")
parser.add_argument("--data", required=True, help="folder of jsonl files")
parser.add_argument("--domains", nargs="+", required=True, help="in the order in which they are learnt")
parser.add_argument("--labels", type=int, default=2, help="number of classes")
parser.add_argument("--output", default="runs/hf_trainer")
parser.add_argument("--learning-rate", type=float, default=1e-3)
given = parser.parse_args()

model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=given.labels)
tokenizer = AutoTokenizer.from_pretrained(given.model)


def rows(domain, split):
    read = load_dataset("json", data_files=f"{given.data}/{domain}.{split}.jsonl", split="train")
    return read.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), batched=True)


arguments = TrainingArguments(
    output_dir=given.output,
    learning_rate=given.learning_rate,
    per_device_train_batch_size=16,
    num_train_epochs=1,
    save_steps=200,
    save_total_limit=2,
    report_to=[],
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows(given.domains[0], "train"),
    eval_dataset={domain: rows(domain, "test") for domain in given.domains},  # their order is that of the experiences
    data_collator=DataCollatorWithPadding(tokenizer),
)

callback = perdure.PerdureCallback(method={"moram": {"rank": 8}})
callback.bind(trainer)  # from here on each `trainer.train()` learns one experience

for domain in given.domains:
    trainer.train_dataset = rows(domain, "train")
    trainer.train(resume_from_checkpoint=True)

for domain, scores in zip(given.domains, callback.matrix, strict=True):
    print(f"after {domain}:", ", ".join(f"{score:.3f}" for score in scores))
print(f"The report: {given.output}/report.html")
callback.save_pretrained(f"{given.output}/kept")  # what was learnt, without the base model
