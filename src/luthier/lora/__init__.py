"""LoRA: the adapter layers, and which linear layers get one."""
