"""What a user calls: DeepSpeed and the HF Trainer."""
