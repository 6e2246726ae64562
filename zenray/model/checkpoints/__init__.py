"""Foreign checkpoints: any Llama- or Qwen-style model becomes a complete, normal Hugging Face folder, or is refused.

Run as `python -m zenray.model.checkpoints SOURCE DEST`, so that whoever asks need not import torch.
"""

REVISION = 1
"""Goes up when the same source comes to give other files: versions are named for source, type and revision."""
