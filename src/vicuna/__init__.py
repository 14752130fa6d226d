"""Fine-tune Llama-family models on Chinese instructions, and talk with the result."""

__version__ = "0.1.0"
