"""Define LoRA layers and choose the linear layers that get one."""
