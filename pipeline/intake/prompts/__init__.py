"""Rules over all units of a prompt, and over the splits prompts are in."""
