"""The family's tokenizer: a byte-level BPE of 151,936 entries, trained or extended, and its chat template."""
