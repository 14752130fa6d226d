"""Names of an adapter's files, apart from `adapter.py`: looking for them needs no PyTorch."""

META = "vicuna.json"  # what this project notes beside an adapter or a merged base
# Today's, then those of 2023.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")
