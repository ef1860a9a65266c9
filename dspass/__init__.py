"""ZeRO and friends as compiler passes of ``torch.compile``."""
