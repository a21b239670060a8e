"""Settings: what they are, where they come from, and what changes when they are read again."""
