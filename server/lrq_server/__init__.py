"""lrq-server: serves LRQ checkpoints with vLLM."""
