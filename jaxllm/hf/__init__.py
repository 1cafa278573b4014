"""Hugging Face checkpoints: config.json and safetensors to (ModelConfig, parameters), and back."""
