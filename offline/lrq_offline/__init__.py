"""lrq-offline: learns low-bit weights block by block and writes LRQ checkpoints."""
