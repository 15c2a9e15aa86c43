"""The vLLM engine on the V2 runner, over a fake of it."""
