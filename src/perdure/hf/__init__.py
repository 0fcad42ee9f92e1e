"""perdure inside the Hugging Face Trainer and TRL's SFTTrainer. Imports no torch."""
